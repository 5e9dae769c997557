"""Cross-entropy of a linear layer's logits, which are never held together."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops._autograd import once_differentiable
from fastlm.ops._checks import (
    PLAIN,
    check_dtype,
    check_integer,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
    check_that,
)
from fastlm.ops._define import define_op
from fastlm.ops.cross_entropy import check_loss_arguments, is_usual_loss

_OP = "linear_cross_entropy"
BACKENDS = {
    "triton": "fastlm.kernels.linear_cross_entropy",
    "torch": "fastlm.ops.eager.linear_cross_entropy",
    "reference": "fastlm.ops.reference.linear_cross_entropy",
}


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    shift: int = 0,
    num_items: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy between ``input @ linear_weight.T + linear_bias`` and class indices.

    Agrees with :func:`torch.nn.functional.cross_entropy` of :func:`torch.nn.functional.linear`,
    except that classes are in the last dimension and that the loss is float32 for low-precision
    inputs.  The ``(N, V)`` logits of the N positions are never held: chunks of rows are, in
    float32, and with ``"mean"`` and ``"sum"`` the forward pass turns each into its share of the
    gradients, summed in float32 (Hsu et al., 2024, https://arxiv.org/abs/2410.10989).  With
    ``"none"`` the backward pass computes the logits again.  Under autocast the inputs are cast as
    in ``F.linear``, and the gradients come in the dtype of the parameters, not rounded to the
    lower one.

    Args:
        input: ``(..., C)``; float32, bfloat16, float16 or float64.  Leading dimensions that do not
            merge into one are copied.
        linear_weight: ``(V, C)`` in the dtype of ``input``; may also be the embedding's.
        target: Class indices ``(...)`` in ``[0, V)`` or equal to ``ignore_index``; an integer
            dtype.
        linear_bias: ``(V,)`` in the dtype of ``input``.
        reduction: ``"mean"`` over positions that are not ignored, ``"sum"`` or ``"none"``.
        ignore_index: Positions with this target have loss 0 and gradient 0.
        shift: The target of position t is ``target[..., t + shift]``: 1 predicts the next token.
            The last ``shift`` positions predict nothing; they count as ignored, and with ``"none"``
            they are left out of the result.
        num_items: Divide the summed loss by this and not by the number of positions, as gradient
            accumulation over batches of different lengths needs; a positive int, or a tensor of
            one element, where 0 divides by 1.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        A scalar, or ``(...)`` with ``reduction="none"``; float32, float64 for float64 inputs.  The
        mean of no positions is NaN with zero gradient, as in torch; with ``num_items`` it is 0.

    Raises:
        ValueError: Shapes or devices do not match, a name is not known, or ``num_items`` is given
            together with ``reduction="none"``.
        TypeError: A dtype is not one of those above, or dtypes differ outside autocast.
        IndexError: A target is out of range and the torch or reference backend runs on CPU.  In a
            kernel the loss of that row becomes NaN instead, and with it the gradients it enters.
        NotImplementedError: ``backend`` cannot take these inputs; the message says why.
    """
    dtype = _check(input, linear_weight, target, linear_bias, reduction)
    check_integer(_OP, "ignore_index", ignore_index)
    target = target.long()
    if shift != 0:
        steps = target.shape[-1] if target.dim() > 0 else 0
        if not 0 <= shift <= steps:  # written out only then: a traced length stays symbolic
            check_that(_OP, "shift", False, f"be in [0, {steps}]", shift)
        target = F.pad(target[..., shift:], (0, shift), value=ignore_index)

    divisor = _divisor(num_items, target, reduction, ignore_index)
    differentiable = (
        input.requires_grad
        or linear_weight.requires_grad
        or (linear_bias is not None and linear_bias.requires_grad)
    )
    if not (torch.is_grad_enabled() and differentiable):
        cast = _cast(dtype, input, linear_weight, linear_bias)
        losses, _ = _forward(*cast, target, ignore_index, backend)
        return _reduced(losses, reduction, divisor, shift)
    options = (target, dtype, ignore_index, backend)
    if reduction == "none":
        losses = _PerPosition.apply(input, linear_weight, linear_bias, *options)
        return _reduced(losses, reduction, divisor, shift)
    # the gradients of no positions are zero, which 0 must not divide
    counts = num_items is None and isinstance(divisor, Tensor)
    safe_divisor = divisor.clamp(min=1) if counts else divisor
    return _Reduced.apply(input, linear_weight, linear_bias, *options, divisor, safe_divisor)


def _check(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, reduction: str
) -> torch.dtype:
    """Check all but numbers, and return the dtype to compute in."""
    if _is_usual(input, linear_weight, target, linear_bias, reduction):
        return input.dtype
    check_loss_arguments(_OP, "input", input, target, reduction)
    others = {"linear_weight": linear_weight}
    if linear_bias is not None:
        others["linear_bias"] = linear_bias
    dtype = _dtype_under_autocast(input)
    for name, tensor in others.items():
        check_tensor(_OP, name, tensor)
        check_dtype(_OP, name, tensor)
        check_same_device(_OP, name, tensor, "input", input)
        if _dtype_under_autocast(tensor) != dtype:
            check_same_dtype(_OP, name, tensor, "input", input)
    check_shape(_OP, "linear_weight", linear_weight, ("V", input.shape[-1]), "to match input")
    vocab_size = linear_weight.shape[0]
    check_that(_OP, "linear_weight", vocab_size > 0, "have at least one class", "V = 0")
    if linear_bias is not None:
        check_shape(_OP, "linear_bias", linear_bias, (vocab_size,), "to match linear_weight")
    return dtype


def _is_usual(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, reduction: str
) -> bool:
    """All of the checks in one look, without bias and autocast: one by one they take longer."""
    return (
        type(input) in PLAIN
        and type(linear_weight) in PLAIN
        and linear_bias is None
        and not torch._C._is_any_autocast_enabled()
        and is_usual_loss(input, target, reduction)
        and linear_weight.dim() == 2
        and linear_weight.shape[1] == input.shape[-1]
        and linear_weight.shape[0] > 0
        and linear_weight.dtype == input.dtype
        and linear_weight.device == input.device
        and linear_weight.layout == torch.strided
    )


def _dtype_under_autocast(tensor: Tensor) -> torch.dtype:
    """What ``F.linear`` would cast ``tensor`` to: autocast leaves float64 alone."""
    device_type = tensor.device.type
    if tensor.dtype == torch.float64 or tensor.is_meta:
        return tensor.dtype
    if not torch.is_autocast_enabled(device_type):
        return tensor.dtype
    return torch.get_autocast_dtype(device_type)


def _divisor(
    num_items: int | Tensor | None, target: Tensor, reduction: str, ignore_index: int
) -> int | Tensor | None:
    """What divides the summed loss."""
    if num_items is None:
        return (target != ignore_index).sum() if reduction == "mean" else None
    check_that(_OP, "num_items", reduction != "none", 'be None with reduction="none"', num_items)
    if isinstance(num_items, Tensor):
        shape = tuple(num_items.shape)
        check_that(_OP, "num_items", num_items.numel() == 1, "have one element", f"shape {shape}")
        # a batch of no items has a loss of 0, which anything but 0 divides
        num_items = num_items.detach().reshape(())
        num_items = torch.where(num_items > 0, num_items, 1)
    else:
        check_that(_OP, "num_items", num_items > 0, "be positive", num_items)
    return num_items


def _reduced(losses: Tensor, reduction: str, divisor: int | Tensor | None, shift: int) -> Tensor:
    if reduction == "none":
        return losses[..., : losses.shape[-1] - shift] if shift else losses
    total = losses.sum()
    if isinstance(divisor, Tensor) and divisor.is_floating_point():
        divisor = divisor.to(total.dtype)
    return total if divisor is None else total / divisor


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [x if x is None or x.dtype == dtype else x.to(dtype) for x in tensors]


class _Reduced(torch.autograd.Function):
    """The gradients of the summed loss are computed beside it; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        dtype: torch.dtype,
        ignore_index: int,
        backend: str,
        divisor: int | Tensor | None,
        safe_divisor: int | Tensor | None,
    ) -> Tensor:
        params = (input, linear_weight, linear_bias)
        losses, *gradients = _gradients(
            *_cast(dtype, *params), target, ignore_index, *ctx.needs_input_grad[:3], backend
        )
        ctx.dtypes = [None if x is None else x.dtype for x in params]
        by_tensor = isinstance(safe_divisor, Tensor)
        ctx.divisor = None if by_tensor else safe_divisor
        ctx.save_for_backward(*gradients, safe_divisor if by_tensor else None)
        return _reduced(losses, "sum", divisor, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, divisor = ctx.saved_tensors
        divisor = ctx.divisor if divisor is None else divisor
        scale = dloss if divisor is None else dloss / divisor
        # They are as large as the parameters, so they are scaled where they are, unless the graph
        # was kept for another backward pass or many gradients came in at once.
        kept = torch.compiler.is_compiling() or _graph_is_kept() or _is_batched(scale)
        needs = ctx.needs_input_grad[:3]
        gradients = [
            (gradient * scale if kept else gradient.mul_(scale)).to(dtype) if needed else None
            for gradient, dtype, needed in zip(gradients, ctx.dtypes, needs, strict=True)
        ]
        return *gradients, None, None, None, None, None, None


_graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph
_is_batched = torch._C._functorch.is_legacy_batchedtensor


class _PerPosition(torch.autograd.Function):
    """The incoming gradients differ by row, so the logits are computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        dtype: torch.dtype,
        ignore_index: int,
        backend: str,
    ) -> Tensor:
        params = (input, linear_weight, linear_bias)
        losses, lse = _forward(*_cast(dtype, *params), target, ignore_index, backend)
        ctx.save_for_backward(*params, target, lse)
        ctx.dtype, ctx.ignore_index, ctx.backend = dtype, ignore_index, backend
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        *params, target, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        gradients = _backward(
            dlosses, *_cast(ctx.dtype, *params), target, lse, ctx.ignore_index, *needs, ctx.backend
        )
        gradients = [
            gradient.to(param.dtype) if needed else None
            for gradient, param, needed in zip(gradients, params, needs, strict=True)
        ]
        return *gradients, None, None, None, None


def _forward_fake(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    losses = input.new_empty(target.shape, dtype=torch.promote_types(input.dtype, torch.float32))
    return losses, torch.empty_like(losses)


def _gradients_fake(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    losses, lse = _forward_fake(input, linear_weight, linear_bias, target, ignore_index)
    return losses, *_backward_fake(
        losses, input, linear_weight, linear_bias, target, lse, ignore_index,
        need_input, need_weight, need_bias,
    )  # fmt: skip


def _backward_fake(
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
    return (
        lse.new_empty(input.shape if need_input else 0),
        lse.new_empty(linear_weight.shape if need_weight else 0),
        lse.new_empty(linear_weight.shape[0] if need_bias else 0),
    )


_forward = define_op(_OP, "forward", BACKENDS, fake=_forward_fake)
_gradients = define_op(_OP, "gradients", BACKENDS, fake=_gradients_fake)
_backward = define_op(_OP, "backward", BACKENDS, fake=_backward_fake)
