"""Gradients of logits rounded to 16 bits: what is given back, and that the tolerance rule holds."""

from __future__ import annotations

import pytest
import torch
from support.interpreter import interpreted_only
from support.linear_cross_entropy import (
    assert_gives_back_what_is_lost,
    forced,
    inputs,
    judge,
    likely,
    plain_loss,
)

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


@interpreted_only
@pytest.mark.parametrize("block_v", [16, 256])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_gives_back_what_the_target_and_the_largest_other_lost(dtype, block_v):
    exact, targets, want = assert_gives_back_what_is_lost(dtype, block_v)
    _, got = eager._rounded(exact, targets[:, None], Operand(dtype))
    assert all(map(torch.equal, got, want))


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
