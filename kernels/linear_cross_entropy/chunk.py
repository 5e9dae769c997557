"""Launch the kernels on the logits of one chunk of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .._chunks import Operand, Upstream
from .._launch import accumulator, launch
from .._shards import Shard, combine
from . import tuning
from .kernel import bias_gradient_kernel, gradient_kernel, loss_kernel
from .shard import shard_kernel

# What a gradient kernel needs registers for.
_HEAVY = ("HAS_SOFTCAP", "SMOOTHED", "HAS_DENTROPY")


@dataclass(frozen=True)
class Loss:
    """Which loss of the logits.

    Attributes:
        bias: ``(V,)``, added to the logits.
        weight: ``(V,)`` wide, of the classes.
        weight_sum: Its sum, read with label smoothing.
        shard: Which classes the logits and the bias have; None: all.
        weight_sums: ``(ranks, 1)``, read with label smoothing of sharded logits.
    """

    bias: Tensor | None
    weight: Tensor | None
    weight_sum: Tensor | None
    ignore_index: int
    label_smoothing: float
    softcap: float | None
    logit_scale: float
    shard: Shard | None = None
    weight_sums: Tensor | None = None

    @classmethod
    def of(
        cls,
        like: Tensor,
        bias: Tensor | None,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        softcap: float | None,
        logit_scale: float,
        shard: Shard | None,
    ) -> Loss:
        """The loss these options make, for logits in the dtype of ``like``."""
        bias = None if bias is None else bias.contiguous()
        weight = None if weight is None else weight.to(like.dtype).contiguous()
        smoothed = weight is not None and label_smoothing > 0
        weight_sum = weight.sum() if weight is not None and smoothed else None
        options = (ignore_index, label_smoothing, softcap, logit_scale)
        weight_sums = None
        if shard is not None and label_smoothing > 0:
            weight_sums = shard.weight_sums(weight, like)
        return cls(bias, weight, weight_sum, *options, shard, weight_sums)

    def classes(self, vocab_size: int) -> tuple[int, int]:
        """The class of the first of ``vocab_size`` logits, and the number of all classes."""
        shard = self.shard
        return (0, vocab_size) if shard is None else (shard.first_class, shard.num_classes)

    @property
    def numbers(self) -> tuple[int, float, float, float]:
        return self.ignore_index, self.label_smoothing, self.softcap or 0.0, self.logit_scale

    @property
    def flags(self) -> dict[str, bool]:
        return {
            "HAS_WEIGHT": self.weight is not None,
            "HAS_SOFTCAP": self.softcap is not None,
            "SMOOTHED": self.label_smoothing > 0,
        }


@dataclass(frozen=True)
class Rows:
    """What is known of each row, wide; statistics are empty where they are not asked for."""

    losses: Tensor
    lse: Tensor
    logprobs: Tensor
    entropy: Tensor
    predictions: Tensor

    @classmethod
    def empty(cls, input: Tensor, num_rows: int, dtype: torch.dtype, *, need_stats: bool) -> Rows:
        losses = input.new_empty(num_rows, dtype=dtype)
        logprobs = input.new_empty(num_rows if need_stats else 0, dtype=dtype)
        return cls(
            losses, torch.empty_like(losses),
            logprobs, torch.empty_like(logprobs), torch.empty_like(logprobs, dtype=torch.int64),
        )  # fmt: skip

    @classmethod
    def known(cls, lse: Tensor, entropy: Tensor) -> Rows:
        """What a gradient reads."""
        nothing = lse.new_empty(0)
        return cls(nothing, lse, nothing, entropy, torch.empty_like(nothing, dtype=torch.int64))

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(*(x[rows] if x.numel() else x for x in vars(self).values()))


def launch_loss(logits: Tensor, targets: Tensor, loss: Loss, rows: Rows) -> None:
    """Write ``rows``; of sharded logits, together with the other ranks."""
    if loss.shard is not None:
        _write_combined(logits, targets, loss, loss.shard, rows)
        return
    num_rows, vocab_size = logits.shape
    plan = tuning.plan("loss", vocab_size)
    launch(
        loss_kernel, (num_rows,),
        logits, *_vectors(loss, logits), targets,
        rows.losses, rows.lse, rows.logprobs, rows.entropy, rows.predictions,
        vocab_size, *loss.numbers,
        HAS_BIAS=loss.bias is not None, **loss.flags, NEED_STATS=rows.entropy.numel() > 0,
        **_shared(plan, logits),
    )  # fmt: skip


def _write_combined(logits: Tensor, targets: Tensor, loss: Loss, shard: Shard, rows: Rows) -> None:
    smoothed, need_stats = loss.label_smoothing > 0, rows.entropy.numel() > 0
    sums = shard.new_sums(logits, len(logits), smoothed=smoothed, need_stats=need_stats)
    launch_shard(logits, targets, loss, shard.first_class, sums, need_stats=need_stats)
    everyones = shard.gather(sums, targets)
    known = combine(shard, everyones, targets, loss.weight, loss.weight_sums, loss.label_smoothing)
    ignored = targets == loss.ignore_index
    outside = (targets < 0) | (targets >= shard.num_classes)
    lse = known.maximum + known.log_sum
    rows.losses.copy_(known.losses.masked_fill_(outside, torch.nan).masked_fill_(ignored, 0.0))
    rows.lse.copy_(lse.masked_fill_(ignored, 0.0))
    if need_stats:
        logprobs = known.logprobs.masked_fill_(outside, torch.nan)
        rows.logprobs.copy_(logprobs.masked_fill_(ignored, 0.0))
        rows.entropy.copy_(known.entropy.masked_fill_(ignored, 0.0))
        rows.predictions.copy_(known.predictions.masked_fill_(ignored, -1))


def launch_shard(
    logits: Tensor, targets: Tensor, loss: Loss, first_class: int, sums: Tensor, *, need_stats: bool
) -> None:
    """Write the ``sums`` of these classes, unless there are none."""
    num_rows, vocab_size = logits.shape
    if vocab_size == 0:
        return
    plan = tuning.plan("shard", vocab_size)
    bias, weight, _ = _vectors(loss, logits)
    launch(
        shard_kernel, (num_rows,),
        logits, bias, weight, targets, sums,
        num_rows, vocab_size, first_class, loss.ignore_index, loss.softcap or 0.0, loss.logit_scale,
        HAS_BIAS=loss.bias is not None, **loss.flags, NEED_STATS=need_stats,
        **_shared(plan, logits),
    )  # fmt: skip


def launch_gradient(
    logits: Tensor,
    operand: Operand,
    targets: Tensor,
    loss: Loss,
    upstream: Upstream,
    rows: Rows,
    *,
    lse_is_known: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The gradient over the memory of ``logits``, and what rounding took from two elements a row.

    Both as :class:`LinearGradients` takes them.  Writes ``rows``, or reads their lse and entropy.
    """
    num_rows, vocab_size = logits.shape
    dlogits = logits.view(operand.dtype)[:, :vocab_size]
    is_rounded = operand.dtype != logits.dtype
    lost_shape = (num_rows, 2 if is_rounded else 0)
    columns, residuals = targets.new_zeros(lost_shape), logits.new_empty(lost_shape)
    need_stats = not lse_is_known and rows.entropy.numel() > 0
    flags = {**loss.flags, **_flags(upstream)}
    has_options = need_stats or any(flags[name] for name in _HEAVY)
    plan = tuning.plan("gradient with options" if has_options else "gradient", vocab_size)
    launch(
        gradient_kernel, (num_rows,),
        logits, dlogits, *_vectors(loss, logits), targets, *_tensors(upstream, rows.lse),
        rows.losses, rows.lse, rows.logprobs, rows.entropy, rows.predictions, columns, residuals,
        dlogits.stride(0), vocab_size, *loss.classes(vocab_size), *loss.numbers,
        SCALE=operand.scale, HAS_BIAS=loss.bias is not None, **flags,
        LSE_IS_KNOWN=lse_is_known, NEED_STATS=need_stats, IS_SHARD=loss.shard is not None,
        ONE_BLOCK=vocab_size <= plan.block_v, **_shared(plan, logits),
    )  # fmt: skip
    return dlogits, (columns, residuals) if is_rounded else None


def launch_bias_gradient(
    logits: Tensor,
    targets: Tensor,
    loss: Loss,
    upstream: Upstream,
    rows: Rows,
    dbias: Tensor,
) -> None:
    """Add to ``dbias``; reads the lse and entropy of ``rows``."""
    num_rows, vocab_size = logits.shape
    plan = tuning.BIAS
    launch(
        bias_gradient_kernel, (triton.cdiv(vocab_size, plan.block_v),),
        logits, *_vectors(loss, logits), targets, *_tensors(upstream, rows.lse),
        rows.lse, rows.entropy, dbias, num_rows, vocab_size, *loss.classes(vocab_size),
        *loss.numbers,
        **loss.flags, **_flags(upstream), BLOCK_R=plan.block_r, **_shared(plan, logits),
    )  # fmt: skip


def _tensors(upstream: Upstream, like: Tensor) -> list[Tensor]:
    """As the kernels take them; ``like``, one per row, in place of what is not read."""
    dlogprobs, dlse = upstream.dlogprobs, upstream.dlse
    if dlogprobs is None and dlse is not None:
        dlogprobs = torch.zeros_like(dlse)
    if dlse is None and dlogprobs is not None:
        dlse = torch.zeros_like(dlogprobs)
    given = (upstream.dlosses, dlogprobs, dlse, upstream.dentropy, upstream.z_weight)
    return [like if x is None else x for x in given]


def _flags(upstream: Upstream) -> dict[str, bool]:
    return {
        "HAS_DLOSSES": upstream.dlosses is not None,
        "HAS_DSTATS": upstream.dlogprobs is not None or upstream.dlse is not None,
        "HAS_DENTROPY": upstream.dentropy is not None,
        "HAS_Z": upstream.z_weight is not None,
    }


def _vectors(loss: Loss, like: Tensor) -> list[Tensor]:
    """Bias, class weights and their sum; ``like`` in place of what is not read."""
    return [like if x is None else x for x in (loss.bias, loss.weight, loss.weight_sum)]


def _shared(plan: tuning.Plan | tuning.BiasPlan, logits: Tensor) -> dict[str, Any]:
    return {
        "BLOCK_V": plan.block_v,
        "ACC": accumulator(logits.dtype),
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
    }
