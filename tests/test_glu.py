"""Gated linear units against the product in torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.layouts import layouts
from support.pointwise import KERNELS, assert_agrees, assert_same_for_every_subset

import fastlm

BACKENDS = ["triton", "cuda", "torch", "reference"]
# float64 is left to gradcheck: there the definition is as wrong as what it would judge
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEFINITIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
}


def inputs(shape, dtype=torch.float32, device="cpu"):
    # both ends of every activation
    gate, up = 3 * torch.randn(2, *shape, dtype=torch.float64).to(device, dtype)
    return gate, up


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", DEFINITIONS)
def test_agrees_with_the_product(activation, dtype, backend, device):
    for shape in ((60,), (2, 5, 129), (25, 1000)):
        assert_agrees(
            f"glu {activation} {shape}",
            lambda g, u: fastlm.glu(g, u, activation, backend),
            lambda g, u: DEFINITIONS[activation](g) * u,
            inputs(shape, dtype, device),
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", DEFINITIONS)
def test_gradients_are_those_of_the_function(activation, backend, device):
    gate, up = (x.requires_grad_() for x in inputs((4, 5), torch.float64, device))
    assert torch.autograd.gradcheck(
        lambda g, u: fastlm.glu(g, u, activation, backend),
        (gate, up),
        fast_mode=backend in KERNELS,
    )


def test_every_subset_of_gradients(device):
    assert_same_for_every_subset(fastlm.swiglu, inputs((3, 8), device=device))


def test_swiglu_is_silu(device):
    gate, up = inputs((3, 8), device=device)
    assert torch.equal(fastlm.swiglu(gate, up), fastlm.glu(gate, up, "silu"))
    assert torch.equal(fastlm.swiglu(gate, up), fastlm.glu(gate, up))


@pytest.mark.parametrize("activation", DEFINITIONS)
def test_extreme_gates_stay_finite(activation, device):
    gate = torch.tensor([-1e4, -100.0, -0.0, 0.0, 100.0, 1e4], device=device).requires_grad_()
    up = torch.ones_like(gate).requires_grad_()
    out = fastlm.glu(gate, up, activation)
    out.sum().backward()
    torch.testing.assert_close(out, DEFINITIONS[activation](gate))
    assert gate.grad.isfinite().all() and up.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", DEFINITIONS)
def test_any_layout_gives_the_same(activation, backend, device):
    gate, up = inputs((3, 4, 6), device=device)
    want = fastlm.glu(gate, up, activation, backend)
    for name, view in layouts(gate):
        got = fastlm.glu(view, up, activation, backend)
        torch.testing.assert_close(got, want, msg=name)
        assert got.is_contiguous(), name
        leaf = view.detach().requires_grad_()
        (grad,) = torch.autograd.grad(fastlm.glu(leaf, up, activation, backend).sum(), leaf)
        assert grad.isfinite().all(), name


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 4)])
def test_empty_and_scalar(shape, device):
    gate, up = (x.requires_grad_() for x in inputs(shape, device=device))
    out = fastlm.swiglu(gate, up)
    out.sum().backward()
    assert out.shape == gate.grad.shape == up.grad.shape == shape


def test_inputs_stay_as_they_are(device):
    tensors = inputs((8, 16), device=device)
    before = [x.clone() for x in tensors]
    for activation in DEFINITIONS:
        gate, up = (x.detach().requires_grad_() for x in tensors)
        fastlm.glu(gate, up, activation).square().sum().backward()
    assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", DEFINITIONS)
def test_operator_is_well_formed(activation, backend, device):
    gate, up = inputs((3, 4), device=device)
    op = torch.ops.fastlm
    torch.library.opcheck(op.glu_forward.default, (gate, up, activation, backend))
    torch.library.opcheck(op.glu_backward.default, (gate, gate, up, activation, backend))


def test_compiles_whole_for_any_size(device):
    def function(gate, up):
        return fastlm.glu(fastlm.swiglu(gate, up), up, "relu2").square().sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((3, 8), (5, 2, 6)):
        leaves = [x.requires_grad_() for x in inputs(shape, device=device)]
        want = torch.autograd.grad(function(*leaves), leaves)
        got = torch.autograd.grad(compiled(*leaves), leaves)
        torch.testing.assert_close(got, want)


def test_checked_passes(device):
    for activation in DEFINITIONS:
        gate, up = (x.requires_grad_() for x in inputs((40, 33), device=device))
        with fastlm.checked():
            fastlm.glu(gate, up, activation).sum().backward()
            fastlm.glu(gate.bfloat16(), up.bfloat16(), activation).sum().backward()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2), [1.0]), TypeError, "up must be a tensor, got list"),
        ((torch.ones(2), torch.ones(3)), ValueError, r"up must have shape \(2,\)"),
        ((torch.ones(2), torch.ones(2).double()), TypeError, "up must have the dtype of gate"),
        ((torch.ones(2).int(), torch.ones(2).int()), TypeError, "gate must be one of"),
        ((torch.ones(2), torch.ones(2), "tanh"), ValueError, "activation must be one of .*'tanh'"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=f"glu: {message}"):
        fastlm.glu(*arguments)
