"""Calls that go past the dispatcher, and those that may not: what every public op has in common."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.interpreter import interpreted_only
from torch import Tensor
from torch.autograd import functional
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastlm
from fastlm.cli.doctor import example
from fastlm.functional import OPS
from fastlm.ops import _define
from fastlm.testing import attention_inputs, cross_entropy_inputs

WITHOUT_GRADIENT = ("attention_with_kv_cache", "linear_top_k")
BACKENDS = ["triton", "torch", "reference"]


def operator(step: str) -> object:
    return getattr(torch.ops.fastlm, f"cross_entropy_{step}").default


def plain(x: Tensor) -> bool:
    return _define._nothing_intercepts((x, None, 1.0, "auto"))


class SeenByModes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class SeenByFunctionModes(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


def test_a_plain_eager_call_goes_directly(device):
    x = torch.zeros(3, 4, device=device)
    assert plain(x)
    assert plain(torch.nn.Parameter(x))
    assert plain(x.t())
    with torch.no_grad():
        assert plain(x)
    with torch.autocast(device):
        assert plain(x)
    with torch.inference_mode():
        assert plain(x)
        assert plain(torch.zeros(2, device=device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_ways_give_the_same_bits(backend, device, monkeypatch):
    logits, targets = cross_entropy_inputs(6, 40, device=device)
    results = []
    for directly in (True, False):
        monkeypatch.setattr(_define, "_nothing_intercepts", lambda args, d=directly: d)
        leaf = logits.clone().requires_grad_()
        loss = fastlm.cross_entropy(leaf, targets, backend=backend)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for direct, dispatched in zip(*results, strict=True):
        assert torch.equal(direct, dispatched)


def test_a_dispatch_mode_sees_the_operators(device):
    logits, targets = cross_entropy_inputs(6, 40, device=device)
    with SeenByModes() as mode:
        fastlm.cross_entropy(logits.requires_grad_(), targets).backward()
    assert {
        operator("forward"),
        operator("backward"),
    } <= set(mode.seen)


def test_a_function_mode_sees_the_operator(device):
    logits, targets = cross_entropy_inputs(6, 40, device=device)
    with SeenByFunctionModes() as mode:
        fastlm.cross_entropy(logits, targets)
    assert operator("forward") in mode.seen


def test_a_subclass_goes_to_the_operator(device):
    logits, targets = cross_entropy_inputs(6, 40, device=device)
    assert not plain(logits.as_subclass(Subclass))
    want = fastlm.cross_entropy(logits, targets)
    got = fastlm.cross_entropy(logits.as_subclass(Subclass), targets)
    assert isinstance(got, Subclass)
    assert torch.equal(got.as_subclass(Tensor), want)


def test_the_profiler_names_the_operator(device):
    logits, targets = cross_entropy_inputs(6, 40, device=device)
    with torch.profiler.profile() as profile:
        fastlm.cross_entropy(logits, targets)
    assert "fastlm::cross_entropy_forward" in {event.key for event in profile.key_averages()}


def test_a_trace_holds_the_operator(device):
    logits, targets = cross_entropy_inputs(6, 40, device=device)
    graph = make_fx(lambda x: fastlm.cross_entropy(x, targets))(logits)
    assert operator("forward") in {node.target for node in graph.graph.nodes}


def test_vmap_gives_what_a_loop_gives(device):
    logits, targets = cross_entropy_inputs(6, 40, device=device)
    many = torch.stack([logits, 2 * logits])

    def call(x: Tensor) -> Tensor:
        return fastlm.cross_entropy(x, targets, reduction="none", backend="torch")

    got = torch.vmap(call)(many)
    assert torch.equal(got, torch.stack([call(x) for x in many]))


@interpreted_only
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_view_that_negates_is_negated(backend):
    logits, targets = cross_entropy_inputs(6, 40)
    lazily = torch.complex(torch.zeros(6, 40), logits).conj().imag
    assert lazily.is_neg()
    assert not plain(lazily)
    want = fastlm.cross_entropy(-logits, targets, backend=backend)
    assert torch.equal(fastlm.cross_entropy(lazily, targets, backend=backend), want)


def test_tensors_without_data_go_to_the_operator():
    assert not plain(torch.zeros(3, device="meta"))
    logits, targets = (x.to("meta") for x in cross_entropy_inputs(6, 40))
    assert fastlm.cross_entropy(logits, targets).is_meta


def _losses(reduction: str, backend: str, device: str) -> tuple[Tensor, list[Tensor]]:
    x = torch.randn(6, 4, device=device).requires_grad_()
    weight = torch.randn(5, 4, device=device).requires_grad_()
    targets = torch.arange(6, device=device) % 5
    loss = fastlm.linear_cross_entropy(x, weight, targets, reduction=reduction, backend=backend)
    return loss, [x, weight]


def _attention(backend: str, device: str) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.requires_grad_() for x in attention_inputs(1, 4, 4, 2, 1, 8, device=device)]
    out = fastlm.causal_attention(*leaves, backend=backend)
    assert isinstance(out, Tensor)
    return out, leaves


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("op", ["mean", "none", "attention"])
@pytest.mark.parametrize("kept", [True, False], ids=["graph kept", "graph freed"])
def test_batched_gradients_are_those_of_a_loop(op, backend, kept, device):
    def build() -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(0)
        return _attention(backend, device) if op == "attention" else _losses(op, backend, device)

    out, leaves = build()
    upstream = torch.randn(3, *out.shape, device=device)
    got = torch.autograd.grad(out, leaves, upstream, is_grads_batched=True, retain_graph=kept)
    out, leaves = build()
    one_by_one = [torch.autograd.grad(out, leaves, x, retain_graph=True) for x in upstream]
    for batched, single in zip(got, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(batched, torch.stack(single))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("op", [name for name in OPS if name not in WITHOUT_GRADIENT])
def test_checkpoints_give_the_same_gradients(op, reentrant, device):
    inputs, constants = example(op, device)

    def call(*args: Tensor) -> Tensor:
        out = OPS[op](*args, **constants, backend="torch")
        return sum(x.square().sum() for x in (out if isinstance(out, tuple) else (out,)))

    def lse_alone(*args: Tensor) -> Tensor:
        return OPS[op](*args, return_stats=True, backend="torch")[1].lse.sum()

    for function in (call, lse_alone) if "entropy" in op else (call,):
        results = []
        for way in (function, functools.partial(checkpoint, function, use_reentrant=reentrant)):
            leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
            way(*leaves).backward()
            results.append([x.grad for x in leaves if x.grad is not None])
        assert results[0]
        for plain, checkpointed in zip(*results, strict=True):
            assert torch.equal(plain, checkpointed)


def _total(op: str, **options: object) -> Callable[..., Tensor]:
    """Summed, so that the incoming gradients need none and lead to no input."""

    def total(*args: Tensor, **more: Tensor) -> Tensor:
        out = OPS[op](*args, **options, **more)
        return sum(x.sum() for x in (out if isinstance(out, tuple) else (out,)))

    return total


TWICE = {op: _total(op) for op in OPS if op not in WITHOUT_GRADIENT} | {
    "linear_cross_entropy of positions": _total("linear_cross_entropy", reduction="none"),
    "linear_cross_entropy beside statistics": lambda *args: fastlm.linear_cross_entropy(
        *args, return_stats=True
    )[0],
    "linear_cross_entropy of statistics": lambda *args: fastlm.linear_cross_entropy(
        *args, return_stats=True
    )[1].entropy.sum(),
    "rms_norm of a sum": lambda x, weight: _total("rms_norm")(x.detach(), weight, residual=x),
}


@pytest.mark.parametrize("name", TWICE)
def test_every_way_to_differentiate_twice_raises(name, device):
    op = name.split()[0]
    inputs, constants = example(op, device)
    scalable = sum(x.is_floating_point() for x in inputs)

    def scaled(scale: Tensor) -> Tensor:
        """As a function of one number, so that no input is a leaf."""
        args = *(scale * x for x in inputs[:scalable]), *inputs[scalable:]
        return functools.partial(TWICE[name], **constants)(*args)

    scale = torch.ones((), device=device)
    # the second is torch's, for what it is left alone with
    message = "gradient of a gradient is not|derivative for .* is not implemented"
    raises = functools.partial(pytest.raises, RuntimeError, match=message)
    for first in (scaled, lambda x: checkpoint(scaled, x, use_reentrant=False)):
        leaf = scale.clone().requires_grad_()
        hidden = leaf * 1
        loss = first(hidden)
        (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
        (plain,) = torch.autograd.grad(scaled(leaf), leaf)
        assert torch.equal(gradient, plain)
        for x in (hidden, leaf):
            with raises():
                torch.autograd.grad(loss + gradient.square(), x, retain_graph=True)
        with raises():
            (loss.detach() + gradient.square()).backward()
    for second in (functional.hessian, functional.hvp, functional.vhp, functional.jvp):
        with raises():
            second(scaled, scale, *() if second is functional.hessian else (scale,))


@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_ignore_index_is_an_integer(op, device):
    logits, targets = cross_entropy_inputs(6, 40, device=device)
    arguments = (logits,) if op == "cross_entropy" else (logits, torch.eye(40, device=device))
    call = getattr(fastlm, op)
    assert torch.equal(
        call(*arguments, targets, ignore_index=np.int64(-100)), call(*arguments, targets)
    )
    for wrong in (2.5, "0", None):
        with pytest.raises(TypeError, match=rf"{op}: ignore_index must be an integer, got"):
            call(*arguments, targets, ignore_index=wrong)
