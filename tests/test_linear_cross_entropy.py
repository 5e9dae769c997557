"""linear_cross_entropy against torch's linear and cross_entropy, on every backend."""

from __future__ import annotations

import importlib

import pytest
import torch
from support.layouts import layouts
from support.linear_cross_entropy import (
    NO_OPTIONS,
    NothingLarge,
    assert_same_bits,
    definition,
    forced,
    inputs,
    judge,
    ours,
)

import fastlm
from fastlm import testing
from fastlm.kernels import _chunks

BACKENDS = ["triton", "cuda", "torch", "reference"]
op = importlib.import_module("fastlm.ops.linear_cross_entropy")
FAST = ["triton", "cuda", "torch"]
KERNELS = ["triton", "cuda"]
NARROW = [torch.bfloat16, torch.float16]
# one of everything; odd sizes; more rows than columns; a vocabulary of several blocks
SHAPES = [(1, 1, 1), (5, 3, 33), (16, 17, 3), (3, 24, 2_100)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_torch(shape, dtype, has_bias, reduction, backend, device):
    x, weight, bias, targets = inputs(*shape, dtype, device)
    judge(x, weight, bias if has_bias else None, targets, backend=backend, reduction=reduction)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8, 13])
def test_chunks_of_any_size_agree_with_torch(rows, dtype, backend, device):
    arguments = inputs(8, 12, 140, dtype, device)
    with forced(rows=rows, block_v=64):
        for reduction in ("mean", "none"):
            judge(*arguments, backend=backend, reduction=reduction)


@pytest.mark.parametrize("backend", FAST)
def test_leading_dimensions_are_positions(backend, device):
    x, weight, bias, targets = inputs(12, 8, 30, device=device)
    flat = testing.run(ours, x, weight, bias, targets, backend=backend, reduction="none")
    x, targets = x.view(2, 3, 2, 8), targets.view(2, 3, 2)
    shaped = testing.run(ours, x, weight, bias, targets, backend=backend, reduction="none")
    assert shaped[0].shape == (2, 3, 2)
    assert shaped[1].shape == x.shape
    judge(x, weight, bias, targets, backend=backend, reduction="mean")
    assert torch.equal(shaped[0].flatten(), flat[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_position_without_leading_dimensions(backend, device):
    x, weight, bias, targets = inputs(1, 8, 30, device=device)
    got = testing.run(ours, x[0], weight, bias, targets[0], backend=backend)
    want = testing.run(ours, x, weight, bias, targets, backend=backend)
    assert_same_bits([got[0], got[1], *got[2:]], [want[0], want[1][0], *want[2:]])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_gradient_does_not_lose_by_more_chunks(dtype, backend, device):
    x, weight, _, targets = inputs(24, 8, 130, dtype, device, ignored=0)
    truth = testing.run(definition, x, weight, None, targets, dtype=torch.float64)[2]

    def error(rows):
        with forced(rows=rows):
            got = testing.run(ours, x, weight, None, targets, backend=backend)[2]
        return (got.double() - truth).square().mean().sqrt()

    assert error(1) <= 1.5 * error(24)


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize("rows", [3, 10])
def test_products_of_integers_are_exact(rows, dtype, device):
    generator = torch.Generator().manual_seed(0)

    def integers(*shape):
        return torch.randint(-8, 9, shape, generator=generator).to(device, dtype)

    x, weight, dlogits, residuals = (
        integers(10, 6), integers(40, 6), integers(10, 40), integers(10, 2).float(),
    )  # fmt: skip
    columns = torch.randint(40, (10, 2), generator=generator).to(device)
    operand = _chunks.Operand(dtype, 4.0)
    got = _chunks.LinearGradients(x, weight, operand, True, True)
    for start in range(0, 10, rows):
        part = slice(start, min(start + rows, 10))
        lost = (columns[part], residuals[part])
        got.add(part, dlogits[part], None if dtype == torch.float32 else lost)
    exact = dlogits.double()
    if dtype != torch.float32:
        exact.scatter_add_(1, columns, residuals.double())
    assert torch.equal(got.dinput.double() * 4, exact @ weight.double())
    assert torch.equal(got.dweight.double() * 4, exact.t() @ x.double())
    assert got.dweight.norm() > 0


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("scale", [2.0**-20, 65_536.0])
def test_float16_gradients_keep_their_precision_at_any_scale_of_the_loss(scale, backend, device):
    x, weight, bias, targets = inputs(6, 8, 1_000, torch.float16, device, ignored=0)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    losses = ours(*leaves, targets, reduction="none", backend=backend)
    got = torch.autograd.grad(losses, leaves, torch.full_like(losses, scale))
    exact = testing.run(definition, x, weight, bias, targets, dtype=torch.float64, reduction="sum")
    upstream = torch.randn((), generator=torch.Generator().manual_seed(0))
    for actual, want in zip(got, exact[1:], strict=True):
        want = want / upstream.double() * scale
        usual = want.float().to(torch.float16)
        testing.assert_as_accurate("float16", actual, plain=usual, truth=want)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_leaves_its_inputs_as_they_were(dtype, backend, device):
    arguments = inputs(12, 6, 20, dtype, device)
    before = [t.clone() for t in arguments]
    for reduction in ("mean", "none"):
        testing.run(ours, *arguments, reduction=reduction, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored_is_as_in_torch(reduction, backend, device):
    x, weight, bias, targets = inputs(5, 6, 20, device=device)
    targets.fill_(-100)
    got = testing.run(ours, x, weight, bias, targets, reduction=reduction, backend=backend)
    want = testing.run(definition, x, weight, bias, targets, reduction=reduction)
    assert_same_bits(got, want)
    assert all(g.count_nonzero() == 0 for g in got[1:])


@pytest.mark.parametrize("backend", FAST)
def test_all_ignored_is_zero_with_num_items(backend, device):
    x, weight, bias, targets = inputs(5, 6, 20, device=device)
    targets.fill_(-100)
    for num_items in (7, torch.tensor(7, device=device)):
        got = testing.run(ours, x, weight, bias, targets, num_items=num_items, backend=backend)
        assert all(g.count_nonzero() == 0 for g in got)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("vocab_size", [1, 2])
def test_smallest_sizes(rows, vocab_size, backend, device):
    arguments = inputs(rows, 3, vocab_size, device=device)
    for reduction in ("sum", "mean", "none"):
        got = testing.run(ours, *arguments, reduction=reduction, backend=backend)
        want = testing.run(definition, *arguments, reduction=reduction)
        torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("backend", FAST)
def test_micro_batches_add_up_to_the_batch(backend, device):
    x, weight, bias, targets = inputs(10, 6, 20, torch.float64, device)
    total = (targets != -100).sum()
    whole = testing.run(ours, x, weight, bias, targets, backend=backend)
    for num_items in (total, int(total)):
        parts = [
            testing.run(ours, a, weight, bias, b, num_items=num_items, backend=backend)
            for a, b in zip(x.split([3, 6, 1]), targets.split([3, 6, 1]), strict=True)
        ]
        torch.testing.assert_close(sum(p[0] for p in parts), whole[0])
        torch.testing.assert_close(torch.cat([p[1] for p in parts]), whole[1])
        torch.testing.assert_close(sum(p[2] for p in parts), whole[2])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shift", [1, 2, 5])
def test_shift_predicts_later_tokens(shift, reduction, backend, device):
    x, weight, bias, targets = inputs(10, 6, 20, torch.float64, device)
    x, targets = x.view(2, 5, 6), targets.view(2, 5)
    options = {"reduction": reduction, "backend": backend}
    got = testing.run(ours, x, weight, bias, targets, shift=shift, **options)

    def sliced(a, w, b):
        return ours(a[:, :-shift], w, b, targets[:, shift:], **options)

    want = testing.run(sliced, x, weight, bias)
    assert got[0].shape == want[0].shape
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("step", ["forward", "gradients", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_never_holds_the_logits(dtype, step, backend, device):
    x, weight, bias, targets = inputs(8, 2, 512, dtype, device)
    arguments, needs = (x, weight, bias, targets), (True, True, True)
    losses, whole = torch.ones(8, device=device), ("", 512)

    def run_step(backend):
        # the functions themselves: a mode does not see into an operator
        module = importlib.import_module(op.BACKENDS[backend])
        if step == "forward":
            module.forward(*arguments, None, *NO_OPTIONS, False, *whole)
        elif step == "gradients":
            module.gradients(*arguments, None, None, *NO_OPTIONS, False, *needs, *whole)
        else:
            module.backward(
                losses, None, None, None, *arguments, None, losses, losses, *NO_OPTIONS, *needs,
                *whole,
            )  # fmt: skip

    with forced(rows=2), NothingLarge(2 * 2 * 512 + 1):
        run_step(backend)
    with pytest.raises(AssertionError, match="gives"), NothingLarge(8 * 512):
        run_step("reference")


def test_chunks_are_even_and_small():
    for rows, vocab_size in [(0, 7), (1, 1), (1_024, 50_304), (8_192, 128_256), (5_000, 65)]:
        for device_type in ("cpu", "cuda"):
            step = _chunks.rows_per_chunk(rows, vocab_size, device_type)
            assert step >= 1
            chunks = -(-rows // step)
            assert rows == 0 or step - rows / chunks < 1
            least = 256 if device_type == "cpu" else 1_024
            most = 1 << (22 if device_type == "cpu" else 28)
            assert step <= least or step * vocab_size <= most


@pytest.mark.parametrize("backend", FAST)
def test_any_layout_agrees_with_torch(backend, device):
    # by the tolerance rule: BLAS sums a transposed matrix in another order
    x, weight, bias, targets = inputs(4, 3, 40, device=device)
    x, targets = x.view(2, 2, 3), targets.view(2, 2)
    for _, view in layouts(x):
        judge(view, weight, bias, targets, backend=backend)
    for _, view in layouts(weight):
        judge(x, view, bias, targets, backend=backend)
    expected = testing.run(ours, x, weight, bias, targets, backend=backend)
    for _, view in layouts(bias):
        assert_same_bits(testing.run(ours, x, weight, view, targets, backend=backend), expected)
    for _, view in layouts(targets):
        assert_same_bits(testing.run(ours, x, weight, bias, view, backend=backend), expected)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_targets_of_any_integer_dtype(dtype, backend, device):
    x, weight, bias, targets = inputs(12, 6, 40, device=device, ignored=0)
    want = ours(x, weight, bias, targets, backend=backend)
    assert torch.equal(ours(x, weight, bias, targets.to(dtype), backend=backend), want)


@pytest.mark.parametrize("backend", FAST)
def test_ignore_index_may_be_a_class(backend, device):
    x, weight, bias, targets = inputs(12, 6, 4, device=device, ignored=0)
    judge(x, weight, bias, targets, backend=backend, ignore_index=0)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("where", ["bias of -inf", "NaN row", "bias of inf", "all -inf"])
def test_values_that_are_not_finite_go_where_they_do_in_torch(where, backend, device):
    x, weight, bias, targets = inputs(8, 6, 40, device=device, ignored=0)
    targets[1] = 5
    if where == "bias of -inf":
        bias[3::2] = -torch.inf
    elif where == "NaN row":
        x[1] = torch.nan
    elif where == "bias of inf":
        bias[7] = torch.inf
    else:
        bias.fill_(-torch.inf)
    with forced(rows=4, block_v=16):
        judge(x, weight, bias, targets, backend=backend, reduction="none")
        judge(x, weight, bias, targets, backend=backend, reduction="sum")


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("target", [-1, 20, 2**40])
def test_a_target_out_of_range_is_named(target, backend):
    x, weight, bias, targets = inputs(12, 6, 20)
    targets[5] = target
    message = (
        rf"linear_cross_entropy: target must be in \[0, 20\) .* got {target} at position \[1, 1\]"
    )
    with pytest.raises(IndexError, match=message):
        ours(x.view(3, 4, 6), weight, bias, targets.view(3, 4), backend=backend)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("target", [-1, 20, 27, 2**32 + 3, -(2**63)])
def test_a_target_out_of_range_is_nan_in_the_kernel(target, backend, device):
    x, weight, bias, targets = inputs(12, 6, 20, device=device)
    expected = testing.run(ours, x, weight, bias, targets, reduction="none", backend=backend)
    targets[5] = target
    with forced(block_v=8):
        got = testing.run(ours, x, weight, bias, targets, reduction="none", backend=backend)
    for result in (got[0], got[1]):
        assert result[5].isnan().all()
        assert result[torch.arange(12) != 5].isfinite().all()
    assert got[2].isnan().all()
    assert expected[0].isfinite().all()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
def test_passes_its_own_check(dtype, backend, device):
    arguments = inputs(12, 16, 140, dtype, device)
    with fastlm.checked():
        for reduction in ("mean", "none"):
            testing.run(ours, *arguments, reduction=reduction, backend=backend)
        ours(*arguments, backend=backend)


WRONG = [
    ({"input": [1.0]}, TypeError, "input must be a tensor, got list"),
    ({"input": torch.ones(4, 6, dtype=torch.int64)}, TypeError, "input must be one of float32"),
    ({"input": torch.ones(())}, ValueError, "input must have at least one dimension"),
    ({"linear_weight": torch.ones(20, 5)}, ValueError, r"linear_weight must have shape \(V, 6\)"),
    ({"linear_weight": torch.ones(0, 6)}, ValueError, "linear_weight must have at least one class"),
    ({"linear_weight": torch.ones(20, 6).half()}, TypeError, "must have the dtype of input"),
    ({"linear_bias": torch.ones(19)}, ValueError, r"linear_bias must have shape \(20,\)"),
    ({"linear_bias": torch.ones(20).double()}, TypeError, "linear_bias must have the dtype"),
    ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"target must have shape \(4,\)"),
    ({"target": torch.zeros(4)}, TypeError, "target must be one of int64"),
    ({"reduction": "avg"}, ValueError, "reduction must be one of mean, sum, none, got 'avg'"),
    ({"num_items": 0}, ValueError, "num_items must be positive, got 0"),
    ({"num_items": torch.ones(2)}, ValueError, r"num_items must have one element, got shape"),
    ({"num_items": 3, "reduction": "none"}, ValueError, "num_items must be None with reduction"),
    ({"shift": -1}, ValueError, r"shift must be in \[0, 4\], got -1"),
    ({"shift": 5}, ValueError, r"shift must be in \[0, 4\], got 5"),
    ({"ignore_index": 2.5}, TypeError, "ignore_index must be an integer, got float"),
    ({"backend": "numpy"}, ValueError, "backend must be one of"),
    ({"backend": "gluon"}, NotImplementedError, "linear_cross_entropy has no gluon backend"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=[w[2] for w in WRONG])
def test_rejects(wrong, error, message):
    x, weight, bias, targets = inputs(4, 6, 20)
    right = {"input": x, "linear_weight": weight, "target": targets, "linear_bias": bias}
    with pytest.raises(error, match=f"linear_cross_entropy.*: .*{message}|{message}"):
        fastlm.linear_cross_entropy(**{**right, **wrong})
