"""Cross-entropy of a linear layer's logits, which are never held together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops._autograd import once_differentiable
from fastlm.ops._checks import PLAIN, check_integer, check_that
from fastlm.ops._define import define_op
from fastlm.ops._linear import cast_to, check_linear
from fastlm.ops._shards import is_distributed, sharded_call
from fastlm.ops.cross_entropy import (
    LossStats,
    LossSums,
    check_loss_arguments,
    check_loss_options,
    is_usual_loss,
    over,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_OP = "linear_cross_entropy"
BACKENDS = {
    "triton": "fastlm.kernels.linear_cross_entropy",
    "torch": "fastlm.ops.eager.linear_cross_entropy",
    "reference": "fastlm.ops.reference.linear_cross_entropy",
}


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
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

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
    group = ""
    if process_group is not None or is_distributed(linear_weight):
        input, linear_weight, linear_bias, target, weight, group, vocab_size = sharded_call(
            _OP, input, linear_weight, linear_bias, target, weight, process_group
        )
    dtype = _check(_OP, input, linear_weight, target, linear_bias, reduction, group)
    if not group:
        vocab_size = linear_weight.shape[0]
    check_loss_options(
        _OP, input, vocab_size, weight, ignore_index, label_smoothing, softcap, logit_scale, z_loss
    )
    if num_items is not None:
        num_items = _check_num_items(num_items, reduction)
    target = _shifted(_OP, target.long(), shift, ignore_index)
    if weight is not None:
        weight = weight.detach().to(torch.promote_types(dtype, torch.float32))

    sums = LossSums(target, weight, ignore_index, vocab_size, num_items)
    params = (input, linear_weight, linear_bias)
    options = (ignore_index, label_smoothing, softcap, logit_scale, return_stats)
    needs_gradient = _needs_gradient(*params)
    if needs_gradient and reduction != "none":
        divisor, squares_divisor = sums.divisors(reduction)
        if squares_divisor is divisor:
            squares_divisor = None  # the compiler takes no tensor twice
        divisors = (divisor, squares_divisor)
        loss, lse, *stats = _Reduced.apply(
            *params, target, weight, *options, z_loss, *divisors, group, vocab_size, dtype, backend
        )
    else:
        losses, lse, *stats = _per_position(
            needs_gradient, *params, target, weight, *options, group, vocab_size, dtype, backend
        )
        loss = sums.reduce(losses, lse, reduction, z_loss)
    if reduction == "none" and shift:
        loss = loss[..., : loss.shape[-1] - shift]
    if not return_stats:
        return loss
    logprobs, entropy, predictions = stats
    return loss, LossStats(logprobs, lse, entropy, predictions, sums.count())


def linear_logprobs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shift: int = 0,
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """The log-probability of each target under the logits of a linear layer; differentiable.

    As ``reduction="none"`` of :func:`linear_cross_entropy`, whose arguments these are, with the
    other sign: for the policies of reinforcement learning and preference losses.

    Returns:
        ``(...)``, with ``shift`` without the last positions; float32, float64 for float64 inputs;
        zero where the target is ignored.

    Raises:
        The errors of :func:`linear_cross_entropy`.
    """
    op, group = "linear_logprobs", ""
    if process_group is not None or is_distributed(linear_weight):
        input, linear_weight, linear_bias, target, _, group, vocab_size = sharded_call(
            op, input, linear_weight, linear_bias, target, None, process_group
        )
    dtype = _check(op, input, linear_weight, target, linear_bias, "none", group)
    if not group:
        vocab_size = linear_weight.shape[0]
    check_loss_options(op, input, vocab_size, None, ignore_index, 0.0, softcap, logit_scale, 0.0)
    target = _shifted(op, target.long(), shift, ignore_index)
    params = (input, linear_weight, linear_bias)
    options = (ignore_index, 0.0, softcap, logit_scale, False)
    try:
        losses, *_ = _per_position(
            _needs_gradient(*params), *params, target, None, *options, group, vocab_size,
            dtype, backend,
        )  # fmt: skip
    except (IndexError, NotImplementedError, ValueError) as error:
        # the operator is the other function's
        raise type(error)(str(error).replace(_OP, op)) from error
    if shift:
        losses = losses[..., : losses.shape[-1] - shift]
    return -losses


def _needs_gradient(*params: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in params)


def _shifted(op: str, target: Tensor, shift: int, ignore_index: int) -> Tensor:
    """The target of each position; the last ``shift`` have none."""
    check_integer(op, "shift", shift)
    if shift == 0:
        return target
    steps = target.shape[-1] if target.dim() > 0 else 0
    if not 0 <= shift <= steps:  # written out only then: a traced length stays symbolic
        check_that(op, "shift", False, f"be in [0, {steps}]", shift)
    return F.pad(target[..., shift:], (0, shift), value=ignore_index)


def _check(
    op: str,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    reduction: str,
    group: str,
) -> torch.dtype:
    """Check the tensors, and return the dtype to compute in."""
    if _is_usual(input, linear_weight, target, linear_bias, reduction):
        return input.dtype
    check_loss_arguments(op, "input", input, target, reduction)
    return check_linear(op, input, linear_weight, linear_bias, may_be_empty=group != "")


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


def _per_position(needs_gradient: bool, *args: Any) -> Any:
    """Losses and statistics; ``args`` are those of :meth:`_PerPosition.forward`."""
    if needs_gradient:
        return _PerPosition.apply(*args)
    *params, dtype, backend = args
    return _forward(*cast_to(dtype, *params[:3]), *params[3:], backend)


class _Reduced(torch.autograd.Function):
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
        again = (*params, target, weight, lse, entropy) if need_stats else ()
        ctx.save_for_backward(*gradients, divisor, squares_divisor, *again)
        ctx.options, ctx.z_loss, ctx.dtype, ctx.backend = options, z_loss, dtype, backend
        ctx.shard = (group, num_classes)
        ctx.dtypes = [None if x is None else x.dtype for x in params]
        ctx.set_materialize_grads(False)
        total = over(losses.sum(), divisor)
        squares_divisor = divisor if squares_divisor is None else squares_divisor
        if z_loss != 0.0:
            total = total + z_loss * over(lse.square().sum(), squares_divisor)
        if not need_stats:
            # a compiler would hand gradients of zeros to what nobody asked for
            return total, None, None, None, None
        ctx.mark_non_differentiable(predictions)
        return total, lse, logprobs, entropy, predictions

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        dloss: Tensor | None,
        dlse: Tensor | None,
        dlogprobs: Tensor | None,
        dentropy: Tensor | None,
        dpredictions: None,
    ) -> tuple[Tensor | None, ...]:
        dinput, dweight, dbias, divisor, squares_divisor, *again = ctx.saved_tensors
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
