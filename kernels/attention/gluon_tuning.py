"""Launch settings of the Gluon kernels for Hopper, and which of them a GPU has proven."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Plan:
    """Settings of one head_dim.

    Attributes:
        block_m: Queries of a consumer; a program has two.
        block_n: Keys of a tile.
        stages: Tiles of keys, and of values, in shared memory at once.
        consumer_registers: Of each thread of the consumers; together with the others at most the
            65,536 of a multiprocessor.
        copy_registers: Of the copying warp's.
        num_warps: Of a consumer.
        num_stages: Of loops that Triton pipelines, of which there are none.
        proven: Of each dtype in which a GPU ran this row, the path from the repository root of the
            file with the result: then ``triton`` and ``auto`` use it.  In others
            ``backend="gluon"`` alone does.
    """

    block_m: int
    block_n: int
    stages: int
    consumer_registers: int = 240
    copy_registers: int = 24
    num_warps: int = 4
    num_stages: int = 1
    proven: Mapping[torch.dtype, str] = field(default_factory=dict)


# by head_dim, which is that of queries, keys and values
FORWARD = {
    64: Plan(block_m=64, block_n=128, stages=3),
    128: Plan(block_m=64, block_n=128, stages=2),
    256: Plan(block_m=64, block_n=64, stages=2),
}


def is_proven(head_dim: int, dtype: torch.dtype) -> bool:
    row = FORWARD.get(head_dim)
    return row is not None and dtype in row.proven
