"""Classes split over processes: what a process knows of a row, and what all of them know together.

Rank r of n holds the classes [r S, (r + 1) S) of V, S = ceil(V / n); the last ranks may hold fewer,
or none.  Of each row a rank sends the sums over its own classes, from which every rank computes the
same loss.  With x the logits of the row after scale and cap:

    maximum   of x                          total   sum of exp(x - pivot)
    x_target  x[target], 0 where it is another rank's
    moment    sum of exp(x - pivot) (x - pivot)          first   place of the maximum
    weighted  sum of w (x - pivot), w the weights of the classes

pivot is the maximum, or 0 where that is -inf.  Maxima and totals travel apart because an lse,
rounded, has lost what the loss of a likely target consists of.

For the k best classes a rank sends maximum and total, and its own min(k, S) best:

    keys      what they are ordered by, -inf where there are no more
    columns   their places          values    their x, where that is not the key
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# Chunks are those of this many classes, whatever the size of the shard: ranks whose shards differ
# by mistake still meet in the same collectives.  256 rows on CPU, up to 4,096 on a GPU.
CLASSES_OF_CHUNKS = 1 << 16

# A prime below 2**24, up to which float32 holds every integer.
_MODULUS = 8_388_593


@dataclass(frozen=True)
class Shard:
    """The classes of this process.

    Attributes:
        group: The processes that hold the others.
        num_classes: V, of all ranks.
        size: How many are here.
    """

    group: dist.ProcessGroup
    num_classes: int
    size: int

    @classmethod
    def of(cls, group: str, num_classes: int, size: int) -> Shard | None:
        """The shard under the registered name of a group; None under no name: all are here."""
        if not group:
            return None
        resolved = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
        return cls(resolved, num_classes, size)

    @property
    def largest(self) -> int:
        """S."""
        return -(-self.num_classes // self.group.size())

    @property
    def first_class(self) -> int:
        return min(self.group.rank() * self.largest, self.num_classes)

    def of_classes(self, weight: Tensor) -> Tensor:
        """The part of a ``(V,)`` tensor that belongs to the classes here."""
        return weight[self.first_class : self.first_class + self.size]

    def weight_sums(self, weight: Tensor | None, like: Tensor) -> Tensor:
        """``(ranks, 1)``: the summed weights of each rank's classes, or their number."""
        if weight is None:
            return self._sizes(like)[:, None]
        missing = self.group.size() * self.largest - self.num_classes
        return F.pad(weight, (0, missing)).view(-1, self.largest).sum(1, keepdim=True)

    def _sizes(self, like: Tensor) -> Tensor:
        ranks = torch.arange(self.group.size(), device=like.device, dtype=like.dtype)
        return (self.num_classes - ranks * self.largest).clamp_(0, self.largest)

    def new_sums(self, like: Tensor, num_rows: int, *, smoothed: bool, need_stats: bool) -> Tensor:
        """``(k, num_rows)`` for maximum, total, x_target[, moment, first][, weighted].

        They are those of no classes, for whoever has any to overwrite.
        """
        sums = like.new_zeros(3 + 2 * need_stats + smoothed, num_rows)
        sums[0] = -torch.inf
        return sums

    def new_best(self, like: Tensor, num_rows: int, k: int, *, has_values: bool) -> Tensor:
        """``(2 + 2 min(k, S), num_rows)`` for maximum, total, keys, columns; of no classes.

        With values, as many more.
        """
        best = like.new_zeros(2 + (2 + has_values) * min(k, self.largest), num_rows)
        best[0] = -torch.inf
        best[2 : 2 + min(k, self.largest)] = -torch.inf
        return best

    def gather(self, sums: Tensor, targets: Tensor | None = None) -> Tensor:
        """``(ranks, k, rows)`` sums of all ranks, from those of this one.

        NaN where ranks differ in what they must share, which is looked for on the device: shards
        of other sizes, other targets.
        """
        mark = sums.new_zeros(())
        if targets is not None:
            mark = mark_of(targets).remainder(_MODULUS).to(sums.dtype)
        packed = torch.cat([sums.flatten(), mark[None], sums.new_full((1,), self.size)])
        gathered = packed.new_empty(self.group.size(), packed.numel())
        dist.all_gather(list(gathered), packed, group=self.group)
        sizes, marks = gathered[:, -1], gathered[:, -2]
        agree = (sizes == self._sizes(sums)).all() & (marks == mark).all()
        everyones = gathered[:, : sums.numel()].reshape(len(gathered), *sums.shape)
        return everyones.masked_fill_(~agree, torch.nan)

    def add_up(self, x: Tensor) -> None:
        """Replace ``x`` by its sum over the ranks."""
        if x.numel():
            dist.all_reduce(x, group=self.group)


def mark_of(targets: Tensor) -> Tensor:
    """An int64 scalar that other targets, or these in another order, hardly have."""
    factors = torch.arange(1, targets.numel() + 1, device=targets.device) * 0x9E3779B97F4A7C1
    factors = (factors ^ (factors >> 29)) * 0xBF58476D1CE4E5B
    return (targets.flatten().long() * factors).sum()


@dataclass(frozen=True)
class Known:
    """What is known of each row of a chunk, wide, whatever its target; predictions int64."""

    losses: Tensor
    maximum: Tensor
    log_sum: Tensor
    logprobs: Tensor
    entropy: Tensor
    predictions: Tensor


def combine(
    shard: Shard,
    everyones: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    weight_sums: Tensor | None,
    label_smoothing: float,
) -> Known:
    """The losses and statistics of ``(ranks, k, rows)`` sums.

    Args:
        everyones: What :meth:`Shard.gather` returned.
        targets: ``(rows,)``; of one that is no class the results may be anything.
        weight: ``(V,)`` wide, of the classes.
        weight_sums: What :meth:`Shard.weight_sums` returned, where the loss is smoothed.
        label_smoothing: 0 to 1.
    """
    maxima, totals, at_targets, *more = everyones.unbind(1)
    maximum, shares, total = _total(maxima, totals)
    pivot, log_sum = _finite(maximum), total.log()
    classes = targets.clamp(0, shard.num_classes - 1)
    owner = classes.div(shard.largest, rounding_mode="floor")
    # not from lse: rounded, it has lost what the loss of a likely target consists of
    surprisal = log_sum - (at_targets.gather(0, owner[None])[0] - maximum)
    losses = surprisal if weight is None else surprisal * weight[classes]
    if weight_sums is not None:
        weighted = more.pop()
        uniform = weight_sums * (log_sum + (maximum - _finite(maxima))) - weighted
        uniform = uniform.sum(0) * (label_smoothing / shard.num_classes)
        losses = losses * (1 - label_smoothing) + uniform
    if not more:
        nothing = losses.new_empty(0)
        predictions = torch.empty_like(nothing, dtype=torch.int64)
        return Known(losses, maximum, log_sum, nothing, nothing, predictions)
    moments, firsts = more
    fall = torch.where(maxima == -torch.inf, 0.0, maxima - pivot)
    entropy = log_sum - (shares * (moments + fall * totals)).sum(0) / total
    # of equals the lowest rank's, whose classes come first
    best = maxima.argmax(0, keepdim=True)
    predictions = (best * shard.largest + firsts.gather(0, best).nan_to_num().long())[0]
    return Known(losses, maximum, log_sum, -surprisal, entropy, predictions)


def best_of_all(shard: Shard, everyones: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and classes, ``(rows, k)``, of what all ranks have sent of their best.

    Each rank's come in order, and ranks in the order of their classes: of equal keys the rank's
    that comes first, as if the classes were on one process.
    """
    maximum, _, total = _total(everyones[:, 0], everyones[:, 1])
    most = min(k, shard.largest)
    # (rows, ranks * most) each
    keys, columns, *values = (
        part.permute(2, 0, 1).flatten(1) for part in everyones[:, 2:].split(most, 1)
    )
    _, order = keys.sort(dim=1, descending=True, stable=True)
    order = order[:, :k]
    x = (values[0] if values else keys).gather(1, order)
    # in two steps: their sum, rounded, has lost what a likely class is judged by
    logprobs = (x - maximum[:, None]) - total.log()[:, None]
    firsts = order.div(most, rounding_mode="floor") * shard.largest
    classes = firsts + columns.gather(1, order).nan_to_num().long()
    return logprobs, classes.clamp_(max=shard.num_classes - 1)  # where ranks disagree


def _total(maxima: Tensor, totals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The maximum of all ranks, the factor that brings each rank's sums to it, and the total."""
    maximum = maxima.amax(0)
    shares = (maxima - _finite(maximum)).exp()
    total = (shares * totals).sum(0)
    # nothing but -inf: NaN, as in torch
    return maximum, shares, torch.where(total > 0, total, torch.nan)


def _finite(maximum: Tensor) -> Tensor:
    """What sums are taken relative to: exp(-inf - -inf) is NaN."""
    return maximum.masked_fill(maximum == -torch.inf, 0.0)
