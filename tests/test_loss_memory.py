"""The losses with all options: one chunk of logits, nothing that waits, graphs that can be kept."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from support.captured import captured
from support.cross_entropy import force_tiny_blocks
from support.interpreter import interpreted_only
from support.linear_cross_entropy import forced, inputs
from support.losses import OPTIONS, flattened, weights
from support.memory import in_child, sparse
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm
from fastlm.kernels import _chunks
from fastlm.testing import cross_entropy_inputs

OP = "linear_cross_entropy"
FAST = ["triton", "cuda", "torch"]
ROWS, CHUNK, WIDTH, VOCAB_SIZE = 6, 2, 2, 256
LOSS = {name: value for name, value in OPTIONS.items() if name not in ("weight", "reduction")}
REDUCTIONS = ["mean", "none"]


class NothingAboveAChunk(TorchDispatchMode):
    """Refuses new memory of more bytes than the float32 logits of a chunk."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        held = {address(x) for x in args if isinstance(x, Tensor)}
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if not isinstance(tensor, Tensor) or address(tensor) in held:
                continue
            # bytes are what the poisoning of memory writes
            if tensor.nbytes > 4 * CHUNK * VOCAB_SIZE and tensor.dtype != torch.uint8:
                raise AssertionError(f"{func} gives {tuple(tensor.shape)}")
        return out


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextlib.contextmanager
def nothing_above_a_chunk(op: str, backend: str) -> Iterator[None]:
    """In chunks of two rows, and also inside the operators, where a mode does not see."""
    module = importlib.import_module(f"fastlm.ops.{op}").BACKENDS[backend]
    implementation = importlib.import_module(module)

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any) -> Any:
            with NothingAboveAChunk():
                return function(*args)

        return run

    with contextlib.ExitStack() as stack:
        for step in ("forward", "gradients", "backward"):
            if hasattr(implementation, step):
                wrapped = watched(getattr(implementation, step))
                stack.enter_context(mock.patch.object(implementation, step, wrapped))
        stack.enter_context(forced(block_v=VOCAB_SIZE))
        for limits in ("_CPU_LIMITS", "_GPU_LIMITS"):
            stack.enter_context(mock.patch.object(_chunks, limits, (1, CHUNK, CHUNK)))
        stack.enter_context(NothingAboveAChunk())
        yield


def layer(device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    *tensors, targets = inputs(ROWS, WIDTH, VOCAB_SIZE, dtype, device)
    return [*(t.requires_grad_() for t in tensors), targets]


def loss_with_all_options(
    x: Tensor, matrix: Tensor, bias: Tensor | None, targets: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    weight = weights(matrix.shape[0], str(x.device))
    return flattened(
        fastlm.linear_cross_entropy(
            x, matrix, targets, linear_bias=bias, weight=weight, **LOSS, **options
        )
    )


def every_gradient(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """With something coming in for each output."""
    return torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_statistics_come_without_the_logits(reduction, dtype, backend, device):
    *leaves, targets = layer(device, dtype)
    with nothing_above_a_chunk(OP, backend):
        outputs = loss_with_all_options(*leaves, targets, reduction=reduction, backend=backend)
        gradients = every_gradient(outputs, leaves)
        with torch.no_grad():
            loss_with_all_options(*leaves, targets, reduction=reduction, backend=backend)
        # of the loss alone, which is computed beside it where there is one
        outputs = loss_with_all_options(*leaves, targets, reduction=reduction, backend=backend)
        every_gradient(outputs[:1], leaves)
    assert all(gradient.norm() > 0 for gradient in gradients)


@pytest.mark.parametrize("backend", FAST)
def test_log_probabilities_come_without_the_logits(backend, device):
    *leaves, targets = layer(device)
    x, matrix, bias = leaves
    with nothing_above_a_chunk(OP, backend):
        logprobs = fastlm.linear_logprobs(
            x, matrix, targets, linear_bias=bias, softcap=3.0, logit_scale=0.5, backend=backend
        )
        every_gradient((logprobs,), leaves)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_most_likely_come_without_the_logits(backend, device):
    x, matrix, bias, _ = layer(device)
    with nothing_above_a_chunk("linear_top_k", backend):
        fastlm.linear_top_k(
            x, matrix, 3, linear_bias=bias, softcap=3.0, logit_scale=0.5, backend=backend
        )


def test_logits_would_be_seen(device):
    arguments = layer(device)
    refused = pytest.raises(AssertionError, match=r"gives \(6, 256\)")
    with nothing_above_a_chunk(OP, "reference"), refused:
        loss_with_all_options(*arguments, backend="reference")


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("frozen", ["layer", "input"])
def test_what_is_frozen_gets_no_product_and_no_memory(frozen, reduction, backend, device):
    # a gradient of the matrix would be larger than a chunk
    *tensors, targets = inputs(ROWS, CHUNK + 1, VOCAB_SIZE, device=device)

    def run(watch: Any, *needs: bool) -> tuple[list[Tensor], int]:
        """The gradients, and how many products they took."""
        leaves = [t.detach().requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]
        with mock.patch.object(_chunks, "matmul", wraps=_chunks.matmul) as products, watch:
            outputs = loss_with_all_options(*leaves, targets, reduction=reduction, backend=backend)
            gradients = every_gradient(outputs, [x for x in leaves if x.requires_grad])
        return list(gradients), products.call_count

    everything, all_products = run(forced(rows=CHUNK, block_v=VOCAB_SIZE), True, True, True)
    if frozen == "layer":
        gradients, products = run(nothing_above_a_chunk(OP, backend), True, False, False)
        expected = everything[:1]
    else:
        gradients, products = run(forced(rows=CHUNK, block_v=VOCAB_SIZE), False, True, True)
        expected = everything[1:]
    assert 2 * products == all_products > 0
    for got, want in zip(gradients, expected, strict=True):
        assert torch.equal(got, want)


# Repeated backward, and what a call leaves behind


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["loss alone", "with statistics"])
def test_a_kept_graph_gives_the_same_again_and_inputs_stay_as_they_were(
    kind, reduction, backend, device
):
    *leaves, targets = layer(device)
    before = [t.detach().clone() for t in (*leaves, targets)]
    outputs = loss_with_all_options(*leaves, targets, reduction=reduction, backend=backend)
    outputs = outputs[:1] if kind == "loss alone" else outputs
    upstream = [3 * torch.ones_like(x) for x in outputs]
    first, second = (
        torch.autograd.grad(outputs, leaves, upstream, retain_graph=True) for _ in range(2)
    )
    kept = [gradient.clone() for gradient in second]
    last = torch.autograd.grad(outputs, leaves, upstream)
    for gradients in (first, second, last):
        assert all(torch.equal(a, b) for a, b in zip(gradients, kept, strict=True))
    after = [t.detach() for t in (*leaves, targets)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


# Without the host


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["logits", "layer"])
def test_a_captured_graph_is_right_for_other_values(kind, reduction, device):
    def example(seed: int) -> list[Tensor]:
        if kind == "logits":
            logits, targets = cross_entropy_inputs(6, 40, torch.bfloat16, device, seed=seed)
            return [logits, targets]
        *tensors, targets = inputs(6, 5, 40, torch.bfloat16, device, seed=seed)
        return [*tensors, targets]

    def step(leaves: list[Tensor], targets: Tensor) -> list[Tensor]:
        if kind == "layer":
            outputs = loss_with_all_options(
                *leaves, targets, reduction=reduction, shift=1, backend="triton"
            )
        else:
            weight = weights(40, device)
            options = dict(LOSS, reduction=reduction, backend="triton")
            outputs = flattened(fastlm.cross_entropy(*leaves, targets, weight, **options))
        return [*outputs, *every_gradient(outputs, leaves)]

    *fixed, targets = example(0)
    leaves = [t.requires_grad_() for t in fixed]
    results: list[Tensor] = []

    def fixed_step() -> None:
        results[:] = step(leaves, targets)

    replay = captured(fixed_step, device)
    for seed in (1, 2):
        *others, other_targets = example(seed)
        assert (other_targets == -100).sum() != (targets == -100).sum() or seed > 1
        with torch.no_grad():
            for place, values in zip([*leaves, targets], [*others, other_targets], strict=True):
                place.copy_(values)
        replay()
        expected = step([t.detach().clone().requires_grad_() for t in leaves], targets)
        for got, want in zip(results, expected, strict=True):
            assert torch.equal(got, want)


# Beyond 2^31


HUGE = 2**30 + 64


@interpreted_only
@pytest.mark.parametrize("shape, strides", [
    ((3, 40), (HUGE, 1)),
    ((3, 2, 40), (HUGE, 40, 1)),
    ((2, 3, 40), (40, HUGE, 1)),
    ((2, 40), (1, 2**26 + 3)),
], ids=["rows", "outer", "inner", "classes"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_offsets_pass_2_to_the_31_with_all_options(shape, strides, dtype):
    def results(logits: Tensor, targets: Tensor) -> list[Tensor]:
        leaf = logits.requires_grad_()
        options = dict(LOSS, reduction="none", backend="triton")
        outputs = flattened(fastlm.cross_entropy(leaf, targets, weights(40, "cpu"), **options))
        return [*outputs, *every_gradient(outputs, [leaf])]

    def check() -> None:
        values = torch.randn(shape).to(dtype)
        targets = torch.randint(40, shape[:-1])
        far = sparse(shape, strides, dtype).copy_(values)
        assert 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) > 2**31
        with pytest.MonkeyPatch.context() as monkeypatch:
            force_tiny_blocks(monkeypatch)
            for got, want in zip(results(far, targets), results(values, targets), strict=True):
                assert got.isfinite().all()
                assert torch.equal(got, want)

    in_child(check)
