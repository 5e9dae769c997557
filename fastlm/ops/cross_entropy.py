"""Softmax cross-entropy over a large vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.ops._autograd import once_differentiable
from fastlm.ops._checks import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    PLAIN,
    check_choice,
    check_dtype,
    check_integer,
    check_same_device,
    check_shape,
    check_tensor,
    check_that,
)
from fastlm.ops._define import define_op

REDUCTIONS = ("mean", "sum", "none")
BACKENDS = {
    "triton": "fastlm.kernels.cross_entropy",
    "torch": "fastlm.ops.eager.cross_entropy",
    "reference": "fastlm.ops.reference.cross_entropy",
}


def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy between logits and class indices, without storing probabilities.

    Agrees with :func:`torch.nn.functional.cross_entropy`, except that classes are in the last
    dimension and that the loss is float32 for low-precision logits.  Reads the logits once going
    forward (Milakov and Gimelshein, 2018, https://arxiv.org/abs/1805.02867, algorithm 3) and leaves
    them unchanged.  The triton backend never copies them, whatever their strides; the torch backend
    does where leading dimensions do not merge into one.

    Args:
        input: Logits ``(..., V)``; float32, bfloat16, float16 or float64.
        target: Class indices ``(...)`` in ``[0, V)`` or equal to ``ignore_index``; any integer
            dtype but uint64.
        ignore_index: Positions with this target have loss 0 and gradient 0.
        reduction: ``"mean"`` over positions that are not ignored, ``"sum"`` or ``"none"``.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        A scalar, or ``(...)`` with ``reduction="none"``; float32, float64 for float64 logits.  The
        mean of no positions is NaN with zero gradient, as in torch.

    Raises:
        ValueError: Shapes or devices do not match, or a name is not known.
        TypeError: A dtype is not one of those above.
        IndexError: A target is out of range and the torch or reference backend runs on CPU.  In a
            kernel the loss and the gradient of that row become NaN instead, and nothing else.
        NotImplementedError: ``backend`` cannot take these inputs; the message says why.
    """
    check_loss_arguments("cross_entropy", "input", input, target, reduction)
    check_integer("cross_entropy", "ignore_index", ignore_index)
    check_that("cross_entropy", "input", input.shape[-1] > 0, "have at least one class", "V = 0")
    target = target.long()
    losses = _losses(input, target, ignore_index, backend)
    return reduce_losses(losses, target, ignore_index, reduction)


def check_loss_arguments(op: str, name: str, input: Tensor, target: Tensor, reduction: str) -> None:
    """The checks that every loss shares."""
    if is_usual_loss(input, target, reduction):
        return
    check_tensor(op, name, input)
    check_tensor(op, "target", target)
    check_dtype(op, name, input)
    check_dtype(op, "target", target, INDEX_DTYPES)
    check_that(op, name, input.dim() > 0, "have at least one dimension", "a scalar")
    check_shape(op, "target", target, input.shape[:-1], f"to match {name}")
    check_same_device(op, "target", target, name, input)
    check_choice(op, "reduction", reduction, REDUCTIONS)


def is_usual_loss(input: Tensor, target: Tensor, reduction: str) -> bool:
    """All of the checks in one look: one by one they take longer."""
    return (
        type(input) in PLAIN
        and type(target) is Tensor
        and input.dim() > 0
        and target.shape == input.shape[:-1]
        and input.dtype in FLOAT_DTYPES
        and target.dtype in INDEX_DTYPES
        and target.device == input.device
        and input.layout == target.layout == torch.strided
        and reduction in REDUCTIONS
    )


def reduce_losses(losses: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (target != ignore_index).sum()


def _losses(input: Tensor, target: Tensor, ignore_index: int, backend: str) -> Tensor:
    if torch.is_grad_enabled() and input.requires_grad:
        return _CrossEntropy.apply(input, target, ignore_index, backend)
    return _forward(input, target, ignore_index, backend)[0]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, ignore_index: int, backend: str) -> Tensor:
        losses, maximum, log_sum = _forward(input, target, ignore_index, backend)
        ctx.save_for_backward(input, target, maximum, log_sum)
        ctx.ignore_index, ctx.backend = ignore_index, backend
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor, None, None, None]:
        dinput = _backward(dlosses, *ctx.saved_tensors, ctx.ignore_index, ctx.backend)
        return dinput, None, None, None


def _forward_fake(
    input: Tensor, target: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(input.dtype, torch.float32)
    losses = input.new_empty(target.shape, dtype=dtype)
    return losses, torch.empty_like(losses), torch.empty_like(losses)


def _backward_fake(
    dlosses: Tensor,
    input: Tensor,
    target: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    ignore_index: int,
) -> Tensor:
    return input.new_empty(input.shape)


_forward = define_op("cross_entropy", "forward", BACKENDS, fake=_forward_fake)
_backward = define_op("cross_entropy", "backward", BACKENDS, fake=_backward_fake)
