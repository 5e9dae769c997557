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


def forward_refuses(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    need_stats: bool,
) -> str | None:
    return _refuses(input)


def backward_refuses(
    dlosses: Tensor,
    dlogprobs: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    maximum: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
) -> str | None:
    return _refuses(input)


def forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    need_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(input.dtype, torch.float32)
    losses = torch.empty(target.shape, dtype=dtype, device=input.device)
    maximum, log_sum = torch.empty_like(losses), torch.empty_like(losses)
    stats_shape = target.shape if need_stats else (0,)
    logprobs = torch.empty(stats_shape, dtype=dtype, device=input.device)
    entropy = torch.empty_like(logprobs)
    predictions = torch.empty(stats_shape, dtype=torch.int64, device=input.device)
    vocab_size = input.shape[-1]
    weights = _weights(weight, losses, label_smoothing)
    with_sums = need_stats or label_smoothing > 0
    plan = tuning.plan("forward", vocab_size, with_sums=with_sums)
    launch(
        forward_kernel, (target.numel(),),
        input, target.contiguous(), *weights,
        losses, maximum, log_sum, logprobs, entropy, predictions,
        *_layout(input), input.stride(-1), vocab_size, ignore_index,
        label_smoothing, softcap or 0.0, logit_scale,
        HAS_WEIGHT=weight is not None, HAS_SOFTCAP=softcap is not None,
        SMOOTHED=label_smoothing > 0, NEED_STATS=need_stats,
        BLOCK_V=plan.block_v, ACC=accumulator(input.dtype),
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    return losses, maximum, log_sum, logprobs, entropy, predictions


def backward(
    dlosses: Tensor,
    dlogprobs: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    maximum: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    dinput = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    vocab_size = input.shape[-1]
    has_dstats = dlogprobs is not None or dlse is not None
    upstream = [
        dlosses.contiguous(),
        _upstream(dlogprobs, maximum, is_read=has_dstats),
        _upstream(dlse, maximum, is_read=has_dstats),
        _upstream(dentropy, maximum, is_read=False),
    ]
    weights = _weights(weight, maximum, label_smoothing)
    plan = tuning.plan("backward", vocab_size)
    blocks_per_row = triton.cdiv(vocab_size, plan.block_v)
    launch(
        backward_kernel, (target.numel() * blocks_per_row,),
        *upstream, input, target.contiguous(), *weights, maximum, log_sum, entropy, dinput,
        *_layout(input), input.stride(-1), vocab_size, ignore_index, blocks_per_row,
        label_smoothing, softcap or 0.0, logit_scale,
        HAS_WEIGHT=weight is not None, HAS_SOFTCAP=softcap is not None,
        SMOOTHED=label_smoothing > 0, HAS_DSTATS=has_dstats, HAS_DENTROPY=dentropy is not None,
        BLOCK_V=plan.block_v, ACC=accumulator(input.dtype),
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    return dinput


def _upstream(gradient: Tensor | None, like: Tensor, *, is_read: bool) -> Tensor:
    """A gradient as the kernel takes it; of one that is missing, zeros or anything."""
    if gradient is not None:
        return gradient.contiguous()
    return torch.zeros_like(like) if is_read else like


def _weights(weight: Tensor | None, like: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Class weights as the kernels read them, and their sum; ``like`` in place of none."""
    if weight is None:
        return like, like
    weight = weight.to(like.dtype).contiguous()
    return weight, weight.sum() if label_smoothing > 0 else like


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
