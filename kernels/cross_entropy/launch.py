"""Allocate outputs and launch.  Arguments are already checked by the caller."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .._launch import accumulator, launch
from .._runtime import refuses_device
from . import tuning
from .kernel import backward_kernel, forward_kernel


def _refuses(input: Tensor) -> str | None:
    reason = refuses_device(input, "input")
    if reason is None and _rows(input) is None:
        reason = f"the leading dimensions of input, strides {input.stride()}, do not merge into two"
    return reason


def forward_refuses(input: Tensor, target: Tensor, ignore_index: int) -> str | None:
    return _refuses(input)


def backward_refuses(
    dlosses: Tensor,
    input: Tensor,
    target: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    ignore_index: int,
) -> str | None:
    return _refuses(input)


def forward(input: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(input.dtype, torch.float32)
    losses = torch.empty(target.shape, dtype=dtype, device=input.device)
    maximum, log_sum = torch.empty_like(losses), torch.empty_like(losses)
    vocab_size = input.shape[-1]
    plan = tuning.plan("forward", vocab_size)
    launch(
        forward_kernel, (target.numel(),),
        input, target.contiguous(), losses, maximum, log_sum,
        *_layout(input), input.stride(-1), vocab_size, ignore_index,
        BLOCK_V=plan.block_v, ACC=accumulator(input.dtype),
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    return losses, maximum, log_sum


def backward(
    dlosses: Tensor,
    input: Tensor,
    target: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    ignore_index: int,
) -> Tensor:
    dinput = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    vocab_size = input.shape[-1]
    plan = tuning.plan("backward", vocab_size)
    blocks_per_row = triton.cdiv(vocab_size, plan.block_v)
    launch(
        backward_kernel, (target.numel() * blocks_per_row,),
        dlosses.contiguous(), input, target.contiguous(), maximum, log_sum, dinput,
        *_layout(input), input.stride(-1), vocab_size, ignore_index, blocks_per_row,
        BLOCK_V=plan.block_v, ACC=accumulator(input.dtype),
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    return dinput


def _layout(input: Tensor) -> tuple[int, int, int]:
    """``inner, stride_outer, stride_inner`` of the rows of ``input``."""
    rows = _rows(input)
    assert rows is not None, "refused above"
    (_, stride_outer), (inner, stride_inner) = rows
    return inner, stride_outer, stride_inner


def _rows(input: Tensor) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The leading dimensions merged into ``(outer, stride), (inner, stride)``; or None."""
    if input.numel() == 0:
        return (0, 0), (0, 0)
    merged: list[tuple[int, int]] = []
    for size, stride in zip(input.shape[:-1], input.stride()[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return None
    outer, inner = [(1, 0)] * (2 - len(merged)) + merged
    return outer, inner
