"""Cross-entropy of a linear layer's logits for autograd: its operators, and what backward keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.ops._autograd import once_differentiable, tie
from fastlm.ops._define import define_op
from fastlm.ops._linear import cast_to
from fastlm.ops.cross_entropy import over, summed

_OP = "linear_cross_entropy"
BACKENDS = {
    "triton": "fastlm.kernels.linear_cross_entropy",
    "cuda": "fastlm.ops.cuda.linear_cross_entropy",
    "torch": "fastlm.ops.eager.linear_cross_entropy",
    "reference": "fastlm.ops.reference.linear_cross_entropy",
}


def needs_gradient(*params: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in params)


def per_position(needs: bool, *args: Any) -> Any:
    """Losses and statistics; ``args`` are those of :meth:`_PerPosition.forward`."""
    if needs:
        return _PerPosition.apply(*args)
    *params, dtype, backend = args
    return _forward(*cast_to(dtype, *params[:3]), *params[3:], backend)


class Reduced(torch.autograd.Function):
    """The gradients of the summed loss are computed beside it; backward scales them.

    Only where a statistic has a gradient too, everything is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
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
        z_loss: float,
        divisor: Tensor | None,
        squares_divisor: Tensor | None,  # of the z-loss, where it is another
        group: str,
        num_classes: int,
        dtype: torch.dtype,
        backend: str,
    ) -> tuple[Tensor | None, ...]:
        params = (input, linear_weight, linear_bias)
        options = (ignore_index, label_smoothing, softcap, logit_scale)
        z_weight = None
        if z_loss != 0.0:
            z_weight = input.new_full((), z_loss, dtype=torch.promote_types(dtype, torch.float32))
            if divisor is not None and squares_divisor is not None:
                # of the summed losses, whose gradients are divided by the other
                z_weight = z_weight * over(divisor, _safe(squares_divisor, squares_divisor))
        losses, lse, logprobs, entropy, predictions, *gradients = _gradients(
            *cast_to(dtype, *params), target, weight, z_weight, *options, need_stats,
            *ctx.needs_input_grad[:3], group, num_classes, backend,
        )  # fmt: skip
        tied = None if need_stats else tie(losses)
        again = (*params, target, weight, lse, entropy) if need_stats else ()
        ctx.save_for_backward(*gradients, divisor, squares_divisor, tied, *again)
        ctx.options, ctx.z_loss, ctx.dtype, ctx.backend = options, z_loss, dtype, backend
        ctx.shard = (group, num_classes)
        ctx.dtypes = [None if x is None else x.dtype for x in params]
        ctx.set_materialize_grads(False)
        total = over(summed(losses), divisor)
        squares_divisor = divisor if squares_divisor is None else squares_divisor
        if z_loss != 0.0:
            total = total + z_loss * over(summed(lse.square()), squares_divisor)
        if not need_stats:
            # a compiler would hand gradients of zeros to what nobody asked for
            return total, None, None, None, None, tied
        ctx.mark_non_differentiable(predictions)
        return total, lse, logprobs, entropy, predictions, None

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        dloss: Tensor | None,
        dlse: Tensor | None,
        dlogprobs: Tensor | None,
        dentropy: Tensor | None,
        dpredictions: None,
        dtied: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        dinput, dweight, dbias, divisor, squares_divisor, _, *again = ctx.saved_tensors
        count = divisor if squares_divisor is None else squares_divisor
        if divisor is not None and count is not None:
            divisor, squares_divisor = _safe(divisor, count), _safe(count, count)
        needs = ctx.needs_input_grad[:3]
        if dlse is not None or dlogprobs is not None or dentropy is not None:
            *params, target, weight, lse, entropy = again
            dlosses = torch.zeros_like(lse)
            if dloss is not None:
                dlosses = over(dloss, divisor).expand(lse.shape)
                if ctx.z_loss != 0.0:
                    of_squares = 2 * ctx.z_loss * over(dloss, squares_divisor) * lse
                    dlse = of_squares if dlse is None else dlse + of_squares
            gradients = _backward(
                dlosses, dlogprobs, dlse, dentropy, *cast_to(ctx.dtype, *params),
                target, weight, lse, entropy, *ctx.options, *needs, *ctx.shard, ctx.backend,
            )  # fmt: skip
        elif dloss is not None:
            scale = over(dloss, divisor)
            # They are as large as the parameters, so they are scaled where they are, unless the
            # graph was kept for another backward pass or many gradients came in at once.
            kept = torch.compiler.is_compiling() or _graph_is_kept() or _is_batched(scale)
            gradients = (x * scale if kept else x.mul_(scale) for x in (dinput, dweight, dbias))
        else:
            gradients = (None, None, None)
            needs = (False, False, False)
        wanted = [
            gradient.to(dtype) if needed else None
            for gradient, dtype, needed in zip(gradients, ctx.dtypes, needs, strict=True)
        ]
        return *wanted, *[None] * 14


_graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def _safe(divisor: Tensor, count: Tensor) -> Tensor:
    """The gradient of a mean over nothing is zero; over weights of zero, as in torch, NaN."""
    return divisor.masked_fill(count == 0, 1)


class _PerPosition(torch.autograd.Function):
    """The incoming gradients differ by row, so the logits are computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
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
        dtype: torch.dtype,
        backend: str,
    ) -> tuple[Tensor | None, ...]:
        params = (input, linear_weight, linear_bias)
        options, shard = (ignore_index, label_smoothing, softcap, logit_scale), (group, num_classes)
        losses, lse, logprobs, entropy, predictions = _forward(
            *cast_to(dtype, *params), target, weight, *options, need_stats, *shard, backend
        )
        ctx.save_for_backward(*params, target, weight, lse, entropy)
        ctx.options, ctx.shard, ctx.dtype, ctx.backend = options, shard, dtype, backend
        ctx.set_materialize_grads(False)
        if not need_stats:
            return losses, lse, None, None, None
        ctx.mark_non_differentiable(predictions)
        return losses, lse, logprobs, entropy, predictions

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        dlosses: Tensor | None,
        dlse: Tensor | None,
        dlogprobs: Tensor | None,
        dentropy: Tensor | None,
        dpredictions: None,
    ) -> tuple[Tensor | None, ...]:
        *params, target, weight, lse, entropy = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        dlosses = torch.zeros_like(lse) if dlosses is None else dlosses
        gradients = _backward(
            dlosses, dlogprobs, dlse, dentropy, *cast_to(ctx.dtype, *params),
            target, weight, lse, entropy, *ctx.options, *needs, *ctx.shard, ctx.backend,
        )  # fmt: skip
        gradients = [
            gradient.to(param.dtype) if needed else None
            for gradient, param, needed in zip(gradients, params, needs, strict=True)
        ]
        return *gradients, *[None] * 11


def _forward_fake(
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
    losses = input.new_empty(target.shape, dtype=torch.promote_types(input.dtype, torch.float32))
    logprobs = losses.new_empty(target.shape if need_stats else 0)
    predictions = torch.empty_like(logprobs, dtype=torch.int64)
    return losses, torch.empty_like(losses), logprobs, torch.empty_like(logprobs), predictions


def _gradients_fake(
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
    options = (ignore_index, label_smoothing, softcap, logit_scale)
    known = _forward_fake(
        input, linear_weight, linear_bias, target, weight, *options, need_stats, group, num_classes
    )
    losses, lse, logprobs, entropy, predictions = known
    shown = lse if need_stats or z_weight is not None else lse.new_empty(0)
    return losses, shown, logprobs, entropy, predictions, *_backward_fake(
        losses, None, None, None, input, linear_weight, linear_bias, target, weight, lse, entropy,
        *options, need_input, need_weight, need_bias, group, num_classes,
    )  # fmt: skip


def _backward_fake(
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
    return (
        lse.new_empty(input.shape if need_input else 0),
        lse.new_empty(linear_weight.shape if need_weight else 0),
        lse.new_empty(linear_weight.shape[0] if need_bias else 0),
    )


_forward = define_op(_OP, "forward", BACKENDS, fake=_forward_fake)
_gradients = define_op(_OP, "gradients", BACKENDS, fake=_gradients_fake)
_backward = define_op(_OP, "backward", BACKENDS, fake=_backward_fake)
