"""RMSNorm against its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.layouts import layouts
from support.pointwise import KERNELS, assert_agrees, assert_same_for_every_subset, judged

import fastlm
from fastlm import nn

BACKENDS = ["triton", "cuda", "torch", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# one row; odd sizes; many rows, so that sums over them are long
SHAPES = [(1, 300), (60, 7), (2, 5, 4, 33), (5000, 6), (2, 4097)]


def inputs(shape, dtype=torch.float32, device="cpu"):
    x, residual = torch.randn(2, *shape, dtype=torch.float64).to(device, dtype)
    # no mean of zero, so that an error of the scale cannot cancel
    weight = 1 + 0.3 * torch.randn(shape[-1], dtype=torch.float64).to(device, dtype)
    return x + 0.5, weight.to(dtype), residual


def definition(x, weight, eps, offset=0.0):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (weight + offset)


def rounded(x, dtype):
    """Rounding with the gradient of none."""
    return x + (x.to(dtype).to(x.dtype) - x).detach()


@pytest.mark.parametrize(("shape", "dtype", "backend"), judged(SHAPES, DTYPES, BACKENDS))
def test_agrees_with_the_definition(shape, dtype, backend, device):
    x, weight, _ = inputs(shape, dtype, device)
    assert_agrees(
        "rms_norm",
        lambda a, b: fastlm.rms_norm(a, b, 1e-5, weight_offset=0.5, backend=backend),
        lambda a, b: definition(a, b, 1e-5, 0.5),
        (x, weight),
    )


@pytest.mark.parametrize(("shape", "dtype", "backend"), judged(SHAPES, DTYPES, BACKENDS))
def test_adds_the_residual_and_returns_the_sum(shape, dtype, backend, device):
    def plain(a, w, r):
        total = rounded(a + r, dtype)
        return definition(total, w, 1e-6), total

    x, weight, residual = inputs(shape, dtype, device)
    assert_agrees(
        "rms_norm with residual",
        lambda a, w, r: fastlm.rms_norm(a, w, residual=r, backend=backend),
        plain,
        (x, weight, residual),
    )
    total = fastlm.rms_norm(x, weight, residual=residual, backend=backend)[1]
    assert torch.equal(total, x + residual)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_norm_is_that_of_the_sum_it_returns(backend, device):
    x, weight, residual = inputs((9, 33), torch.bfloat16, device)
    out, total = fastlm.rms_norm(x, weight, residual=residual, backend=backend)
    assert torch.equal(out, fastlm.rms_norm(total, weight, backend=backend))


def test_agrees_with_torch(device):
    x, weight, _ = inputs((64, 256), device=device)
    torch.testing.assert_close(fastlm.rms_norm(x, weight), F.rms_norm(x, (256,), weight, 1e-6))
    torch.testing.assert_close(fastlm.rms_norm(x), F.rms_norm(x, (256,), None, 1e-6))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("has_residual", [True, False])
def test_gradients_are_those_of_the_function(has_weight, has_residual, backend, device):
    x, weight, residual = (t.requires_grad_() for t in inputs((3, 2, 5), torch.float64, device))

    def function(a, w, r):
        return fastlm.rms_norm(
            a,
            w if has_weight else None,
            1e-3,
            weight_offset=0.5 if has_weight else 0.0,
            residual=r if has_residual else None,
            backend=backend,
        )

    assert torch.autograd.gradcheck(function, (x, weight, residual), fast_mode=backend in KERNELS)


def test_every_subset_of_gradients(device):
    x, weight, residual = inputs((6, 8), device=device)
    assert_same_for_every_subset(lambda a, w: fastlm.rms_norm(a, w), (x, weight))
    assert_same_for_every_subset(
        lambda a, w, r: fastlm.rms_norm(a, w, residual=r), (x, weight, residual)
    )


def test_gradient_of_the_sum_alone(device):
    x, weight, residual = (t.requires_grad_() for t in inputs((6, 8), device=device))
    _, total = fastlm.rms_norm(x, weight, residual=residual)
    upstream = torch.randn_like(total)
    grads = torch.autograd.grad(total, (x, weight, residual), upstream)
    assert torch.equal(grads[0], upstream) and torch.equal(grads[2], upstream)
    assert not grads[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout_gives_the_same(backend, device):
    x, weight, residual = inputs((3, 4, 6), device=device)
    want = fastlm.rms_norm(x, weight, residual=residual, backend=backend)
    grad = torch.randn(3, 4, 6, device=device)

    def gradient(view, upstream):
        leaf = view.detach().requires_grad_()
        return torch.autograd.grad(fastlm.rms_norm(leaf, weight, backend=backend), leaf, upstream)

    for name, view in layouts(x):
        got = fastlm.rms_norm(view, weight, residual=residual, backend=backend)
        torch.testing.assert_close(got, want, msg=name)
        assert all(out.is_contiguous() for out in got), name
        torch.testing.assert_close(gradient(view, grad), gradient(x, grad), msg=name)
    for name, view in layouts(grad):
        torch.testing.assert_close(gradient(x, view), gradient(x, grad), msg=name)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4), (1, 1)])
def test_empty_and_single(shape, device):
    x, weight, residual = inputs(shape, device=device)
    leaf = x.requires_grad_()
    out, total = fastlm.rms_norm(leaf, weight, residual=residual)
    (out.sum() + total.sum()).backward()
    assert out.shape == total.shape == leaf.grad.shape == shape


def test_residual_may_be_wider_than_the_input(device):
    x, weight, residual = inputs((4, 8), device=device)
    leaf = x.bfloat16().requires_grad_()
    out, total = fastlm.rms_norm(leaf, weight, residual=residual)
    assert out.dtype == total.dtype == torch.float32
    assert torch.equal(total, x.bfloat16() + residual)
    out.sum().backward()
    assert leaf.grad.dtype == torch.bfloat16


def test_inputs_stay_as_they_are(device):
    tensors = inputs((8, 16), device=device)
    before = [t.clone() for t in tensors]
    x, weight, residual = (t.requires_grad_() for t in tensors)
    out, total = fastlm.rms_norm(x, weight, residual=residual)
    (out * total).sum().backward()
    assert all(map(torch.equal, tensors, before))


def test_a_bad_row_spoils_no_other(device):
    x, weight, _ = inputs((4, 8), device=device)
    want = fastlm.rms_norm(x, weight)
    x[1, 3] = torch.nan
    x[2, 0] = torch.inf
    got = fastlm.rms_norm(x, weight)
    assert got[1].isnan().all() and got[2, 0].isnan() and not got[2, 1:].any()
    assert torch.equal(got[[0, 3]], want[[0, 3]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_is_well_formed(backend, device):
    x, weight, residual = inputs((3, 4, 6), device=device)
    op = torch.ops.fastlm
    for r in (None, residual):
        torch.library.opcheck(op.rms_norm_forward.default, (x, weight, r, 1e-6, 0.0, backend))
    out, total, rstd = op.rms_norm_forward.default(x, weight, residual, 1e-6, 0.0, backend)
    for needs in ((True, True), (True, False), (False, True)):
        arguments = (out, total, total, weight, rstd, 0.0, *needs, backend)
        torch.library.opcheck(op.rms_norm_backward.default, arguments)


def test_compiles_whole_for_any_size(device):
    def function(x, weight, residual):
        # twice, with the defaults and without
        out, total = fastlm.rms_norm(x, weight, residual=residual)
        return fastlm.rms_norm(out, weight, 1e-5) + fastlm.rms_norm(total)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((3, 8), (5, 2, 16)):
        leaves = [t.requires_grad_() for t in inputs(shape, device=device)]
        want = torch.autograd.grad(function(*leaves).square().sum(), leaves)
        got = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
        torch.testing.assert_close(got, want)


def test_checked_passes_and_explain_answers(device):
    x, weight, residual = (t.requires_grad_() for t in inputs((300, 24), device=device))
    with fastlm.checked():
        out, total = fastlm.rms_norm(x, weight, residual=residual)
        (out + total).sum().backward()
        fastlm.rms_norm(x.bfloat16(), weight).sum().backward()
    steps = fastlm.explain("rms_norm", x, weight).steps
    assert {step: choice.backend for step, choice in steps.items()} == {
        "forward": "torch",
        "backward": "torch",
    }


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0],), {}, TypeError, "input must be a tensor, got list"),
        ((torch.ones(2, 3).long(),), {}, TypeError, "input must be one of .*, got int64"),
        ((torch.ones(()),), {}, ValueError, r"input must end in C > 0, got \(\)"),
        ((torch.ones(2, 0),), {}, ValueError, r"input must end in C > 0, got \(2, 0\)"),
        ((torch.ones(2, 3), torch.ones(4)), {}, ValueError, r"weight must have shape \(3,\)"),
        ((torch.ones(2, 3), None, -1.0), {}, ValueError, "eps must be at least 0, got -1.0"),
        ((torch.ones(2, 3), None, float("nan")), {}, ValueError, "eps must be at least 0, got nan"),
        ((torch.ones(2, 3),), {"weight_offset": 1.0}, ValueError, "weight_offset must be 0"),
        ((torch.ones(2, 3),), {"residual": torch.ones(3)}, ValueError, "residual must have shape"),
        ((torch.ones(2, 3), torch.ones(3, device="meta")), {}, ValueError, "on the device of"),
        ((torch.ones(2, 3),), {"backend": "fast"}, ValueError, "backend must be one of"),
        ((torch.ones(2, 3),), {"backend": "gluon"}, NotImplementedError, "no gluon backend"),
    ],
)
def test_wrong_arguments_are_named(arguments, options, error, message):
    with pytest.raises(
        error, match=f"rms_norm.*{message}" if error is not NotImplementedError else message
    ):
        fastlm.rms_norm(*arguments, **options)


def test_double_backward_raises(device):
    x, weight, _ = (t.requires_grad_() for t in inputs((3, 4), device=device))
    loss = fastlm.rms_norm(x, weight).square().sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    for leaf in (x, weight):
        with pytest.raises(RuntimeError, match="gradient of a gradient is not implemented"):
            torch.autograd.grad(grad.sum(), leaf)
    with pytest.raises(RuntimeError, match="gradient of a gradient is not implemented"):
        grad.sum().backward()


def test_module_is_the_function_with_a_weight(device):
    x, _, residual = inputs((3, 8), device=device)
    norm = nn.RMSNorm(8, eps=1e-5, weight_offset=1.0).to(device)
    assert not norm.weight.any()
    torch.testing.assert_close(norm(x), F.rms_norm(x, (8,), None, 1e-5))
    out, total = norm(x, residual)
    assert torch.equal(total, x + residual) and torch.equal(out, norm(total))
