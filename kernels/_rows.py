"""Where the rows of a tensor are, and what is known of each: what kernels of any kind share."""

from __future__ import annotations

import torch
from torch import Tensor

# A size, and the stride of each tensor.
_Dimension = tuple[int, tuple[int, ...]]


def refuses_rows(input: Tensor, name: str, *others: Tensor | None) -> str | None:
    """Why the rows of ``input``, called ``name``, have no :func:`row_layout`, or None.

    With ``others``, of its shape, why all of these have none together.
    """
    tensors = [input, *(x for x in others if x is not None)]
    if _merged(*tensors) is not None:
        return None
    strides = " and ".join(str(x.stride()) for x in tensors)
    return f"the leading dimensions of {name}, strides {strides}, do not merge into two"


def row_layout(input: Tensor) -> tuple[int, int, int]:
    """``inner, stride_outer, stride_inner``, in elements.

    Row r of the last dimension is at ``r // inner * stride_outer + r % inner * stride_inner``.
    """
    inner, [(stride_outer, stride_inner)] = joint_layout(input)
    return inner, stride_outer, stride_inner


def joint_layout(*tensors: Tensor) -> tuple[int, list[tuple[int, int]]]:
    """``inner``, which the rows of all have, and ``(stride_outer, stride_inner)`` of each."""
    rows = _merged(*tensors)
    assert rows is not None, "refused above"
    (_, outer), (inner, within) = rows
    return inner, list(zip(outer, within, strict=True))


def mergeable(gradient: Tensor, *others: Tensor) -> Tensor:
    """``gradient``, or a copy of it if it has no :func:`joint_layout` with the others."""
    return gradient if _merged(gradient, *others) is not None else gradient.contiguous()


def angles_as_read(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    """Both tables, and their strides by sequence, position and pair: the same for both."""
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    of_batch = cos.stride(0) if cos.dim() == 3 else 0
    return cos, sin, (of_batch, cos.stride(-2), cos.stride(-1))


def as_long_rows(*tensors: Tensor) -> list[Tensor]:
    """Views of them as one row each, if none has gaps; of a scalar too."""
    if all(x.is_contiguous() for x in tensors):
        return [x.view(1, -1) for x in tensors]
    return list(tensors)


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


def _merged(*tensors: Tensor) -> tuple[_Dimension, _Dimension] | None:
    """The leading dimensions merged into ``(outer, strides), (inner, strides)``; or None."""
    nothing = (0,) * len(tensors)
    if tensors[0].numel() == 0:
        return (0, nothing), (0, nothing)
    merged: list[_Dimension] = []
    strides = zip(*(x.stride()[:-1] for x in tensors), strict=True)
    for size, steps in zip(tensors[0].shape[:-1], strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == tuple(size * step for step in steps):
            merged[-1] = (merged[-1][0] * size, steps)
        else:
            merged.append((size, steps))
    if len(merged) > 2:
        return None
    outer, inner = [(1, nothing)] * (2 - len(merged)) + merged
    return outer, inner
