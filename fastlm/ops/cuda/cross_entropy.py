"""Cross-entropy by the CUDA C++ kernels of ``csrc/cross_entropy.cuh``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.kernels._rows import new_results, refuses_rows, row_layout
from fastlm.ops.cuda._extension import address, dtype_of, kernels, place, refuses_device

# (largest vocab_size, threads of a block), smallest first; the last row serves all above it.
# From ahead-of-time compilation (no spills); not yet measured on a GPU.
THREADS = ((1_024, 128), (1 << 62, 256))
# Times 16 bytes: what a thread of the backward kernel goes through.
GROUPS_PER_THREAD = 4
_MOST_BLOCKS_PER_ROW = 65_535


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
    weight, weight_sum = _weights(weight, losses.dtype, label_smoothing)
    target = target.contiguous()
    kernels().cross_entropy_forward(
        dtype=dtype_of(input),
        rows=_rows(input, target, weight, weight_sum, ignore_index, label_smoothing, softcap,
                   logit_scale),
        losses=address(losses),
        maximum=address(maximum),
        log_sum=address(log_sum),
        logprobs=address(logprobs if need_stats else None),
        entropy=address(entropy),
        predictions=address(predictions),
        plan=plan_of(input),
        **place(input),
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
    weight, weight_sum = _weights(weight, maximum.dtype, label_smoothing)
    target = target.contiguous()
    upstream = [
        None if gradient is None else gradient.contiguous()
        for gradient in (dlosses, dlogprobs, dlse, dentropy)
    ]
    of_losses, of_logprobs, of_lse, of_entropy = map(address, upstream)
    kernels().cross_entropy_backward(
        dtype=dtype_of(input),
        rows=_rows(input, target, weight, weight_sum, ignore_index, label_smoothing, softcap,
                   logit_scale),
        maximum=address(maximum),
        log_sum=address(log_sum),
        entropy=address(entropy),
        dlosses=of_losses,
        dlogprobs=of_logprobs,
        dlse=of_lse,
        dentropy=of_entropy,
        dlogits=address(dinput),
        plan=plan_of(input),
        **place(input),
    )  # fmt: skip
    return dinput


def _weights(
    weight: Tensor | None, dtype: torch.dtype, label_smoothing: float
) -> tuple[Tensor | None, Tensor | None]:
    """Class weights as the kernels read them, and their sum where it is needed."""
    if weight is None:
        return None, None
    weight = weight.to(dtype).contiguous()
    return weight, weight.sum() if label_smoothing > 0 else None


def _rows(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    weight_sum: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
) -> Any:
    """What both kernels are told of the logits; it holds addresses and keeps nothing alive."""
    inner, stride_outer, stride_inner = row_layout(input)
    return kernels().LossRows(
        logits=address(input),
        targets=address(target),
        weight=address(weight),
        weight_sum=address(weight_sum),
        rows=target.numel(),
        inner=inner,
        stride_outer=stride_outer,
        stride_inner=stride_inner,
        stride_vocab=input.stride(-1),
        vocab_size=input.shape[-1],
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        softcap=softcap or 0.0,
        logit_scale=logit_scale,
    )


def plan(vocab_size: int, itemsize: int) -> tuple[int, int]:
    """Threads of a block, and blocks of the backward kernel for a row."""
    threads = next(threads for limit, threads in THREADS if vocab_size <= limit)
    elements = threads * GROUPS_PER_THREAD * 16 // itemsize
    return threads, min(-(-vocab_size // elements), _MOST_BLOCKS_PER_ROW)


def plan_of(input: Tensor) -> Any:
    """How launches on the rows of ``input`` are cut."""
    threads, blocks_per_row = plan(input.shape[-1], input.element_size())
    return kernels().LossPlan(threads=threads, blocks_per_row=blocks_per_row)
