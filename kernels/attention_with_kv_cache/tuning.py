"""Launch settings of the kernels over a cache.

They change speed and rounding, never meaning.  Chosen from ahead-of-time compilation (registers,
spills, shared memory); not yet measured on a GPU.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Plan:
    """BLOCK_M (query, head) pairs, BLOCK_N keys; for ``append`` BLOCK_M heads of tokens."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# No row of the tables takes more.
MAX_HEAD_DIM = 256
# (largest head_dim, settings), smallest first
Rows = tuple[tuple[int, Plan], ...]

# Few queries wait for memory: several programs a multiprocessor, each with some loads under way.
FEW: Rows = ((64, Plan(16, 128, 4, 2)), (128, Plan(16, 64, 4, 2)), (256, Plan(16, 32, 4, 2)))
MANY: Rows = ((64, Plan(64, 64, 4, 2)), (128, Plan(64, 64, 8, 1)), (256, Plan(64, 32, 8, 1)))
# Integers become floats in registers: with two stages, or with 4 warps, some architecture spills.
MANY_INT8: Rows = ((64, Plan(64, 64, 8, 1)), *MANY[1:])
# Head_dims that are no multiple of 16 bytes: elements are loaded one by one, and a thread has the
# address of every row of a tile.
RAGGED_FEW: Rows = ((64, Plan(16, 64, 8, 1)), (128, Plan(16, 32, 8, 1)), (256, Plan(16, 16, 8, 1)))
RAGGED_MANY: Rows = ((64, Plan(64, 32, 8, 1)), (128, Plan(32, 32, 8, 1)), (256, Plan(16, 16, 8, 1)))
# float32, and float64 for tests: without tensor cores
WIDE: Rows = ((256, Plan(16, 16, 8, 1)),)

APPEND = Plan(16, 0, 8, 1)
COMBINE = Plan(16, 0, 4, 1)

# Keys of a split, a multiple of every BLOCK_N: its result is D + 1 floats to write and to read for
# 2 SPLIT_KEYS D 16-bit numbers, 1 % for one query head.
SPLIT_KEYS = 256
MOST_SPLITS = 128
# Up to so many (query, head) pairs one block of 16 has them all.
FEW_PAIRS = 16
# With more than this the grid is full without splits.
MOST_PAIRS = 64


def plan(
    pairs: int, head_dim: int, value_dim: int, dtype: torch.dtype, stored: torch.dtype
) -> Plan:
    """The row of ``decode``, for ``pairs`` queries and heads that share keys, ``stored`` so."""
    few = pairs <= FEW_PAIRS
    is_ragged = head_dim * stored.itemsize % 16 or value_dim * stored.itemsize % 16
    if dtype.itemsize >= 4:
        rows = WIDE
    elif is_ragged:
        rows = RAGGED_FEW if few else RAGGED_MANY
    elif few:
        rows = FEW
    else:
        rows = MANY_INT8 if stored == torch.int8 else MANY
    return next(row for limit, row in rows if max(head_dim, value_dim) <= limit)


def split_keys(pairs: int) -> int:
    """Keys of a split, or 0 where keys are not divided."""
    return SPLIT_KEYS if pairs <= MOST_PAIRS else 0


def classes(group_size: int, most_pairs: int) -> list[tuple[int, int]]:
    """``(least, most)`` of the pairs of rows that are alike to ``plan`` and to ``split_keys``.

    Those that rows can have: of one query, which is ``group_size`` pairs, to ``most_pairs``.
    """
    bounds = (0, FEW_PAIRS, MOST_PAIRS, 2**31 - 1)
    return [
        (least, most)
        for least, most in itertools.pairwise(bounds)
        if least < most_pairs and group_size <= most
    ]
