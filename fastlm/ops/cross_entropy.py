"""Softmax cross-entropy over a large vocabulary."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, overload

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
    check_real,
    check_same_device,
    check_shape,
    check_tensor,
    check_that,
)
from fastlm.ops._define import define_op
from fastlm.ops.reference.cross_entropy import classify

REDUCTIONS = ("mean", "sum", "none")
BACKENDS = {
    "triton": "fastlm.kernels.cross_entropy",
    "cuda": "fastlm.ops.cuda.cross_entropy",
    "torch": "fastlm.ops.eager.cross_entropy",
    "reference": "fastlm.ops.reference.cross_entropy",
}


class LossStats(NamedTuple):
    """What is known of each position beside its loss; zero, and -1, where the target is ignored.

    Attributes:
        logprobs: ``(...)`` log-probability of the target; differentiable, like the next two.
        lse: ``(...)`` log-sum-exp of the logits, after scale and cap.
        entropy: ``(...)`` entropy of the distribution, in nats.
        predictions: ``(...)`` int64, the most likely class, the first of equals; any class where a
            logit is NaN.
        num_items: How many positions are not ignored, an int64 scalar on the device.
    """

    logprobs: Tensor
    lse: Tensor
    entropy: Tensor
    predictions: Tensor
    num_items: Tensor


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    return_stats: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    return_stats: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, LossStats]: ...


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    """Cross-entropy between logits and class indices, without storing probabilities.

    Agrees with :func:`torch.nn.functional.cross_entropy`, except that classes are in the last
    dimension and that the loss is float32 for low-precision logits.  Reads the logits once going
    forward, statistics included (Milakov and Gimelshein, 2018, https://arxiv.org/abs/1805.02867,
    algorithm 3), and leaves them unchanged.  The kernels never copy them, whatever their strides;
    the torch backend does where leading dimensions do not merge into one.

    Args:
        input: Logits ``(..., V)``; float32, bfloat16, float16 or float64.
        target: Class indices ``(...)`` in ``[0, V)`` or equal to ``ignore_index``; any integer
            dtype but uint64.
        weight: ``(V,)``, any float dtype, without gradient: the factor of the loss of each class.
        ignore_index: Positions with this target have loss 0 and gradient 0.
        reduction: ``"mean"`` over positions that are not ignored, each counting as much as the
            weight of its target; ``"sum"`` or ``"none"``.
        label_smoothing: From 0 to 1, the part of the loss that is its mean over all classes
            (Szegedy et al., 2015, https://arxiv.org/abs/1512.00567).
        softcap: Positive c: logits become ``c tanh(logits / c)``, after scaling (Gemma 2, 2024,
            https://arxiv.org/abs/2408.00118).
        logit_scale: Factor of the logits.
        z_loss: Adds ``z_loss * lse**2`` at each position that is not ignored, whatever the class
            weights; with ``"mean"``, averaged over those positions (PaLM, 2022,
            https://arxiv.org/abs/2204.02311).
        return_stats: Also return :class:`LossStats`.
        backend: ``"auto"``, ``"triton"``, ``"cuda"``, ``"torch"`` or ``"reference"``.

    Returns:
        A scalar, or ``(...)`` with ``reduction="none"``; float32, float64 for float64 logits.  The
        mean of no positions is NaN with zero gradient, as in torch.  With ``return_stats`` a pair
        of this and the statistics.

    Raises:
        ValueError: Shapes or devices do not match, a number is out of range, or a name is not
            known.
        TypeError: A dtype is not one of those above.
        IndexError: A target is out of range and the torch or reference backend runs on CPU.  In a
            kernel the loss and the gradient of that row become NaN instead, and nothing else.
        NotImplementedError: ``backend`` cannot take these inputs; the message says why.
    """
    op = "cross_entropy"
    check_loss_options(op, reduction, ignore_index, label_smoothing, softcap, logit_scale, z_loss)
    check_loss_arguments(op, "input", input, target)
    vocab_size = input.shape[-1]
    check_that(op, "input", vocab_size > 0, "have at least one class", "V = 0")
    if weight is not None:
        check_class_weight(op, weight, input, vocab_size)
    target = target.long()
    if weight is not None:
        weight = weight.to(torch.promote_types(input.dtype, torch.float32))
    need_lse = return_stats or z_loss != 0.0
    options = (weight, ignore_index, label_smoothing, softcap, logit_scale, return_stats)
    if torch.is_grad_enabled() and input.requires_grad:
        losses, lse, *stats = _CrossEntropy.apply(input, target, *options, need_lse, backend)
    else:
        losses, maximum, log_sum, *stats = _forward(input, target, *options, backend)
        lse = _lse(maximum, log_sum, target, ignore_index) if need_lse else None
    sums = LossSums(target, weight, ignore_index, vocab_size)
    loss = sums.reduce(losses, lse, reduction, z_loss)
    if not return_stats:
        return loss
    logprobs, entropy, predictions = stats
    return loss, LossStats(logprobs, lse, entropy, predictions, sums.count())


def check_loss_arguments(op: str, name: str, input: Tensor, target: Tensor) -> None:
    """The checks of tensors that every loss shares."""
    if is_usual_loss(input, target):
        return
    check_tensor(op, name, input)
    check_tensor(op, "target", target)
    check_dtype(op, name, input)
    check_dtype(op, "target", target, INDEX_DTYPES)
    check_that(op, name, input.dim() > 0, "have at least one dimension", "a scalar")
    check_shape(op, "target", target, input.shape[:-1], f"to match {name}")
    check_same_device(op, "target", target, name, input)


def is_usual_loss(input: Tensor, target: Tensor) -> bool:
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
    )


def check_loss_options(
    op: str,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    z_loss: float,
) -> None:
    """The checks of what every loss can be told, but for class weights."""
    check_choice(op, "reduction", reduction, REDUCTIONS)
    check_integer(op, "ignore_index", ignore_index)
    fits = -(2**63) <= ignore_index < 2**63
    check_that(op, "ignore_index", fits, "be in [-2**63, 2**63)", ignore_index)
    check_real(op, "label_smoothing", label_smoothing)
    fits = 0.0 <= label_smoothing <= 1.0
    check_that(op, "label_smoothing", fits, "be in [0, 1]", label_smoothing)
    check_transform(op, softcap, logit_scale)
    check_real(op, "z_loss", z_loss)
    check_that(op, "z_loss", 0.0 <= z_loss < math.inf, "be at least 0", z_loss)


def check_class_weight(op: str, weight: Tensor, input: Tensor, vocab_size: int) -> None:
    check_tensor(op, "weight", weight)
    check_dtype(op, "weight", weight)
    check_shape(op, "weight", weight, (vocab_size,), "to match the classes")
    check_same_device(op, "weight", weight, "input", input)
    needs = torch.is_grad_enabled() and weight.requires_grad
    check_that(op, "weight", not needs, "not require a gradient", "one that does")


def check_transform(op: str, softcap: float | None, logit_scale: float) -> None:
    """The checks of what is done to logits."""
    if softcap is not None:
        check_real(op, "softcap", softcap)
        check_that(op, "softcap", 0.0 < softcap < math.inf, "be positive, or None", softcap)
    check_real(op, "logit_scale", logit_scale)
    check_that(op, "logit_scale", abs(logit_scale) < math.inf, "be finite", logit_scale)


class LossSums:
    """Reductions of per-position losses; what divides them is counted on the device."""

    def __init__(
        self,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        vocab_size: int,
        num_items: int | Tensor | None = None,
    ) -> None:
        self._target, self._weight = target, weight
        self._ignore_index, self._vocab_size = ignore_index, vocab_size
        self._num_items = num_items

    def count(self) -> Tensor:
        """How many positions are not ignored."""
        return (self._target != self._ignore_index).sum()

    def divisors(self, reduction: str) -> tuple[Tensor | None, Tensor | None]:
        """What divides the summed losses, and what the summed squares of lse."""
        if self._num_items is not None:
            num_items = self._num_items
            if not isinstance(num_items, Tensor):
                num_items = self._target.new_full((), num_items)
            return num_items, num_items
        if reduction != "mean":
            return None, None
        count = self.count()
        if self._weight is None:
            return count, count
        ignored, invalid, safe = classify(self._target, self._vocab_size, self._ignore_index)
        return self._weight[safe].masked_fill(ignored | invalid, 0.0).sum(), count

    def reduce(self, losses: Tensor, lse: Tensor | None, reduction: str, z_loss: float) -> Tensor:
        squares = None if z_loss == 0.0 or lse is None else z_loss * lse.square()
        if reduction == "none":
            return losses if squares is None else losses + squares
        divisor, squares_divisor = self.divisors(reduction)
        total = over(summed(losses), divisor)
        return total if squares is None else total + over(summed(squares), squares_divisor)


def summed(x: Tensor) -> Tensor:
    """The sum of all elements, in float64 and rounded once: in float32 that of a batch is wrong by
    more than its losses are."""
    return x.sum(dtype=torch.float64).to(x.dtype)


def over(x: Tensor, divisor: Tensor | None) -> Tensor:
    """``x / divisor`` in the dtype of ``x``, whatever that of the divisor."""
    if divisor is None:
        return x
    return x / (divisor.to(x.dtype) if divisor.is_floating_point() else divisor)


def _lse(maximum: Tensor, log_sum: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    return (maximum + log_sum).masked_fill(target == ignore_index, 0.0)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        softcap: float | None,
        logit_scale: float,
        need_stats: bool,
        need_lse: bool,
        backend: str,
    ) -> tuple[Tensor | None, ...]:
        options = (ignore_index, label_smoothing, softcap, logit_scale)
        losses, maximum, log_sum, logprobs, entropy, predictions = _forward(
            input, target, weight, *options, need_stats, backend
        )
        ctx.save_for_backward(input, target, weight, maximum, log_sum, entropy)
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        lse = _lse(maximum, log_sum, target, ignore_index) if need_lse else None
        if not need_stats:
            # a compiler would hand gradients of zeros to what nobody asked for
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
        saved = ctx.saved_tensors  # once: activation checkpointing hands them out no more than that
        if dlosses is None:
            dlosses = torch.zeros_like(saved[3])
        dinput = _backward(dlosses, dlogprobs, dlse, dentropy, *saved, *ctx.options, ctx.backend)
        return dinput, *[None] * 9


def _forward_fake(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    need_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(input.dtype, torch.float32)
    losses = input.new_empty(target.shape, dtype=dtype)
    logprobs = input.new_empty(target.shape if need_stats else 0, dtype=dtype)
    return (
        losses, torch.empty_like(losses), torch.empty_like(losses),
        logprobs, torch.empty_like(logprobs), torch.empty_like(logprobs, dtype=torch.int64),
    )  # fmt: skip


def _backward_fake(
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
    return input.new_empty(input.shape)


_forward = define_op("cross_entropy", "forward", BACKENDS, fake=_forward_fake)
_backward = define_op("cross_entropy", "backward", BACKENDS, fake=_backward_fake)
