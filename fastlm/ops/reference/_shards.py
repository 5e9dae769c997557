"""Classes split over processes, put together: every rank computes with all of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def whole(
    group: str, num_classes: int, linear_weight: Tensor, linear_bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Weight ``(V, C)`` and bias ``(V,)`` from all ranks; as they are without a group.

    Rank r of n holds the classes [r S, (r + 1) S), S = ceil(V / n), as far as there are any.

    Args:
        group: Registered name of the processes, or "".
        num_classes: V.
        linear_weight: ``(at most S, C)``.
        linear_bias: As many as the rows of ``linear_weight``.
    """
    if not group:
        return linear_weight, linear_bias
    bias = None if linear_bias is None else _gathered(group, num_classes, linear_bias)
    return _gathered(group, num_classes, linear_weight), bias


def _gathered(group: str, num_classes: int, shard: Tensor) -> Tensor:
    ranks = _resolved(group)
    largest = -(-num_classes // ranks.size())
    padding = (0, 0) * (shard.dim() - 1) + (0, largest - shard.shape[0])
    padded = F.pad(shard, padding).contiguous()
    shards = [torch.empty_like(padded) for _ in range(ranks.size())]
    dist.all_gather(shards, padded, group=ranks)
    return torch.cat(shards)[:num_classes]


def of_rank(group: str, num_classes: int, *gradients: Tensor) -> tuple[Tensor, ...]:
    """The rows that belong to this rank's classes; empty gradients were not asked for."""
    if not group:
        return gradients
    ranks = _resolved(group)
    largest = -(-num_classes // ranks.size())
    first = ranks.rank() * largest
    return tuple(x[first : first + largest].clone() for x in gradients)


def _resolved(group: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
