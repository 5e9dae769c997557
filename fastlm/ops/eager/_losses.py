"""Losses of rows of logits and their gradient, by torch's own operators.

On CPU a block of rows at a time: it stays in the cache from its first pass to its last, so that
memory is read, and for the gradient written, once.  The formulas are in
``reference/cross_entropy.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlm.kernels._chunks import Upstream, wide_dtype

# Logits worked on at once on CPU: 1 MB of float32, what one core's L2 holds.
_CPU_BLOCK = 1 << 18


@dataclass(frozen=True)
class LossOptions:
    """Which loss.

    Attributes:
        weight: ``(V,)`` wide, of the classes.
    """

    weight: Tensor | None
    label_smoothing: float
    softcap: float | None
    logit_scale: float

    @property
    def is_plain(self) -> bool:
        """The loss is -log p[target], and x are the logits themselves."""
        defaults = self.label_smoothing == 0.0 and self.softcap is None and self.logit_scale == 1.0
        return defaults and self.weight is None


@dataclass(frozen=True)
class RowLosses:
    """What is known of each row, ``(N, 1)`` wide; the last three ``(0, 1)`` if not asked for."""

    losses: Tensor
    maximum: Tensor
    log_sum: Tensor
    logprobs: Tensor
    entropy: Tensor
    predictions: Tensor

    def mask(self, ignored: Tensor, invalid: Tensor) -> None:
        """Rows without a target get zeros and -1; of those with a bad one the loss is unknown."""
        self.losses.masked_fill_(invalid, torch.nan).masked_fill_(ignored, 0.0)
        if self.predictions.numel():
            self.logprobs.masked_fill_(invalid, torch.nan).masked_fill_(ignored, 0.0)
            self.entropy.masked_fill_(ignored, 0.0)
            self.predictions.masked_fill_(ignored, -1)


def row_losses(
    logits: Tensor, targets: Tensor, options: LossOptions, *, need_stats: bool
) -> RowLosses:
    """Of ``(N, V)`` logits and ``(N, 1)`` targets in ``[0, V)``."""
    if options.is_plain and not need_stats:
        return _plain_row_losses(logits, targets)
    dtype, weight, smoothing = wide_dtype(logits), options.weight, options.label_smoothing
    maximum, log_sum, at_target = (logits.new_empty(targets.shape, dtype=dtype) for _ in range(3))
    rest = torch.empty_like(log_sum) if smoothing > 0 else None
    stats_shape = (targets.shape[0] if need_stats else 0, 1)
    mean = logits.new_empty(stats_shape, dtype=dtype)
    predictions = targets.new_empty(stats_shape)
    blocks = list(_blocks(logits))
    scratch = logits.new_empty((blocks[0].stop, logits.shape[1]) if blocks else 0, dtype=dtype)
    for rows in blocks:
        block = logits[rows]
        z = scratch[: block.shape[0]]
        x = transform(block.to(dtype), options, out=z)
        if need_stats:
            torch.argmax(x, 1, keepdim=True, out=predictions[rows])
        torch.amax(x, 1, keepdim=True, out=maximum[rows])
        torch.sub(x, maximum[rows], out=z)
        torch.gather(z, 1, targets[rows], out=at_target[rows])
        if rest is not None:
            rest[rows] = (z if weight is None else z * weight).mean(1, keepdim=True)
        if need_stats:
            p = z.exp()
            torch.sum(p, 1, keepdim=True, out=log_sum[rows])
            # a class of probability zero has z = -inf, and 0 * -inf is not its part
            p.mul_(z.masked_fill_(z == -torch.inf, 0.0))
            torch.div(p.sum(1, keepdim=True), log_sum[rows], out=mean[rows])
        else:
            torch.sum(z.exp_(), 1, keepdim=True, out=log_sum[rows])
    log_sum.log_()
    maximum.masked_fill_(log_sum.isnan(), torch.nan)
    losses = log_sum - at_target
    entropy = log_sum - mean if need_stats else mean
    logprobs = losses.neg() if need_stats else torch.empty_like(mean)
    if weight is not None:
        losses.mul_(weight[targets])
    if rest is not None:
        total = log_sum if weight is None else log_sum * weight.mean()
        losses.mul_(1 - smoothing).add_(total - rest, alpha=smoothing)
    return RowLosses(losses, maximum, log_sum, logprobs, entropy, predictions)


def _plain_row_losses(logits: Tensor, targets: Tensor) -> RowLosses:
    """:func:`row_losses` where nothing is asked for, in fewer passes."""
    dtype, empty = wide_dtype(logits), logits.new_empty
    maximum, log_sum, losses = (empty(targets.shape, dtype=dtype) for _ in range(3))
    scratch = None
    for rows in _blocks(logits):
        block = logits[rows].to(dtype)
        if scratch is None:
            scratch = torch.empty_like(block, memory_format=torch.contiguous_format)
        log_p = torch.log_softmax(block, 1, out=scratch[: len(block)])
        torch.amax(block, 1, keepdim=True, out=maximum[rows])
        # that of the most likely class is 0 - log_sum, to the last bit
        torch.amax(log_p, 1, keepdim=True, out=log_sum[rows])
        torch.gather(log_p, 1, targets[rows], out=losses[rows])
    maximum.masked_fill_(log_sum.isnan(), torch.nan)
    logprobs, entropy = (empty((0, 1), dtype=dtype) for _ in range(2))
    predictions = targets.new_empty(0, 1)
    return RowLosses(losses.neg_(), maximum, log_sum.neg_(), logprobs, entropy, predictions)


def shard_sums(
    logits: Tensor,
    columns: Tensor,
    here: Tensor,
    options: LossOptions,
    sums: Tensor,
    need_stats: bool,
) -> None:
    """Write the sums of ``kernels/_shards.py`` over the ``(N, V)`` logits of a shard.

    Args:
        logits: With no classes, nothing is written.
        columns: ``(N, 1)`` in ``[0, V)``, of the targets that are ``here``.
        here: ``(N, 1)`` bool.
        options: With the weights of these classes.
        sums: ``(k, N)`` wide.
        need_stats: Whether moment and first are among them.
    """
    if logits.shape[1] == 0:
        return
    for rows in _blocks(logits):
        block = logits[rows].to(sums.dtype)
        x = transform(block, options, out=torch.empty_like(block))
        out = sums[:, rows]
        out[0] = x.amax(1)
        z = x - out[0].masked_fill(out[0] == -torch.inf, 0.0)[:, None]
        out[2] = x.gather(1, columns[rows]).masked_fill_(~here[rows], 0.0)[:, 0]
        if need_stats:
            out[4] = x.argmax(1)
        if options.label_smoothing > 0:
            out[-1] = (z if options.weight is None else z * options.weight).sum(1)
        p = z.exp()
        out[1] = p.sum(1)
        if need_stats:
            # a class of probability zero has z = -inf, and 0 * -inf is not its part
            out[3] = p.mul_(z.masked_fill_(z == -torch.inf, 0.0)).sum(1)


@dataclass(frozen=True)
class RowFactors:
    """The gradient of x is, with the entropy H and the weights w of the classes,

        (p - [v == target]) of_target + p of_all - w of_weight - p (log p + H) of_entropy

    Attributes:
        of_target: ``(N, 1)``, like the others; None is 1, where nothing else is given.
        entropy: H, where ``of_entropy`` is given.
        is_here: Whether the target is among these classes, or another rank's; None: all are.
    """

    of_target: Tensor | None = None
    of_all: Tensor | None = None
    of_weight: Tensor | None = None
    of_entropy: Tensor | None = None
    entropy: Tensor | None = None
    is_here: Tensor | None = None

    def __getitem__(self, rows: slice) -> RowFactors:
        return RowFactors(*(None if x is None else x[rows] for x in vars(self).values()))


def row_factors(
    upstream: Upstream,
    lse: Tensor,
    entropy: Tensor | None,
    targets: Tensor,
    options: LossOptions,
    vocab_size: int,
) -> RowFactors:
    """All per row ``(N, 1)``; ``lse`` is read with a z-loss, ``entropy`` with its gradient."""
    weight, smoothing = options.weight, options.label_smoothing
    dlosses = upstream.dlosses
    assert dlosses is not None, "ones were not written out"
    of_target, of_all, of_weight = dlosses, upstream.dlse, None
    if weight is not None:
        of_target = of_target * weight[targets]
    if smoothing > 0:
        of_target = of_target * (1 - smoothing)
        of_weight = dlosses * (smoothing / vocab_size)
        uniform = dlosses * smoothing
        if weight is not None:
            uniform = uniform * weight.mean()
        of_all = uniform if of_all is None else uniform + of_all
    if upstream.dlogprobs is not None:
        of_target = of_target - upstream.dlogprobs
    if upstream.z_weight is not None:
        squared = 2 * upstream.z_weight * lse
        of_all = squared if of_all is None else of_all + squared
    return RowFactors(of_target, of_all, of_weight, upstream.dentropy, entropy)


def write_gradient(
    out: Tensor,
    logits: Tensor,
    parts_of_lse: Sequence[Tensor],
    targets: Tensor,
    factors: RowFactors,
    ignored: Tensor | None,
    options: LossOptions,
) -> None:
    """The gradient of ``(N, V)`` logits, over them if they are ``out``.

    Args:
        out: ``(N, V)``, any float dtype.
        logits: As they came.
        parts_of_lse: Each ``(N, 1)``, taken off one after the other.
        targets: ``(N, 1)`` in ``[0, V)``.
        factors: What is asked of each row.
        ignored: ``(N, 1)``: rows of zeros, whatever their logits.
        options: Which loss.
    """
    dtype = wide_dtype(logits)
    for rows in _blocks(logits):
        part = out[rows]
        z = part if out.dtype == dtype else torch.empty_like(part, dtype=dtype)
        x = transform(logits[rows].to(dtype), options, out=z)
        slope = None
        if options.softcap is not None:
            slope = (x / options.softcap).square_().neg_().add_(1.0)
        for lse in parts_of_lse:
            x = torch.sub(x, lse[rows], out=z)
        probability_gradient_(x, targets[rows], factors[rows], options.weight)
        if slope is not None:
            x.mul_(slope)
        if options.logit_scale != 1.0:
            x.mul_(options.logit_scale)
        if ignored is not None:
            # 0 * NaN: an ignored row has gradient zero whatever its logits
            x.masked_fill_(ignored[rows], 0.0)
        if z is not part:
            part.copy_(z)


def probability_gradient_(
    log_p: Tensor, targets: Tensor, row: RowFactors, weight: Tensor | None
) -> None:
    """Turn log-probabilities into the gradient of x."""
    of_target = row.of_target
    if of_target is None or (row.of_all is None and row.of_entropy is None):
        # (p - 1) before the factor: the other order loses p when the target is nearly certain
        if row.is_here is None:
            log_p.exp_().scatter_(1, targets, -1.0, reduce="add")
        else:
            log_p.exp_().scatter_add_(1, targets, -row.is_here.to(log_p.dtype))
        if of_target is not None:
            log_p.mul_(of_target)
        return
    at_target = _at_target(log_p.gather(1, targets), targets, of_target, row, weight)
    factor = of_target if row.of_all is None else of_target + row.of_all
    if row.of_entropy is not None and row.entropy is not None:
        # a class of probability zero has no part in the entropy, and 0 * -inf is NaN
        informative = log_p + row.entropy
        informative.masked_fill_(informative == -torch.inf, 0.0).mul_(row.of_entropy)
        factor = torch.sub(factor, informative, out=informative)
    log_p.exp_().mul_(factor)
    if row.of_weight is not None:
        ones = log_p.new_ones(()) if weight is None else weight
        log_p.addcmul_(row.of_weight, ones, value=-1.0)
    if row.is_here is not None:
        at_target = torch.where(row.is_here, at_target, log_p.gather(1, targets))
    log_p.scatter_(1, targets, at_target)


def _at_target(
    log_p: Tensor, targets: Tensor, of_target: Tensor, row: RowFactors, weight: Tensor | None
) -> Tensor:
    """The gradient of x at the target of each row, p - 1 taken before anything is multiplied."""
    p = log_p.exp()
    dx = (p - 1.0) * of_target
    if row.of_all is not None:
        dx.addcmul_(p, row.of_all)
    if row.of_weight is not None:
        dx.sub_(row.of_weight if weight is None else row.of_weight * weight[targets])
    if row.of_entropy is not None and row.entropy is not None:
        dx.sub_(p * (log_p + row.entropy).masked_fill_(p == 0, 0.0) * row.of_entropy)
    return dx


def transform(logits: Tensor, options: LossOptions, *, out: Tensor) -> Tensor:
    """What the softmax is taken of; the logits themselves, or ``out``."""
    if options.logit_scale != 1.0:
        logits = torch.mul(logits, options.logit_scale, out=out)
    if options.softcap is not None:
        logits = torch.div(logits, options.softcap, out=out).tanh_().mul_(options.softcap)
    return logits


def all_are_classes(targets: Tensor, vocab_size: int, ignore_index: int) -> bool:
    """Whether no target is ignored or out of range: the usual batch.  Only looks at CPU tensors."""
    if not targets.is_cpu or 0 <= ignore_index < vocab_size or targets.numel() == 0:
        return False
    least, most = targets.aminmax()
    return int(least) >= 0 and int(most) < vocab_size


def _blocks(logits: Tensor) -> Iterator[slice]:
    num_rows, vocab_size = logits.shape
    step = max(1, _CPU_BLOCK // vocab_size) if logits.is_cpu else max(1, num_rows)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))
