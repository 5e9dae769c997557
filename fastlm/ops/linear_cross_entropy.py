"""Cross-entropy of a linear layer's logits, which are never held together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from fastlm.ops._checks import check_integer, check_that, is_distributed
from fastlm.ops._linear import check_linear_loss, shifted
from fastlm.ops._linear_loss import BACKENDS, Reduced, needs_gradient, per_position
from fastlm.ops._shards import sharded_loss
from fastlm.ops.cross_entropy import (
    LossStats,
    LossSums,
    check_class_weight,
    check_loss_options,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["BACKENDS", "linear_cross_entropy"]

_OP = "linear_cross_entropy"


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    shift: int = 0,
    num_items: int | Tensor | None = None,
    return_stats: Literal[False] = False,
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor: ...


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    shift: int = 0,
    num_items: int | Tensor | None = None,
    return_stats: Literal[True],
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> tuple[Tensor, LossStats]: ...


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    shift: int = 0,
    num_items: int | Tensor | None = None,
    return_stats: bool = False,
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    """Cross-entropy between the logits of a linear layer and class indices.

    The logits, ``input @ linear_weight.T + linear_bias``, then scaled and capped, are never held
    together, ``(N, V)`` for N positions: chunks of rows are, in float32, and with ``"mean"`` and
    ``"sum"`` the forward pass turns each into its share of the gradients, summed in float32 (Hsu et
    al., 2024, https://arxiv.org/abs/2410.10989).  With ``"none"``, or where the statistics have a
    gradient, the backward pass computes the logits again.  Agrees with
    :func:`torch.nn.functional.cross_entropy` of :func:`torch.nn.functional.linear`, except that
    classes are in the last dimension and that the loss is float32 for low-precision inputs.  Under
    autocast the inputs are cast as in ``F.linear``, and the gradients come in the dtype of the
    parameters, not rounded to the lower one.

    The classes may be split over processes, each of which holds and multiplies its share alone
    (Shoeybi et al., 2019, https://arxiv.org/abs/1909.08053, section 3): with ``process_group``, or
    where ``linear_weight`` is a DTensor with the placement ``Shard(0)`` over a mesh of one
    dimension.  Every rank then makes the same call, with the same ``input``, ``target`` and class
    ``weight``, and gets what the call on one process would return: the loss, the statistics, and
    the gradients of ``input`` and of its own classes.

    Args:
        input: ``(..., C)``; float32, bfloat16, float16 or float64.  Leading dimensions that do not
            merge into one are copied.
        linear_weight: ``(V, C)`` in the dtype of ``input``; may also be the embedding's.  With
            ``process_group``, ``(V / ranks, C)``: rank r's from class r V / ranks.
        target: Class indices ``(...)`` in ``[0, V)`` or equal to ``ignore_index``; an integer
            dtype.
        linear_bias: ``(V,)`` in the dtype of ``input``; split as ``linear_weight`` is.
        weight: ``(V,)``, any float dtype, without gradient: the factor of the loss of each class.
        reduction: ``"mean"`` over positions that are not ignored, each counting as much as the
            weight of its target; ``"sum"`` or ``"none"``.
        ignore_index: Positions with this target have loss 0 and gradient 0.
        label_smoothing: From 0 to 1, as in :func:`cross_entropy`.
        softcap: Positive, as in :func:`cross_entropy`.
        logit_scale: Factor of the logits, bias included.
        z_loss: Adds ``z_loss * lse**2``, as in :func:`cross_entropy`.
        shift: The target of position t is ``target[..., t + shift]``: 1 predicts the next token.
            The last ``shift`` positions predict nothing; they count as ignored, and with ``"none"``
            they are left out of the result.
        num_items: Divide the summed loss by this and not by the number of positions, as gradient
            accumulation over batches of different lengths needs; a positive int, or a tensor of
            one element, where 0 divides by 1.
        return_stats: Also return :class:`LossStats`, of all positions, whatever ``shift``.
        process_group: The processes that ``linear_weight`` is split over.  None takes a DTensor's
            from its mesh; V need not divide by the number of ranks there.
        backend: ``"auto"``, ``"triton"``, ``"cuda"``, ``"torch"`` or ``"reference"``.

    Returns:
        A scalar, or ``(...)`` with ``reduction="none"``; float32, float64 for float64 inputs.  The
        mean of no positions is NaN with zero gradient, as in torch; with ``num_items`` it is 0.
        With ``return_stats`` a pair of this and the statistics.

    Raises:
        ValueError: Shapes or devices do not match, a number is out of range, a name is not known,
            ``num_items`` is given together with ``reduction="none"``, or a DTensor is placed
            otherwise.  On CPU, outside ``torch.compile``, also on every rank where ranks differ in
            the size, width or need of a gradient of ``input``, in ``target``, ``linear_bias`` or
            the number of their classes.  Elsewhere other targets or classes make the loss NaN;
            other sizes are an error, or a wait, of the collectives.
        TypeError: A dtype is not one of those above, dtypes differ outside autocast, or
            ``process_group`` is not one of this process.
        IndexError: A target is out of range and the torch or reference backend runs on CPU.  In a
            kernel the loss of that row becomes NaN instead, and with it the gradients it enters.
        NotImplementedError: ``backend`` cannot take these inputs; the message says why.
    """
    check_loss_options(_OP, reduction, ignore_index, label_smoothing, softcap, logit_scale, z_loss)
    check_integer(_OP, "shift", shift)
    if num_items is not None:
        num_items = _check_num_items(num_items, reduction)
    group = ""
    if process_group is not None or is_distributed(linear_weight):
        input, linear_weight, linear_bias, target, weight, group, vocab_size = sharded_loss(
            _OP, input, linear_weight, linear_bias, target, weight, process_group
        )
    dtype = check_linear_loss(_OP, input, linear_weight, target, linear_bias, group)
    if not group:
        vocab_size = linear_weight.shape[0]
    target = shifted(_OP, target.long(), shift, ignore_index)
    if weight is not None:
        check_class_weight(_OP, weight, input, vocab_size)
        weight = weight.detach().to(torch.promote_types(dtype, torch.float32))

    sums = LossSums(target, weight, ignore_index, vocab_size, num_items)
    params = (input, linear_weight, linear_bias)
    options = (ignore_index, label_smoothing, softcap, logit_scale, return_stats)
    needs = needs_gradient(*params)
    # what a compiler hands to statistics, if only zeros, makes gradients prepared here worthless
    zeros_come = return_stats and torch.compiler.is_compiling()
    if needs and reduction != "none" and not zeros_come:
        divisor, squares_divisor = sums.divisors(reduction)
        if squares_divisor is divisor:
            squares_divisor = None  # the compiler takes no tensor twice
        divisors = (divisor, squares_divisor)
        loss, lse, *stats, _ = Reduced.apply(
            *params, target, weight, *options, z_loss, *divisors, group, vocab_size, dtype, backend
        )
    else:
        losses, lse, *stats = per_position(
            needs, *params, target, weight, *options, group, vocab_size, dtype, backend
        )
        loss = sums.reduce(losses, lse, reduction, z_loss)
    if reduction == "none" and shift:
        loss = loss[..., : loss.shape[-1] - shift]
    if not return_stats:
        return loss
    logprobs, entropy, predictions = stats
    return loss, LossStats(logprobs, lse, entropy, predictions, sums.count())


def _check_num_items(num_items: int | Tensor, reduction: str) -> int | Tensor:
    check_that(_OP, "num_items", reduction != "none", 'be None with reduction="none"', num_items)
    if isinstance(num_items, Tensor):
        shape = tuple(num_items.shape)
        check_that(_OP, "num_items", num_items.numel() == 1, "have one element", f"shape {shape}")
        # a batch of no items has a loss of 0, which anything but 0 divides
        num_items = num_items.detach().reshape(())
        return torch.where(num_items <= 0, 1, num_items)
    check_integer(_OP, "num_items", num_items)
    check_that(_OP, "num_items", num_items > 0, "be positive", num_items)
    return num_items
