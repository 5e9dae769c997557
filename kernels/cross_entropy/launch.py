"""Allocate outputs and launch.  Arguments are already checked by the caller."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .._launch import accumulator, launch
from .._rows import new_results, refuses_rows, row_layout
from .._runtime import refuses_device
from . import tuning
from .kernel import backward_kernel, forward_kernel


def _refuses(input: Tensor) -> str | None:
    return refuses_device(input, "input") or refuses_rows(input, "input")


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
    losses, maximum, log_sum, logprobs, entropy, predictions = new_results(
        input, target, need_stats
    )
    vocab_size = input.shape[-1]
    weights = _weights(weight, losses, label_smoothing)
    with_sums = need_stats or label_smoothing > 0
    plan = tuning.plan("forward", vocab_size, with_sums=with_sums)
    launch(
        forward_kernel, (target.numel(),),
        input, target.contiguous(), *weights,
        losses, maximum, log_sum, logprobs, entropy, predictions,
        *row_layout(input), input.stride(-1), vocab_size, ignore_index,
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
        *row_layout(input), input.stride(-1), vocab_size, ignore_index, blocks_per_row,
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
