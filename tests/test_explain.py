"""Which backend runs: explain(), auto, named backends, and the warning for a second choice."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from types import SimpleNamespace

import pytest
import torch
from support.interpreter import interpreted_only

import fastlm
from fastlm.ops import _dispatch, _explain
from fastlm.testing import cross_entropy_inputs

CPU = "tensors are on cpu; auto runs kernels on CUDA only"
NOT_KERNELS = f"  not triton: {CPU}\n  not cuda: {CPU}"


@interpreted_only
def test_says_what_runs_and_why_the_others_do_not():
    logits, targets = cross_entropy_inputs(6, 40)
    explanation = fastlm.explain("cross_entropy", logits, targets)
    assert str(explanation) == f"cross_entropy forward: torch\n{NOT_KERNELS}"
    explanation = fastlm.explain("cross_entropy", logits.requires_grad_(), targets)
    assert list(explanation.steps) == ["forward", "backward"]
    assert explanation.steps["backward"] == _dispatch.Choice("torch", {"triton": CPU, "cuda": CPU})


def test_explains_a_named_backend(device):
    logits, targets = cross_entropy_inputs(6, 40, device=device)
    explanation = fastlm.explain("cross_entropy", logits, targets, backend="triton")
    assert str(explanation) == "cross_entropy forward: triton"
    apart = logits.expand(2, 3, 6, 40).transpose(0, 2)
    explanation = fastlm.explain(
        "cross_entropy", apart, targets.expand(2, 3, 6).transpose(0, 2), backend="reference"
    )
    assert explanation.steps["forward"].backend == "reference"


def test_explains_a_refusal(device):
    logits, targets = cross_entropy_inputs(6, 40, device=device)
    explanation = fastlm.explain("cross_entropy", logits, targets, backend="gluon")
    assert explanation.steps["forward"].backend is None
    assert "no backend takes this call\n  not gluon: cross_entropy has no gluon backend" in str(
        explanation
    )


def test_computes_nothing(device, monkeypatch):
    def fail(*args: object) -> None:
        raise AssertionError("explain ran a backend")

    for module in ("fastlm.ops.eager.cross_entropy", "fastlm.kernels.cross_entropy"):
        for step in ("forward", "backward"):
            monkeypatch.setattr(f"{module}.{step}", fail)
    logits, targets = cross_entropy_inputs(6, 40, device=device)
    leaf = logits.requires_grad_()
    explanation = fastlm.explain("cross_entropy", leaf, targets)
    assert len(explanation.steps) == 2
    assert leaf.grad is None


def test_takes_no_memory_for_tensors():
    logits = torch.empty(2**22, 2**20, device="meta")
    targets = torch.empty(2**22, dtype=torch.int64, device="meta")
    steps = fastlm.explain("cross_entropy", logits.requires_grad_(), targets).steps
    assert steps["backward"].backend == "torch"


def test_raises_what_the_call_would_raise(device):
    with pytest.raises(TypeError, match="cross_entropy: target must be"):
        fastlm.explain("cross_entropy", torch.zeros(3, 5), torch.zeros(3))
    with pytest.raises(ValueError, match=r"backend must be one of auto, .* got 'best'"):
        fastlm.explain(
            "cross_entropy", torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64), backend="best"
        )
    with pytest.raises(ValueError, match=r"explain: op must be one of .*, got 'softmax'"):
        fastlm.explain("softmax", torch.zeros(3))
    assert not _explain._under_way


def test_explains_calls_of_tensor_subclasses(device):
    class Named(torch.Tensor):
        pass

    x = torch.randn(1, 4, 2, 8, device=device)
    named = x.as_subclass(Named).requires_grad_()
    for op, count in (("causal_attention", 3), ("swiglu", 2)):
        plain = fastlm.explain(op, *[x.detach().requires_grad_()] * count)
        assert fastlm.explain(op, *[named] * count) == plain
        assert list(plain.steps) == ["forward", "backward"]


def test_imports_no_triton_for_tensors_on_cpu():
    program = textwrap.dedent("""
        import sys, torch, fastlm
        x, y = torch.zeros(3, 5, requires_grad=True), torch.zeros(3, dtype=torch.int64)
        print(fastlm.explain("cross_entropy", x, y).steps["backward"].backend)
        fastlm.cross_entropy(x, y).backward()
        print([name for name in sys.modules if name.startswith("fastlm.kernels.cross")])
    """)
    run = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines() == ["torch", "[]"]


@interpreted_only
def test_auto_never_picks_the_interpreter():
    logits, targets = cross_entropy_inputs(6, 40)
    want = fastlm.cross_entropy(logits, targets, backend="torch")
    assert torch.equal(fastlm.cross_entropy(logits, targets), want)


def test_a_named_backend_never_falls_through(device):
    logits, targets = cross_entropy_inputs(6, 40, device=device)
    with pytest.raises(
        NotImplementedError, match="cross_entropy has no gluon backend, only triton"
    ):
        fastlm.cross_entropy(logits, targets, backend="gluon")
    with pytest.raises(ValueError, match=r"backend must be one of auto, triton, .* got 'best'"):
        fastlm.cross_entropy(logits, targets, backend="best")


# What happens on a GPU, with backends and a tensor that only say they are there


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setattr(_dispatch, "_on_gpu", lambda args: True)
    _dispatch._warn_once.cache_clear()

    def backend(reason: str | None) -> SimpleNamespace:
        return SimpleNamespace(forward=lambda x: x, forward_refuses=lambda x: reason)

    modules = {"a": backend("odd shape"), "b": backend("too old"), "c": backend(None)}
    monkeypatch.setattr(_dispatch, "_load", modules.__getitem__)
    return {"triton": "a", "cuda": "b", "torch": "c"}


def test_landing_below_the_first_choice_warns_once_with_reasons(on_gpu):
    with pytest.warns(UserWarning) as caught:
        chosen, _ = _dispatch.choose("op", "forward", on_gpu, "auto", [1])
    assert chosen == "torch"
    assert str(caught[0].message) == (
        "op forward runs on torch:\n  triton refused: odd shape\n  cuda refused: too old"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _dispatch.choose("op", "forward", on_gpu, "auto", [1])[0] == "torch"


def test_a_first_choice_and_a_named_backend_warn_of_nothing(on_gpu):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _dispatch.choose("op", "forward", {"torch": "c"}, "auto", [1])[0] == "torch"
        assert _dispatch.choose("op", "forward", on_gpu, "torch", [1])[0] == "torch"


def test_when_all_refuse_every_reason_is_given(on_gpu):
    del on_gpu["torch"]
    message = "op forward: no backend takes this call\n  triton refused: odd.*\n  cuda refused: too"
    with pytest.raises(NotImplementedError, match=message):
        _dispatch.choose("op", "forward", on_gpu, "auto", [1])


def test_a_library_that_is_missing_is_a_reason_and_a_broken_import_is_not(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "needs_triton.py").write_text("raise ModuleNotFoundError('no', name='triton')\n")
    (tmp_path / "needs_more.py").write_text("import a_module_that_is_not_there\n")
    assert _dispatch._load("needs_triton") == "triton is not installed"
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        _dispatch._load("needs_more")
