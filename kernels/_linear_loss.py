"""Cross-entropy of a linear layer's logits a chunk of rows at a time, by kernels of any kind.

Per chunk: logits by a matrix product in float32 (a logit rounded to bfloat16 moves the loss by
1e-3), one kernel that turns them into their gradient in place, and two products that use it, the
gradient rounded to the dtype of the inputs because tensor cores need both operands alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ._chunks import (
    LinearGradients,
    Operand,
    Upstream,
    matmul,
    rows_per_chunk,
    tensor_core_operand,
    wide_dtype,
)
from ._shards import CLASSES_OF_CHUNKS, Shard, combine

# What rounding took from some elements of each row: their columns, and as much, (rows, k) each.
Lost = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Loss:
    """Which loss of the logits.

    Attributes:
        bias: ``(V,)`` wide, added to the logits.
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
        bias = None if bias is None else bias.to(like.dtype).contiguous()
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


class Kernels(Protocol):
    """What a backend launches on the ``(rows, V)`` wide logits of a chunk, without their bias."""

    def launch_loss(self, logits: Tensor, targets: Tensor, loss: Loss, rows: Rows) -> None:
        """Write ``rows``, from all classes."""

    def launch_shard(
        self,
        logits: Tensor,
        targets: Tensor,
        loss: Loss,
        shard: Shard,
        sums: Tensor,
        *,
        need_stats: bool,
    ) -> None:
        """Write the ``sums`` of ``_shards.py``, from the classes of ``shard``, one at least."""

    def launch_gradient(
        self,
        logits: Tensor,
        operand: Operand,
        targets: Tensor,
        loss: Loss,
        upstream: Upstream,
        rows: Rows,
        *,
        lse_is_known: bool,
    ) -> tuple[Tensor, Lost | None]:
        """The gradient over the memory of ``logits``, and what rounding took from two elements a
        row, both as :class:`LinearGradients` takes them.

        Writes ``rows``, or reads their lse and entropy.
        """

    def launch_bias_gradient(
        self,
        logits: Tensor,
        targets: Tensor,
        loss: Loss,
        upstream: Upstream,
        rows: Rows,
        dbias: Tensor,
    ) -> None:
        """Add to ``dbias``; reads the lse and entropy of ``rows``."""


class LinearLoss:
    """The steps of a backend of ``linear_cross_entropy``, made of its kernels."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def forward(
        self,
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
        known = Rows.empty(input, target.numel(), wide_dtype(input), need_stats=need_stats)
        options = (ignore_index, label_smoothing, softcap, logit_scale)
        shard = Shard.of(group, num_classes, linear_weight.shape[0])
        loss = Loss.of(known.lse, linear_bias, weight, *options, shard)
        targets = _flat(target)
        for rows, logits in _chunks(input.reshape(-1, input.shape[-1]), linear_weight, shard):
            _write_losses(self._kernels, logits, targets[rows], loss, known[rows])
        return _shaped(known, target, need_stats)

    def gradients(
        self,
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
        known = Rows.empty(input, target.numel(), wide_dtype(input), need_stats=need_stats)
        options = (ignore_index, label_smoothing, softcap, logit_scale)
        shard = Shard.of(group, num_classes, linear_weight.shape[0])
        loss = Loss.of(known.lse, linear_bias, weight, *options, shard)
        gradients = _sweep(
            self._kernels, Upstream(z_weight=z_weight), input, linear_weight, target, loss, known,
            need_input, need_weight, need_bias, lse_is_known=False,
        )  # fmt: skip
        losses, lse, *stats = _shaped(known, target, need_stats)
        logprobs, entropy, predictions = stats
        if z_weight is None and not need_stats:
            lse = lse.new_empty(0)
        return losses, lse, logprobs, entropy, predictions, *gradients

    def backward(
        self,
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
        options = (ignore_index, label_smoothing, softcap, logit_scale)
        shard = Shard.of(group, num_classes, linear_weight.shape[0])
        loss = Loss.of(lse, linear_bias, weight, *options, shard)
        upstream = Upstream(dlosses, dlogprobs, dlse, dentropy).each_row(_flat)
        known = Rows.known(_flat(lse), _flat(entropy))
        return _sweep(
            self._kernels, upstream, input, linear_weight, target, loss, known,
            need_input, need_weight, need_bias, lse_is_known=True,
        )  # fmt: skip


def _sweep(
    kernels: Kernels,
    upstream: Upstream,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    loss: Loss,
    known: Rows,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    *,
    lse_is_known: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of what comes in; writes ``known``, or reads its lse and entropy."""
    inputs, targets = input.reshape(-1, input.shape[-1]), _flat(target)
    vocab_size, shard = linear_weight.shape[0], loss.shard
    _, num_classes = loss.classes(vocab_size)
    operand = tensor_core_operand(input, num_classes)
    upstream, factor = upstream.within_float16(
        operand, targets == loss.ignore_index, loss.weight, loss.logit_scale, num_classes
    )
    linear = LinearGradients(inputs, linear_weight, operand, need_input, need_weight)
    dbias = known.lse.new_zeros(vocab_size if need_bias else 0)
    # both are asked of the logits before the gradient replaces them
    loss_comes_first = not lse_is_known and (need_bias or shard is not None)
    for rows, logits in _chunks(inputs, linear_weight, shard):
        y, chunk, dchunk = targets[rows], known[rows], upstream[rows]
        if loss_comes_first:
            _write_losses(kernels, logits, y, loss, chunk)
        if vocab_size == 0:
            continue
        if need_bias:
            kernels.launch_bias_gradient(logits, y, loss, dchunk, chunk, dbias)
        dlogits, lost = kernels.launch_gradient(
            logits, operand, y, loss, dchunk, chunk, lse_is_known=lse_is_known or loss_comes_first
        )
        linear.add(rows, dlogits, lost)
    if shard is not None and need_input:
        if vocab_size == 0:
            linear.dinput.zero_()
        shard.add_up(linear.dinput)
    gradients = (linear.dinput.view(input.shape if need_input else 0), linear.dweight, dbias)
    if factor is not None:
        for gradient in gradients:
            gradient.mul_(factor)
    return gradients


def _write_losses(
    kernels: Kernels, logits: Tensor, targets: Tensor, loss: Loss, rows: Rows
) -> None:
    """Write ``rows``; of sharded logits, together with the other ranks."""
    shard = loss.shard
    if shard is None:
        kernels.launch_loss(logits, targets, loss, rows)
        return
    smoothed, need_stats = loss.label_smoothing > 0, rows.entropy.numel() > 0
    sums = shard.new_sums(logits, len(logits), smoothed=smoothed, need_stats=need_stats)
    if shard.size:
        kernels.launch_shard(logits, targets, loss, shard, sums, need_stats=need_stats)
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


def _flat(x: Tensor) -> Tensor:
    return x.flatten().contiguous()


def _shaped(
    known: Rows, target: Tensor, need_stats: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    losses, lse, *stats = vars(known).values()
    logprobs, entropy, predictions = (x.view(target.shape) if need_stats else x for x in stats)
    return losses.view(target.shape), lse.view(target.shape), logprobs, entropy, predictions


def _chunks(
    inputs: Tensor, linear_weight: Tensor, shard: Shard | None
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows, and their logits without bias, in memory that the next step reuses."""
    num_rows, vocab_size = inputs.shape[0], linear_weight.shape[0]
    classes = vocab_size if shard is None else CLASSES_OF_CHUNKS
    step = rows_per_chunk(num_rows, classes, inputs.device.type)
    workspace = inputs.new_empty(step, vocab_size, dtype=wide_dtype(inputs))
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        logits = workspace[: rows.stop - start]
        if vocab_size:
            matmul(logits, inputs[rows], linear_weight.t())
        yield rows, logits
