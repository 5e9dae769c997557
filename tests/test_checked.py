"""checked(): a wrong kernel is caught wherever it runs, and a right one is left alone."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.kv_cache import Call, call, same
from torch import Tensor

import fastlm
from fastlm.kernels import attention_with_kv_cache as cache_kernels
from fastlm.kernels import cross_entropy as kernels
from fastlm.ops import _checked
from fastlm.testing import cross_entropy_inputs

BACKENDS = ["triton", "torch", "reference"]


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return fastlm.cross_entropy(logits, targets, backend="triton")


def plant(monkeypatch: pytest.MonkeyPatch, step: str, harm: Callable[[Tensor], None]) -> None:
    """Have the triton backend harm its first output."""
    right = getattr(kernels, step)

    def wrong(*args: Any) -> Any:
        results = right(*args)
        harm(results[0] if isinstance(results, tuple) else results)
        return results

    monkeypatch.setattr(kernels, step, wrong)


def one_element(x: Tensor) -> None:
    x.view(-1)[x.numel() // 2] += 0.01


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_lets_right_results_pass_unchanged(dtype, backend, device, monkeypatch):
    monkeypatch.setattr("fastlm.ops.reference.cross_entropy._ROWS_AT_ONCE", 7)
    logits, targets = cross_entropy_inputs(20, 70, dtype, device)
    results = []
    for context in (fastlm.checked, torch.enable_grad):
        leaf = logits.clone().requires_grad_()
        with context():
            loss = fastlm.cross_entropy(leaf, targets, backend=backend)
            loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_names_what_is_wrong_in_a_forward(device, monkeypatch):
    plant(monkeypatch, "forward", one_element)
    logits, targets = cross_entropy_inputs(6, 40, torch.bfloat16, device)
    loss_of(logits, targets)
    with fastlm.checked(), pytest.raises(fastlm.KernelMismatch) as raised:
        loss_of(logits, targets)
    for part in ("cross_entropy forward on triton", "output 0", "(6,)", "torch.float32", "[3]",
                 "bfloat16[6, 40]", "int64[6]"):  # fmt: skip
        assert part in str(raised.value)
    loss_of(logits, targets)


def test_names_what_is_wrong_in_a_backward(device, monkeypatch):
    plant(monkeypatch, "backward", one_element)
    logits, targets = cross_entropy_inputs(6, 40, device=device)
    leaf = logits.requires_grad_()
    with fastlm.checked():
        loss = loss_of(leaf, targets)
        with pytest.raises(fastlm.KernelMismatch, match=r"backward on triton.*\[3, 0\]"):
            loss.backward()


@pytest.mark.parametrize("step", ["forward", "backward"])
def test_sees_into_compiled_code(step, device, monkeypatch):
    plant(monkeypatch, step, one_element)
    logits, targets = cross_entropy_inputs(6, 40, device=device)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    compiled(logits.clone().requires_grad_(), targets).backward()
    with fastlm.checked(), pytest.raises(fastlm.KernelMismatch, match=f"{step} on triton"):
        compiled(logits.clone().requires_grad_(), targets).backward()


@pytest.mark.parametrize("harm", [
    lambda x: x.zero_(),
    lambda x: x.mul_(1.001),
    lambda x: x[1].fill_(float("nan")),
    lambda x: x[0].fill_(float("inf")),
    lambda x: x.copy_(x.flip(0)),
], ids=["zeros", "scaled", "NaN", "infinity", "rows swapped"])  # fmt: skip
@pytest.mark.parametrize("step", ["forward", "backward"])
def test_catches(step, harm, device, monkeypatch):
    plant(monkeypatch, step, harm)
    logits, targets = cross_entropy_inputs(6, 40, torch.float16, device, ignored=0)
    with fastlm.checked(), pytest.raises(fastlm.KernelMismatch):
        loss_of(logits.requires_grad_(), targets).backward()


def test_names_a_target_out_of_range_that_a_kernel_turns_to_nan(device):
    logits, _ = cross_entropy_inputs(2, 40, device=device)
    targets = torch.tensor([3, 40], device=device)
    assert loss_of(logits, targets).isnan()
    with fastlm.checked(), pytest.raises(IndexError, match=r"got 40 at position \[1\]"):
        loss_of(logits, targets)


def test_judges_rows_that_are_not_finite(device):
    logits, targets = cross_entropy_inputs(24, 40, device=device, ignored=0)
    logits[0, 3] = float("nan")
    logits[1] = float("-inf")
    logits[2, 5] = float("inf")
    with fastlm.checked():
        loss_of(logits.requires_grad_(), targets).backward()


def test_compares_with_the_inputs_as_they_were(device, monkeypatch):
    """A kernel that changes its input cannot make the reference agree with it."""
    right = kernels.forward

    def wrong(logits: Tensor, *args: Any) -> Any:
        logits.mul_(0.5)
        return right(logits, *args)

    monkeypatch.setattr(kernels, "forward", wrong)
    logits, targets = cross_entropy_inputs(4, 40, device=device)
    with fastlm.checked(), pytest.raises(fastlm.KernelMismatch):
        loss_of(logits, targets)


def test_nests_and_ends_with_its_block():
    assert not _checked.is_on()
    with fastlm.checked():
        with fastlm.checked():
            assert _checked.is_on()
        assert _checked.is_on()
    assert not _checked.is_on()
    with pytest.raises(ValueError, match="left early"), fastlm.checked():
        raise ValueError("left early")
    assert not _checked.is_on()


def test_refuses_by_name_under_graph_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    class OnGpu(Tensor):
        is_cuda = True

    logits = torch.zeros(2, 3).as_subclass(OnGpu)
    with pytest.raises(RuntimeError, match=r"cross_entropy forward: checked\(\) cannot compare"):
        _checked.run("cross_entropy", "forward", "triton", lambda *x: x, lambda *x: x, [logits])


def test_the_environment_turns_it_on():
    program = textwrap.dedent("""
        import torch, fastlm
        from fastlm.ops.eager import cross_entropy as eager
        right = eager.forward
        eager.forward = lambda *args: (right(*args)[0] + 0.01, *right(*args)[1:])
        try:
            fastlm.cross_entropy(torch.randn(3, 5), torch.tensor([0, 1, 2]))
        except fastlm.KernelMismatch as error:
            print("caught", str(error).splitlines()[0][:30])
        else:
            print("not caught")
    """)
    for value, want in (("1", "caught cross_entropy forward on torch"[:37]), ("0", "not caught")):
        environment = {**os.environ, "FASTLM_CHECK": value}
        run = subprocess.run(
            [sys.executable, "-P", "-c", program],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert run.stdout.strip() == want, run.stdout


# ---- arguments that are written

LENGTHS = (37, 0, 63)


def plant_in_caches(
    monkeypatch: pytest.MonkeyPatch, harm: Callable[[Tensor, Tensor, Tensor], None]
) -> None:
    """Have the triton backend harm its out or, after they are written, the caches."""
    right = cache_kernels.forward

    def wrong(query: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any) -> Any:
        results = right(query, k_cache, v_cache, *args)
        harm(results[0], k_cache, v_cache)
        return results

    monkeypatch.setattr(cache_kernels, "forward", wrong)


def appending(device: str, dtype: torch.dtype = torch.float32, **options: Any) -> Call:
    return call(LENGTHS, 2, dtype=dtype, device=device, rotary=16, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"page_size": 7}], ids=["whole", "pages"])
def test_lets_right_caches_pass_unchanged(dtype, backend, options, device):
    one = appending(device, dtype, **options)
    expected = one(backend)
    with fastlm.checked():
        results = one(backend)
    for got, want in zip(results, expected, strict=True):
        assert same(got, want).all()


@pytest.mark.parametrize(("harm", "message"), [
    (lambda out, k, v: k[0, 37].mul_(1.01), r"argument k_cache of shape.*error .* allowed"),
    (lambda out, k, v: v[2, 64, 0, 5].mul_(-1), r"argument v_cache.*\[2, 64, 0, 5\]"),
    (lambda out, k, v: v[1, 0].fill_(torch.nan), "argument v_cache.*not finite"),
    (lambda out, k, v: k[0, :39].copy_(k[0, :39].roll(1, 0)), "argument k_cache"),
    (lambda out, k, v: k[2, 0, 0, 3].mul_(1 + 1e-6),
     r"argument k_cache.*written where it was not to be; worst at \[2, 0, 0, 3\]"),
    (lambda out, k, v: v[1, 2:].zero_(), r"argument v_cache.*\[1, 2, 0, 0\]: 0.0, not nan"),
    (lambda out, k, v: out[1].add_(0.01), "output 0"),
], ids=["key", "value", "nothing", "a token off", "old key", "a token more", "out"])  # fmt: skip
def test_catches_what_is_written_wrong(harm, message, device, monkeypatch):
    plant_in_caches(monkeypatch, harm)
    one = appending(device)
    one("triton")
    with fastlm.checked(), pytest.raises(fastlm.KernelMismatch, match=message):
        one("triton")


def test_catches_an_append_of_the_wrong_tokens(device, monkeypatch):
    """And attention over them, which is right, does not hide it."""
    right = cache_kernels.forward

    def wrong(*args: Any) -> Any:
        *before, key = args[:6]
        return right(*before, key.roll(1, 1), *args[6:])

    monkeypatch.setattr(cache_kernels, "forward", wrong)
    with fastlm.checked(), pytest.raises(fastlm.KernelMismatch, match="argument k_cache"):
        appending(device)("triton")


@pytest.mark.parametrize("options", [{}, {"page_size": 10}], ids=["whole", "pages"])
def test_a_row_that_does_not_fit_is_no_mismatch(options, device, monkeypatch):
    one = dataclasses.replace(appending(device, **options), lengths=[99, 0, 63])
    if options:
        one.options["block_table"][2, 6] = -1
    with fastlm.checked():
        out, *_ = one("triton")
    unfit = [True, False, bool(options)]
    assert out.isnan().flatten(1).all(1).tolist() == unfit
    plant_in_caches(monkeypatch, lambda out, k, v: out[0].zero_())
    with fastlm.checked(), pytest.raises(fastlm.KernelMismatch, match="output 0"):
        one("triton")


def test_reading_alone_writes_nothing(device, monkeypatch):
    one = call(LENGTHS, 2, device=device, appends=False)
    with fastlm.checked():
        one("triton")
    plant_in_caches(monkeypatch, lambda out, k, v: k[0, 5].mul_(1.5))
    with fastlm.checked(), pytest.raises(fastlm.KernelMismatch, match=r"\[0, 5, 0, 0\]"):
        one("triton")


def test_sees_what_compiled_code_writes(device, monkeypatch):
    one = appending(device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(query: Tensor, k_cache: Tensor, v_cache: Tensor) -> Any:
        return fastlm.attention_with_kv_cache(
            query, k_cache, v_cache, cache_seqlens=one.seqlens, backend="triton", **one.options
        )

    with torch.no_grad(), fastlm.checked():
        step(**one.tensors())
        plant_in_caches(monkeypatch, lambda out, k, v: k[0, 37].zero_())
        with pytest.raises(fastlm.KernelMismatch, match="argument k_cache"):
            step(**one.tensors())


def test_autograd_knows_what_was_written(device):
    one = appending(device)
    weight = torch.ones_like(one.k_cache).requires_grad_()
    k_cache = one.k_cache.nan_to_num(0.0)
    total = (k_cache * weight).sum()
    with torch.no_grad(), fastlm.checked():
        fastlm.attention_with_kv_cache(
            one.query, k_cache, one.v_cache, cache_seqlens=one.seqlens, backend="triton",
            **one.options,
        )  # fmt: skip
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
