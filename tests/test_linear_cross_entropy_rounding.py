"""Gradients of logits rounded to 16 bits: what is given back, and that the tolerance rule holds."""

from __future__ import annotations

import pytest
import torch
from support.interpreter import interpreted_only
from support.linear_cross_entropy import forced, inputs, judge, likely, plain_loss
from torch import Tensor

from fastlm.kernels._chunks import Operand, Upstream
from fastlm.kernels.linear_cross_entropy import chunk
from fastlm.ops.eager import linear_cross_entropy as eager

NARROW = [torch.bfloat16, torch.float16]


# with what the target alone lost given back, these seeds break the rule
@pytest.mark.parametrize("block_v", [64, 256])
@pytest.mark.parametrize(("dtype", "seed"), [(NARROW[0], 24), (NARROW[1], 1), (NARROW[1], 35)])
def test_two_likely_classes(dtype, seed, block_v, device):
    with forced(block_v=block_v):
        judge(*likely(dtype, device, seed=seed), backend="triton", reduction="sum")


@pytest.mark.slow
@pytest.mark.parametrize("common", [0.0, 1.0])
@pytest.mark.parametrize("classes", [2, 3, 8])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_hundred_batches_of_likely_classes(dtype, classes, common, device):
    for seed in range(100):
        arguments = likely(dtype, device, classes=classes, common=common, seed=seed)
        judge(*arguments, backend="triton", reduction="sum")


def lost_by_definition(dlogits: Tensor, dtype: torch.dtype, targets: Tensor) -> tuple[Tensor, ...]:
    """Of a wide gradient, at the target and at the largest of the others."""
    lost = dlogits - dlogits.to(dtype).float()
    at_target = lost.gather(1, targets[:, None])
    others = lost.scatter(1, targets[:, None], 0.0)
    column = others.abs().argmax(1, keepdim=True)
    columns = torch.cat([targets[:, None], column], 1)
    return columns, torch.cat([at_target, others.gather(1, column)], 1)


@interpreted_only
@pytest.mark.parametrize("block_v", [16, 256])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_gives_back_what_the_target_and_the_largest_other_lost(dtype, block_v):
    x, weight, bias, targets = inputs(9, 5, 150, ignored=0)
    logits = x @ weight.t()

    def run(dtype):
        rows = chunk.Rows.empty(x, 9, torch.float32, need_stats=False)
        with forced(block_v=block_v):
            return chunk.launch_gradient(
                logits.clone(), Operand(dtype), targets, plain_loss(bias), Upstream(), rows,
                lse_is_known=False,
            )  # fmt: skip

    exact, nothing = run(torch.float32)
    assert nothing is None
    rounded, lost = run(dtype)
    assert torch.equal(rounded, exact.to(dtype))
    want = lost_by_definition(exact, dtype, targets)
    for got in (lost, eager._rounded(exact.clone(), targets[:, None], Operand(dtype))[1]):
        assert all(map(torch.equal, got, want))
    assert (want[1][:, 1] != 0).all()


@interpreted_only
def test_rows_without_a_target_give_nothing_back():
    _, weight, bias, targets = inputs(4, 5, 150)
    x = torch.randn(4, 5)
    targets[:] = torch.tensor([-100, 150, 3, 4])
    logits = x @ weight.t()
    logits[2, 7] = torch.nan
    rows = chunk.Rows.empty(x, 4, torch.float32, need_stats=False)
    _, lost = chunk.launch_gradient(
        logits, Operand(torch.bfloat16), targets, plain_loss(bias), Upstream(), rows,
        lse_is_known=False,
    )  # fmt: skip
    columns, residuals = lost
    assert ((columns >= 0) & (columns < 150)).all()
    assert not residuals[0].any()
    assert residuals[1:3, 0].isnan().all()
    assert residuals[3].isfinite().all()
