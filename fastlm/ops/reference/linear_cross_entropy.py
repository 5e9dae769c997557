"""Cross-entropy of a linear layer's logits: F.linear, then the cross_entropy of this folder.

Everything in at least float32; ``lse`` is zero at ignored targets.  The gradients are those of
``(losses * dlosses).sum()``, ones in ``gradients``; one that is not needed is empty.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops.reference import cross_entropy
from fastlm.ops.reference.cross_entropy import check_targets

_OP = "linear_cross_entropy"
_ROWS_AT_ONCE = 256


def forward(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """``(..., C)`` and ``(V, C)`` to ``(...)`` losses and lse, float32 or float64.

    Raises:
        IndexError: On CPU, a target is neither ``ignore_index`` nor in ``[0, V)``; elsewhere its
            loss is NaN.
    """
    check_targets(_OP, target, linear_weight.shape[0], ignore_index)
    logits = _logits(input, linear_weight, linear_bias)
    losses, maximum, log_sum = cross_entropy.forward(logits, target, ignore_index)
    lse = maximum + log_sum
    return losses, lse.masked_fill(target == ignore_index, 0.0)


def gradients(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, and the gradients of their sum, all float32 or float64."""
    losses, lse = forward(input, linear_weight, linear_bias, target, ignore_index)
    dinput, dweight, dbias = backward(
        torch.ones_like(losses), input, linear_weight, linear_bias, target, lse, ignore_index,
        need_input, need_weight, need_bias,
    )  # fmt: skip
    return losses, dinput, dweight, dbias


def backward(
    dlosses: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dinput = dlogits W, dW = dlogits^T input, dbias = sum of dlogits over rows."""
    logits = _logits(input, linear_weight, linear_bias)
    dlogits = cross_entropy.backward(
        dlosses, logits, target, lse, torch.zeros_like(lse), ignore_index
    ).reshape(-1, linear_weight.shape[0])
    rows = input.reshape(-1, input.shape[-1]).to(dlogits.dtype)
    nothing = dlogits.new_empty(0)
    return (
        (dlogits @ linear_weight.to(dlogits.dtype)).view(input.shape) if need_input else nothing,
        dlogits.t() @ rows if need_weight else nothing.clone(),
        dlogits.sum(0) if need_bias else nothing.clone(),
    )


def _logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    dtype = torch.promote_types(input.dtype, torch.float32)
    bias = None if linear_bias is None else linear_bias.to(dtype)
    return F.linear(input.to(dtype), linear_weight.to(dtype), bias)


def truth_forward(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    check_targets(_OP, target, linear_weight.shape[0], ignore_index, may_wait=True)
    weight, bias = _exact(linear_weight, linear_bias)
    parts = [forward(x.double(), weight, bias, y, ignore_index) for x, y in _slices(input, target)]
    if not parts:
        return target.double(), target.double()
    losses, lse = (torch.cat(part).view(target.shape) for part in zip(*parts, strict=True))
    return losses, lse


def truth_gradients(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    losses, lse = truth_forward(input, linear_weight, linear_bias, target, ignore_index)
    dinput, dweight, dbias = truth_backward(
        torch.ones_like(losses), input, linear_weight, linear_bias, target, lse, ignore_index,
        need_input, need_weight, need_bias,
    )  # fmt: skip
    return losses, dinput, dweight, dbias


def truth_backward(
    dlosses: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_targets(_OP, target, linear_weight.shape[0], ignore_index, may_wait=True)
    weight, bias = _exact(linear_weight, linear_bias)
    dinput = weight.new_zeros(input.shape if need_input else 0)
    dweight = torch.zeros_like(weight) if need_weight else weight.new_empty(0)
    dbias = weight.new_zeros(weight.shape[0] if need_bias else 0)
    rows = dinput.view(-1, weight.shape[1]).split(_ROWS_AT_ONCE)
    upstream = dlosses.reshape(-1).split(_ROWS_AT_ONCE)
    for i, (x, y) in enumerate(_slices(input, target)):
        exact = x.double()
        _, lse = forward(exact, weight, bias, y, ignore_index)
        parts = backward(
            upstream[i].double(), exact, weight, bias, y, lse, ignore_index,
            need_input, need_weight, need_bias,
        )  # fmt: skip
        if need_input:
            rows[i].copy_(parts[0])
        dweight += parts[1]
        dbias += parts[2]
    return dinput, dweight, dbias


def _exact(linear_weight: Tensor, linear_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return linear_weight.double(), None if linear_bias is None else linear_bias.double()


def _slices(input: Tensor, target: Tensor) -> list[tuple[Tensor, Tensor]]:
    if target.numel() == 0:
        return []
    rows = input.reshape(-1, input.shape[-1]).split(_ROWS_AT_ONCE)
    return list(zip(rows, target.reshape(-1).split(_ROWS_AT_ONCE), strict=True))


plain_forward = forward


def plain_gradients(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients cast once to the dtype of the input, as they will be when they are returned."""
    losses, *wide = gradients(
        input, linear_weight, linear_bias, target, ignore_index, need_input, need_weight, need_bias
    )
    dinput, dweight, dbias = _cast_once(wide, input.dtype)
    return losses, dinput, dweight, dbias


def plain_backward(
    dlosses: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients cast once to the dtype of the input, as they will be when they are returned."""
    wide = backward(
        dlosses, input, linear_weight, linear_bias, target, lse, ignore_index,
        need_input, need_weight, need_bias,
    )  # fmt: skip
    return _cast_once(wide, input.dtype)


def _cast_once(gradients: Iterable[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    dinput, dweight, dbias = (gradient.to(dtype).to(gradient.dtype) for gradient in gradients)
    return dinput, dweight, dbias


def forward_refuses(*args: object) -> None:
    return None


gradients_refuses = forward_refuses
backward_refuses = forward_refuses
