"""Launch settings of the rotary kernel.

They change speed, never a bit.  Chosen from ahead-of-time compilation (no spills in 16
bits, 16-byte loads); not yet measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Heads, of whatever tokens, and pairs of channels of each, at a time."""

    block_rows: int
    block_p: int
    num_warps: int
    num_stages: int = 1


# (largest number of pairs, settings), smallest first; the last row serves everything above it.
ROTATE = (
    (16, Plan(block_rows=32, block_p=16, num_warps=4)),
    (32, Plan(block_rows=16, block_p=32, num_warps=4)),
    (64, Plan(block_rows=4, block_p=64, num_warps=2)),
    (1 << 62, Plan(block_rows=4, block_p=128, num_warps=4)),
)


def plan(pairs: int) -> Plan:
    return next(row for limit, row in ROTATE if pairs <= limit)
