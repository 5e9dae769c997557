"""Where the rows of a tensor are, and what is known of each: what kernels of any kind share."""

from __future__ import annotations

import torch
from torch import Tensor


def refuses_rows(input: Tensor, name: str) -> str | None:
    """Why the rows of ``input``, called ``name``, have no :func:`row_layout`, or None."""
    if _merged(input) is not None:
        return None
    return f"the leading dimensions of {name}, strides {input.stride()}, do not merge into two"


def row_layout(input: Tensor) -> tuple[int, int, int]:
    """``inner, stride_outer, stride_inner``, in elements.

    Row r of the last dimension is at ``r // inner * stride_outer + r % inner * stride_inner``.
    """
    rows = _merged(input)
    assert rows is not None, "refused above"
    (_, stride_outer), (inner, stride_inner) = rows
    return inner, stride_outer, stride_inner


def new_results(
    input: Tensor, target: Tensor, need_stats: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses, maximum, log_sum, logprobs, entropy and predictions of rows, for a kernel to write.

    Wide; the last three are empty unless they are asked for.
    """
    dtype = torch.promote_types(input.dtype, torch.float32)
    losses = torch.empty(target.shape, dtype=dtype, device=input.device)
    maximum, log_sum = torch.empty_like(losses), torch.empty_like(losses)
    stats_shape = target.shape if need_stats else (0,)
    logprobs = torch.empty(stats_shape, dtype=dtype, device=input.device)
    entropy = torch.empty_like(logprobs)
    predictions = torch.empty(stats_shape, dtype=torch.int64, device=input.device)
    return losses, maximum, log_sum, logprobs, entropy, predictions


def _merged(input: Tensor) -> tuple[tuple[int, int], tuple[int, int]] | None:
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
