"""Cross-entropy of a linear layer's logits: F.linear, then the cross_entropy of this folder.

Every rank of a ``group`` gathers the layer from all, and keeps the gradients of its own classes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops.reference import cross_entropy
from fastlm.ops.reference._shards import of_rank, whole
from fastlm.ops.reference.cross_entropy import check_targets

_OP = "linear_cross_entropy"
_ROWS_AT_ONCE = 64


def forward(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    need_stats: bool,
    group: str,
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(..., C)`` and ``(V, C)`` to ``(...)`` losses and lse, and statistics if asked for.

    Returns:
        losses, lse, logprobs, entropy: float32 or float64; predictions: int64.  Zero at ignored
        targets, and -1; the last three are empty unless ``need_stats``.

    Raises:
        IndexError: On CPU, a target is neither ``ignore_index`` nor in ``[0, V)``; elsewhere its
            loss is NaN.
    """
    linear_weight, linear_bias = whole(group, num_classes, linear_weight, linear_bias)
    check_targets(_OP, target, linear_weight.shape[0], ignore_index)
    logits = _logits(input, linear_weight, linear_bias)
    losses, maximum, log_sum, *stats = cross_entropy.forward(
        logits, target, weight, ignore_index, label_smoothing, softcap, logit_scale, need_stats
    )
    lse = (maximum + log_sum).masked_fill(target == ignore_index, 0.0)
    logprobs, entropy, predictions = stats
    return losses, lse, logprobs, entropy, predictions


def gradients(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    z_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    need_stats: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    group: str,
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What :func:`forward` returns, and the gradients of the sum of loss + z_weight lse**2.

    Without statistics and ``z_weight`` lse is empty too.
    """
    options = (ignore_index, label_smoothing, softcap, logit_scale)
    known = forward(
        input, linear_weight, linear_bias, target, weight, *options, need_stats, group, num_classes
    )
    losses, lse, logprobs, entropy, predictions = known
    dlse = None if z_weight is None else 2 * z_weight * lse
    shown = lse if need_stats or z_weight is not None else lse.new_empty(0)
    return losses, shown, logprobs, entropy, predictions, *backward(
        torch.ones_like(losses), None, dlse, None,
        input, linear_weight, linear_bias, target, weight, lse, entropy, *options,
        need_input, need_weight, need_bias, group, num_classes,
    )  # fmt: skip


def backward(
    dlosses: Tensor,
    dlogprobs: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    group: str,
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dinput = dlogits W, dW = dlogits^T input, dbias = sum of dlogits over rows; all wide."""
    linear_weight, linear_bias = whole(group, num_classes, linear_weight, linear_bias)
    logits = _logits(input, linear_weight, linear_bias)
    dlogits = cross_entropy.backward(
        dlosses, dlogprobs, dlse, dentropy, logits, target, weight,
        lse, torch.zeros_like(lse), entropy, ignore_index, label_smoothing, softcap, logit_scale,
    ).reshape(-1, linear_weight.shape[0])  # fmt: skip
    rows = input.reshape(-1, input.shape[-1]).to(dlogits.dtype)
    nothing = dlogits.new_empty(0)
    dinput = dlogits @ linear_weight.to(dlogits.dtype) if need_input else nothing
    dweight = dlogits.t() @ rows if need_weight else nothing.clone()
    dbias = dlogits.sum(0) if need_bias else nothing.clone()
    dweight, dbias = of_rank(group, num_classes, dweight, dbias)
    return dinput.view(input.shape if need_input else 0), dweight, dbias


def _logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    dtype = torch.promote_types(input.dtype, torch.float32)
    bias = None if linear_bias is None else linear_bias.to(dtype)
    return F.linear(input.to(dtype), linear_weight.to(dtype), bias)


def truth_forward(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    need_stats: bool,
    group: str,
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`forward` in float64; a target out of range raises IndexError on every device."""
    linear_weight, linear_bias = whole(group, num_classes, linear_weight, linear_bias)
    check_targets(_OP, target, linear_weight.shape[0], ignore_index, may_wait=True)
    matrix, bias = linear_weight.double(), _double(linear_bias)
    options = (_double(weight), ignore_index, label_smoothing, softcap, logit_scale, need_stats)
    parts = [
        forward(input_part.double(), matrix, bias, targets, *options, "", num_classes)
        for input_part, targets, _ in _slices(input, target)
    ]
    losses, lse, *stats = (torch.cat(x) for x in zip(*parts, strict=True))
    if need_stats:
        stats = [x.view(target.shape) for x in stats]
    logprobs, entropy, predictions = stats
    return losses.view(target.shape), lse.view(target.shape), logprobs, entropy, predictions


def truth_gradients(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    z_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    need_stats: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    group: str,
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`gradients` in float64."""
    options = (ignore_index, label_smoothing, softcap, logit_scale)
    known = truth_forward(
        input, linear_weight, linear_bias, target, weight, *options, need_stats, group, num_classes
    )
    losses, lse, logprobs, entropy, predictions = known
    dlse = None if z_weight is None else 2 * z_weight.double() * lse
    shown = lse if need_stats or z_weight is not None else lse.new_empty(0)
    return losses, shown, logprobs, entropy, predictions, *truth_backward(
        torch.ones_like(losses), None, dlse, None,
        input, linear_weight, linear_bias, target, weight, lse, entropy, *options,
        need_input, need_weight, need_bias, group, num_classes,
    )  # fmt: skip


def truth_backward(
    dlosses: Tensor,
    dlogprobs: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    group: str,
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`backward` in float64, lse and entropy too."""
    linear_weight, linear_bias = whole(group, num_classes, linear_weight, linear_bias)
    check_targets(_OP, target, linear_weight.shape[0], ignore_index, may_wait=True)
    matrix, bias, weight = linear_weight.double(), _double(linear_bias), _double(weight)
    options = (ignore_index, label_smoothing, softcap, logit_scale)
    flat = dlosses.double().reshape(-1)
    stats = [None if x is None else x.double().reshape(-1) for x in (dlogprobs, dlse, dentropy)]
    dinput = input.new_zeros(input.shape if need_input else 0, dtype=torch.float64)
    dweight = input.new_zeros(linear_weight.shape if need_weight else 0, dtype=torch.float64)
    dbias = input.new_zeros(linear_weight.shape[0] if need_bias else 0, dtype=torch.float64)
    rows = dinput.view(-1, input.shape[-1]) if need_input else dinput
    for x, targets, part in _slices(input, target):
        x = x.double()
        need_entropy = dentropy is not None
        known = forward(x, matrix, bias, targets, weight, *options, need_entropy, "", num_classes)
        _, lse, _, entropy, _ = known
        dlogprobs, dlse, dentropy_part = (None if d is None else d[part] for d in stats)
        parts = backward(
            flat[part], dlogprobs, dlse, dentropy_part, x, matrix, bias, targets, weight,
            lse, entropy, *options, need_input, need_weight, need_bias, "", num_classes,
        )  # fmt: skip
        if need_input:
            rows[part] = parts[0]
        dweight += parts[1]
        dbias += parts[2]
    dweight, dbias = of_rank(group, num_classes, dweight, dbias)
    return dinput, dweight, dbias


def _double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


def _slices(input: Tensor, target: Tensor) -> Iterable[tuple[Tensor, Tensor, slice]]:
    """At least one, perhaps of no rows."""
    rows, targets = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    for start in range(0, max(1, len(targets)), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        yield rows[part], targets[part], part


plain_forward = forward


def plain_gradients(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    z_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    need_stats: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    group: str,
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients cast once to the dtype of the input, as they will be when they are returned."""
    *known, dinput, dweight, dbias = gradients(
        input, linear_weight, linear_bias, target, weight, z_weight,
        ignore_index, label_smoothing, softcap, logit_scale, need_stats,
        need_input, need_weight, need_bias, group, num_classes,
    )  # fmt: skip
    losses, lse, logprobs, entropy, predictions = known
    wide = _cast_once((dinput, dweight, dbias), input.dtype)
    return losses, lse, logprobs, entropy, predictions, *wide


def plain_backward(
    dlosses: Tensor,
    dlogprobs: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    input: Tensor,
    *args: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients cast once to the dtype of the input, as they will be when they are returned."""
    upstream = (dlosses, dlogprobs, dlse, dentropy)
    return _cast_once(backward(*upstream, input, *args), input.dtype)  # type: ignore[arg-type]


def _cast_once(gradients: Iterable[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    dinput, dweight, dbias = (gradient.to(dtype).to(gradient.dtype) for gradient in gradients)
    return dinput, dweight, dbias


def forward_refuses(*args: object) -> None:
    return None


gradients_refuses = forward_refuses
backward_refuses = forward_refuses
