"""The kernels of linear_cross_entropy: memory, order, other bits, and bugs planted in them."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from support.host_sync import no_host_sync
from support.interpreter import interpreted_only, permuted_grid
from support.linear_cross_entropy import (
    assert_gives_back_what_is_lost,
    assert_same_bits,
    forced,
    gradient_of_chunk,
    inputs,
    judge,
    likely,
    ours,
    plain_loss,
    run_kernel,
)
from support.losses import OPTIONS, linear, linear_definition
from support.losses import judge as judge_options
from support.memory import guarded, in_child, sparse
from support.mutants import Mutant, killed
from support.poison import poisoned

from fastlm import testing
from fastlm.kernels._chunks import Operand, Upstream
from fastlm.kernels._launch import recorded
from fastlm.kernels.linear_cross_entropy import chunk, kernel

NARROW = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *NARROW]


def everything(dtype=torch.float32, device="cpu", **options):
    return testing.run(ours, *inputs(9, 5, 140, dtype, device), backend="triton", **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [15, 16, 17, 143, 144, 145])
def test_edges_of_blocks(vocab_size, dtype, device):
    arguments = inputs(5, 4, vocab_size, dtype, device)
    with forced(block_v=16):
        judge(*arguments, backend="triton", reduction="none")
        judge(*arguments, backend="triton", reduction="sum")


@interpreted_only
@pytest.mark.parametrize("end", ["back", "front"])
@pytest.mark.parametrize("block_v", [16, 64])
def test_touches_nothing_outside_its_tensors(end, block_v):
    x, weight, bias, targets = inputs(6, 4, 37)
    targets[1], targets[2] = 37, -1
    per_row = torch.ones(6)

    def run():
        with forced(block_v=block_v):
            for dtype in DTYPES:
                logits = guarded(x @ weight.t(), end)
                rows = chunk.Rows(*(guarded(per_row, end) for _ in range(4)), guarded(targets, end))
                y, class_weights = guarded(targets, end), guarded(torch.ones(37), end)
                total = guarded(torch.tensor([37.0]), end)
                b = guarded(bias.to(dtype), end)
                loss = chunk.Loss(b, class_weights, total, -100, 0.1, 3.0, 0.5)
                upstream = Upstream(*(guarded(per_row, end) for _ in range(4)), total)
                chunk.launch_loss(logits, y, loss, rows)
                dbias = guarded(torch.zeros(37), end)
                chunk.launch_bias_gradient(logits, y, loss, upstream, rows, dbias)
                for lse_is_known in (False, True):
                    logits = guarded(x @ weight.t(), end)
                    chunk.launch_gradient(
                        logits, Operand(dtype), y, loss, upstream, rows, lse_is_known=lse_is_known
                    )

    in_child(run)


@interpreted_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_may_be_far_apart(dtype):
    logits, targets = torch.randn(3, 20), torch.tensor([1, -100, 7])
    stride = 2**30 + 64
    far = sparse((3, 20), (stride, 1), dtype)
    near = torch.empty(3, 20, dtype=dtype)
    for out in (far, near):
        run_kernel(
            kernel.gradient_kernel, (3,), logits_ptr=logits, dlogits_ptr=out, targets_ptr=targets,
            losses_ptr=torch.empty(3), lse_ptr=torch.empty(3),
            columns_ptr=torch.empty(3, 2, dtype=torch.int64), residuals_ptr=torch.empty(3, 2),
            stride_dlogits=out.stride(0), vocab_size=20, BLOCK_V=16,
        )  # fmt: skip
    assert torch.equal(far, near)
    assert near[0].count_nonzero() == 20


# 17 rows of it pass 2^31 elements
FAR = 2**27 + 64


def of_the_far_row(run):
    """Call ``run`` with zero logits whose row 16 has a 1 at column 5, its target."""
    logits = sparse((17, FAR), (FAR, 1), torch.float32)
    logits[16, 5] = 1.0
    targets = torch.full((17,), 5)
    exact = math.log(FAR - 1 + math.e)
    run(logits, targets, torch.full((17,), torch.nan), torch.full((17,), exact), exact)


def last_program(kernel, **given):
    """Run program 16 of 17 alone."""
    builder = triton.runtime.interpreter.interpreter_builder
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    with (
        mock.patch.object(builder, "set_grid_dim", lambda *grid: set_dim(17, 1, 1)),
        mock.patch.object(builder, "set_grid_idx", lambda *index: set_index(16, 0, 0)),
    ):
        run_kernel(kernel, (1,), **given)


@interpreted_only
@pytest.mark.slow
def test_logits_of_a_chunk_may_pass_2_31_elements():
    def loss(logits, targets, losses, lse, exact):
        last_program(
            kernel.loss_kernel, logits_ptr=logits, targets_ptr=targets, losses_ptr=losses,
            lse_ptr=lse.fill_(0), vocab_size=FAR, BLOCK_V=2**20,
        )  # fmt: skip
        assert losses[16].item() == pytest.approx(exact - 1, rel=1e-5)
        assert lse[16].item() == pytest.approx(exact, rel=1e-5)

    def gradient(logits, targets, losses, lse, exact):
        # in its own memory, since that of the logits would be written, half a gigabyte
        dlogits = torch.zeros(FAR, dtype=torch.bfloat16)
        columns = torch.full((17, 2), -1)
        last_program(
            kernel.gradient_kernel, logits_ptr=logits, dlogits_ptr=dlogits, targets_ptr=targets,
            lse_ptr=lse, columns_ptr=columns, residuals_ptr=torch.zeros(17, 2), stride_dlogits=0,
            vocab_size=FAR, LSE_IS_KNOWN=True, BLOCK_V=2**20,
        )  # fmt: skip
        assert columns[16].tolist() == [5, 0]
        assert dlogits[5].item() == pytest.approx(math.exp(1 - exact) - 1, rel=1e-2)
        assert dlogits[-1].item() == pytest.approx(math.exp(-exact), rel=1e-2)

    def bias_gradient(logits, targets, losses, lse, exact):
        dbias = torch.zeros(16)
        run_kernel(
            kernel.bias_gradient_kernel, (1,), logits_ptr=logits, bias_ptr=torch.zeros(16),
            targets_ptr=targets, lse_ptr=lse, dbias_ptr=dbias, rows=17, vocab_size=FAR,
            BLOCK_R=4, BLOCK_V=16,
        )  # fmt: skip
        want = 16 * (math.exp(-exact) - 1) + math.exp(1 - exact) - 1
        assert dbias[5].item() == pytest.approx(want, rel=1e-6)
        assert dbias[4].item() == pytest.approx(17 * math.exp(-exact), rel=1e-5)

    for run in (loss, gradient, bias_gradient):
        in_child(lambda run=run: of_the_far_row(run), seconds=300)


@interpreted_only
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_order_of_programs_does_not_matter(reduction):
    with forced(rows=4, block_v=64):
        expected = everything(torch.bfloat16, reduction=reduction)
        for seed in range(3):
            with permuted_grid(seed):
                assert_same_bits(everything(torch.bfloat16, reduction=reduction), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_what_was_in_memory_does_not_matter(backend, reduction, device):
    arguments = inputs(9, 5, 140, torch.bfloat16, device)
    expected = testing.run(ours, *arguments, backend=backend, reduction=reduction)
    with poisoned(0x7F):
        got = testing.run(ours, *arguments, backend=backend, reduction=reduction)
    assert_same_bits(got, expected)


def test_a_row_does_not_depend_on_the_others(device):
    x, weight, bias, targets = inputs(9, 5, 40, device=device)
    logits = x @ weight.t()
    order = torch.randperm(9, device=device)

    def run(logits, targets):
        with forced(block_v=16):
            return gradient_of_chunk(logits.clone(), Operand(torch.float32), bias, targets)

    straight, permuted = run(logits, targets), run(logits[order], targets[order])
    assert_same_bits(list(permuted), [t[order] for t in straight])
    assert_same_bits(list(run(logits, targets)), list(straight))


def test_does_not_wait_for_the_device(device):
    *tensors, targets = inputs(9, 5, 140, torch.bfloat16, device)
    leaves = [t.requires_grad_() for t in tensors]
    num_items = torch.tensor(5, device=device)
    with recorded(run=device == "cuda"), no_host_sync():
        for options in ({"shift": 1}, {"num_items": num_items}, {"reduction": "none"}):
            loss = ours(*leaves, targets, backend="triton", **options)
            torch.autograd.grad(loss, leaves, torch.ones_like(loss))


def test_does_each_piece_of_work_once(device):
    *tensors, targets = inputs(9, 5, 40, device=device)
    leaves = [t.requires_grad_() for t in tensors]

    def launches(step):
        with recorded() as log:
            step()
        return [call.name for call in log]

    with forced(rows=9, block_v=16):
        loss = ours(*leaves[:2], None, targets, backend="triton")
        names = launches(lambda: ours(*leaves[:2], None, targets, backend="triton"))
        assert names == ["gradient_kernel"]
        assert launches(loss.backward) == []
        with torch.no_grad():
            names = launches(lambda: ours(*leaves, targets, backend="triton"))
        assert names == ["loss_kernel"]


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(0, 8),
    hidden_size=st.integers(1, 20),
    vocab_size=st.integers(1, 60),
    chunk=st.integers(1, 9),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from(DTYPES),
    has_bias=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 99),
)
def test_any_sizes_agree_with_torch(
    device, rows, hidden_size, vocab_size, chunk, ignored, dtype, has_bias, reduction, seed
):
    x, weight, bias, targets = inputs(
        rows, hidden_size, vocab_size, dtype, device, ignored=ignored, seed=seed
    )
    with forced(rows=chunk, block_v=16):
        judge(x, weight, bias if has_bias else None, targets, backend="triton", reduction=reduction)


KERNEL = "kernels/linear_cross_entropy/kernel.py"
CHUNKS = "kernels/_chunks.py"
SHARED = "kernels/_losses.py"
MUTANTS = [
    Mutant("a row in registers is summed without its maximum", SHARED,
           "e = tl.exp(x - maximum)", "e = tl.exp(x)"),
    Mutant("ignored rows keep their gradient", KERNEL,
           "dx = tl.where(ignored, 0.0, tl.where(x_target == x_target, dx, x_target))",
           "dx = tl.where(x_target == x_target, dx, 0.5)"),
    Mutant("the target keeps its probability", KERNEL,
           "dx = tl.where(cols == column, dx_target, dx)",
           "dx = tl.where(cols == column, dx, dx)"),
    Mutant("one incoming gradient for all rows", KERNEL,
           "dloss = tl.load(dlosses_ptr + row)\n", "dloss = tl.load(dlosses_ptr)\n"),
    Mutant("the z-loss has half its gradient", KERNEL,
           "of_all += 2.0 * tl.load(z_weight_ptr) * lse\n    # one",
           "of_all += tl.load(z_weight_ptr) * lse\n    # one"),
    Mutant("the entropy of a row in registers is not centred", SHARED,
           'tl.where(x == float("-inf"), 0.0, x - maximum), 0) / total', "x, 0) / total"),
    Mutant("the bias sees targets without their weight", KERNEL,
           "w_target = tl.load(weight_ptr + target, mask=valid & counted, other=0.0)",
           "w_target = dloss"),
    Mutant("the loss is smoothed by a mean, not by the weighted sum", SHARED,
           "uniform = weight_sum * lse_above_origin - weighted",
           "uniform = vocab_size * lse_above_origin - weighted"),
    Mutant("the residual is forgotten", KERNEL,
           "residual = dx_target - dx_target.to(dlogits_ptr.dtype.element_ty).to(ACC)",
           "residual = dx_target - dx_target"),
    Mutant("what a second likely class lost is forgotten", KERNEL,
           "tl.store(residuals_ptr + 2 * row + 1, taken)",
           "tl.store(residuals_ptr + 2 * row + 1, 0.0)"),
    Mutant("what the target lost is given back twice", KERNEL,
           "in_row & (cols != column) & (lost == lost)", "in_row & (lost == lost)"),
    Mutant("the last block's loss is given back, not the row's largest", KERNEL,
           "is_more = most > tl.abs(taken)", "is_more = most >= 0.0"),
    Mutant("the bias is not in the logit of the target", SHARED,
           "logit += tl.load(bias_ptr + target, mask=valid, other=0.0).to(ACC)",
           "logit += 0.0"),
    Mutant("a target out of range is read", SHARED,
           "valid = (target >= 0) & (target < vocab_size) & (target != ignore_index)",
           "valid = target != ignore_index"),
    Mutant("rows after the first chunk are lost from the bias", KERNEL,
           "tl.store(dbias_ptr + cols, before + tl.sum(total, 0), mask=in_row)",
           "tl.store(dbias_ptr + cols, tl.sum(total, 0), mask=in_row)"),
    Mutant("each chunk overwrites the weight gradient", CHUNKS,
           "accumulate=rows.start > 0", "accumulate=False"),
    Mutant("the first chunk adds to what was in memory", CHUNKS,
           "accumulate=rows.start > 0", "accumulate=True"),
    Mutant("a float16 operand keeps its scale", CHUNKS,
           "1.0 / self._operand.scale", "1.0"),
]  # fmt: skip


def _check() -> None:
    for dtype in (torch.float32, torch.float16):
        arguments = inputs(7, 4, 140, dtype)
        with forced(rows=3, block_v=64):
            for reduction in ("mean", "none"):
                judge(*arguments, backend="triton", reduction=reduction)
    x, weight, bias, targets = inputs(64, 8, 140, torch.bfloat16, ignored=0)
    judge(x, weight / 8, bias / 8, targets, backend="triton", reduction="sum")
    assert_gives_back_what_is_lost(torch.bfloat16, 64)
    for dtype, seed in ((torch.bfloat16, 24), (torch.float16, 35)):
        with forced(block_v=64):
            judge(*likely(dtype, "cpu", seed=seed), backend="triton", reduction="sum")
    x, weight, bias, targets = (guarded(t) for t in inputs(7, 4, 37))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    loss = ours(*leaves, targets, backend="triton")
    first = torch.autograd.grad(loss, leaves, 3 * torch.ones_like(loss), retain_graph=True)
    again = torch.autograd.grad(loss, leaves, 3 * torch.ones_like(loss), retain_graph=True)
    assert_same_bits(list(first), list(again))
    rows = chunk.Rows.empty(x, 2, torch.float32, need_stats=False)
    far = torch.tensor([2**40, 1])
    chunk.launch_loss(guarded(torch.randn(2, 37)), far, plain_loss(None), rows)
    assert rows.losses[0].isnan()
    x, weight, bias, targets = inputs(5, 4, 37)
    x = x * 6  # logits whose exponentials overflow
    loss_alone = {name: OPTIONS[name] for name in OPTIONS if name != "return_stats"}
    for added, block_v, options in (
        (bias, 16, OPTIONS),
        (None, 16, {**loss_alone, "reduction": "mean"}),
        (None, 64, {**loss_alone, "reduction": "sum"}),
        (None, 64, {**OPTIONS, "reduction": "mean"}),
    ):
        with forced(rows=3, block_v=block_v):
            arguments = (x, weight, added, targets)
            judge_options(linear, linear_definition, arguments, "triton", options)
    with forced(rows=3, block_v=64):
        judge(120 * x, weight, None, targets, backend="triton")


@interpreted_only
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_planted_bug_is_noticed(mutant):
    assert killed(mutant, _check)
