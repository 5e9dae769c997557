"""What autograd, autocast and compilers see of linear_cross_entropy."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from support.layouts import layouts
from support.linear_cross_entropy import (
    NO_OPTIONS,
    assert_same_bits,
    definition,
    forced,
    inputs,
    ours,
)
from support.losses import flattened, weights

import fastlm
from fastlm import testing
from fastlm.ops.linear_cross_entropy import BACKENDS as BACKENDS_OF

BACKENDS = ["triton", "torch", "reference"]
FAST = ["triton", "torch"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_are_those_of_the_function(reduction, backend, device):
    x, weight, bias, targets = inputs(3, 2, 4, torch.float64, device)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with forced(rows=2, block_v=2):
        assert torch.autograd.gradcheck(
            lambda a, b, c: ours(a, b, c, targets, reduction=reduction, backend=backend), leaves
        )


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_computes_only_the_gradients_asked_for(reduction, backend, device):
    *tensors, targets = inputs(5, 6, 20, device=device)
    everything = testing.run(ours, *tensors, targets, reduction=reduction, backend=backend)
    plain, truth = (
        testing.run(definition, *tensors, targets, dtype=dtype, reduction=reduction)[0]
        for dtype in (torch.float32, torch.float64)
    )
    for needs in itertools.product([False, True], repeat=3):
        leaves = [t.detach().requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]
        loss = ours(*leaves, targets, reduction=reduction, backend=backend)
        assert loss.requires_grad == any(needs)
        testing.assert_as_accurate("loss", loss, plain=plain, truth=truth)
        if not any(needs):
            continue
        generator = torch.Generator().manual_seed(0)
        loss.backward(torch.randn(loss.shape, generator=generator).to(loss))
        got = [leaf.grad for leaf in leaves]
        want = [g if n else None for g, n in zip(everything[1:], needs, strict=True)]
        assert_same_bits(got, want)


@pytest.mark.parametrize("backend", FAST)
def test_needs_no_gradient_under_no_grad(backend, device):
    *tensors, targets = inputs(12, 6, 20, device=device)
    leaves = [t.requires_grad_() for t in tensors]
    with torch.no_grad():
        assert not ours(*leaves, targets, backend=backend).requires_grad
    with torch.inference_mode():
        assert not ours(*leaves, targets, backend=backend).requires_grad


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_kept_graph_can_be_used_again(reduction, backend, device):
    *tensors, targets = inputs(5, 6, 20, torch.bfloat16, device)
    leaves = [t.requires_grad_() for t in tensors]
    loss = ours(*leaves, targets, reduction=reduction, backend=backend)
    one = torch.ones_like(loss)
    first = torch.autograd.grad(loss, leaves, one, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, leaves, 2 * one, retain_graph=True)
    third = torch.autograd.grad(loss, leaves, one)
    assert_same_bits(first, kept)
    assert_same_bits(second, [2 * g for g in kept])
    assert_same_bits(third, kept)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves, one)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_differentiating_twice_raises(reduction, backend, device):
    *tensors, targets = inputs(4, 6, 20, device=device)
    leaves = [t.requires_grad_() for t in tensors]
    loss = ours(*leaves, targets, reduction=reduction, backend=backend).sum()
    gradient = torch.autograd.grad(loss, leaves, create_graph=True)[0]
    for leaf in leaves:
        with pytest.raises(RuntimeError, match="gradient of a gradient"):
            torch.autograd.grad(gradient.sum(), leaf)
    with pytest.raises(RuntimeError, match="gradient of a gradient"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", FAST)
def test_an_embedding_may_be_the_weight(backend, device):
    _, weight, _, targets = inputs(12, 6, 20, torch.float64, device, ignored=0)

    def tied(table, loss):
        return loss(F.embedding(targets.roll(1), table), table, None, targets)

    got = testing.run(tied, weight, lambda *a: ours(*a, backend=backend))
    want = testing.run(tied, weight, definition)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", FAST)
def test_incoming_gradients_may_have_any_strides(backend, device):
    x, weight, bias, targets = inputs(6, 6, 40, device=device)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def gradients(upstream):
        losses = ours(*leaves, targets, reduction="none", backend=backend)
        return list(torch.autograd.grad(losses, leaves, upstream))

    upstream = torch.randn(6, device=device)
    for _, view in layouts(upstream):
        assert_same_bits(gradients(view), gradients(upstream))
    expanded = torch.ones((), device=device).expand(6)
    assert_same_bits(gradients(expanded), gradients(expanded.contiguous()))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.bfloat16, torch.float32, None)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_gives_gradients_in_the_dtypes_of_the_parameters(
    reduction, dtypes, backend, device
):
    *tensors, targets = inputs(12, 16, 140, torch.bfloat16, device)
    tensors = [None if d is None else t.to(d) for t, d in zip(tensors, dtypes, strict=True)]

    def under_autocast(*arguments):
        with torch.autocast(device, torch.bfloat16):
            return ours(*arguments, targets, reduction=reduction, backend=backend)

    got = testing.run(under_autocast, *tensors)
    truth = testing.run(definition, *tensors, targets, dtype=torch.float64, reduction=reduction)
    plain = testing.run(definition, *tensors, targets, dtype=torch.float32, reduction=reduction)
    assert got[0].dtype == torch.float32
    for tensor, gradient in zip([t for t in tensors if t is not None], got[1:], strict=True):
        assert gradient.dtype == tensor.dtype
    # the products round to bfloat16 on a GPU, whatever the parameters are
    plain = [plain[0], *(g.bfloat16() for g in plain[1:])]
    testing.assert_all_as_accurate("autocast", got, plain=plain, truth=truth)


def test_autocast_rounds_what_linear_would_round(device):
    x, weight, bias, targets = inputs(12, 16, 40, device=device)
    with torch.autocast(device, torch.bfloat16):
        got = ours(x, weight, bias, targets)
    assert torch.equal(got, ours(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), targets))
    assert not torch.equal(got, ours(x, weight, bias, targets))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_is_equal_to_eager(reduction, backend, device):
    def step(x, weight, bias, targets):
        return ours(x, weight, bias, targets, shift=1, reduction=reduction, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (12, 6):
        x, weight, bias, targets = inputs(rows, 6, 20, device=device)
        arguments = (x.view(2, -1, 6), weight, bias, targets.view(2, -1))
        assert_same_bits(testing.run(compiled, *arguments), testing.run(step, *arguments))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("step", ["forward", "gradients", "backward"])
def test_operators_are_what_torch_expects(step, backend, device):
    x, weight, bias, targets = inputs(4, 6, 20, device=device)
    operator = getattr(torch.ops.fastlm, f"linear_cross_entropy_{step}").default
    arguments = (x, weight, bias, targets)
    ones, some = torch.ones(4, device=device), torch.rand(20, device=device)
    for class_weight, options, need_stats in (
        (None, NO_OPTIONS, False),
        (some, (-100, 0.1, 3.0, 0.5), True),
    ):
        if step == "forward":
            rest = (class_weight, *options, need_stats)
        elif step == "gradients":
            z_weight = ones[0] if need_stats else None
            rest = (class_weight, z_weight, *options, need_stats, True, False, True)
        else:
            rest = (class_weight, ones, ones, *options, True, True, True)
        upstream = (ones, *([ones] * 3 if need_stats else [None] * 3)) if step == "backward" else ()
        torch.library.opcheck(operator, (*upstream, *arguments, *rest, "", 20, backend))


def test_explains_each_step(device):
    x, weight, _, targets = inputs(12, 16, 140, device=device)
    x.requires_grad_()
    explained = fastlm.explain("linear_cross_entropy", x, weight, targets)
    assert list(explained.steps) == ["gradients"]
    explained = fastlm.explain("linear_cross_entropy", x, weight, targets, reduction="none")
    assert list(explained.steps) == ["forward", "backward"]
    assert explained.steps["backward"].backend == ("triton" if device == "cuda" else "torch")


@pytest.mark.parametrize(
    ("backend", "num_items"), [("triton", None), ("torch", None), ("torch", 3)]
)
def test_compiled_statistics_are_those_of_eager(num_items, backend, device):
    x, matrix, bias, targets = inputs(6, 5, 20, torch.float64, device)
    # with weights, what divides the squares is not what divides the losses
    options = {"weight": weights(20, device), "z_loss": 0.02, "num_items": num_items}
    options |= {"return_stats": True, "backend": backend}

    def step(x, matrix, bias, y):
        return flattened(fastlm.linear_cross_entropy(x, matrix, y, linear_bias=bias, **options))

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for y in (targets, torch.full_like(targets, -100)):
        want = testing.run(step, x, matrix, bias, y)
        torch.testing.assert_close(testing.run(compiled, x, matrix, bias, y), want, equal_nan=True)


@pytest.mark.parametrize("detached", [False, True])
def test_compiled_statistics_prepare_no_gradients_in_vain(detached, monkeypatch):
    module = importlib.import_module(BACKENDS_OF["torch"])
    steps = []

    def note(name):
        implementation = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a: (steps.append(name), implementation(*a))[1])

    def step(x, weight, bias, targets):
        loss, *stats = flattened(ours(x, weight, bias, targets, return_stats=True))
        return loss, *(s.detach() if detached else s for s in stats)

    for name in ("forward", "gradients", "backward"):
        note(name)
    torch.compiler.reset()
    *tensors, targets = inputs(6, 5, 20)
    leaves = [t.requires_grad_() for t in tensors]
    for function, expected in (
        (step, ["gradients"]),
        (torch.compile(step, fullgraph=True, backend="aot_eager"), ["forward", "backward"]),
    ):
        steps.clear()
        torch.autograd.grad(function(*leaves, targets)[0], leaves)
        assert steps == expected
