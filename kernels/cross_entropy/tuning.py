"""Launch settings of the cross-entropy kernels.

They change speed and rounding, never meaning.  Chosen from ahead-of-time compilation (no spills,
16-byte loads); not yet measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    block_v: int
    num_warps: int
    num_stages: int = 1


# (largest vocab_size, settings), smallest first; the last row serves everything above it.
FORWARD = (
    (1_024, Plan(block_v=1_024, num_warps=4)),
    (4_096, Plan(block_v=4_096, num_warps=8)),
    (1 << 62, Plan(block_v=8_192, num_warps=16)),
)
# With statistics or label smoothing a lane keeps more than twice as much in registers.
FORWARD_WITH_SUMS = (
    (1_024, Plan(block_v=1_024, num_warps=8)),
    (1 << 62, Plan(block_v=4_096, num_warps=16)),
)
BACKWARD = (
    (1_024, Plan(block_v=1_024, num_warps=4)),
    (1 << 62, Plan(block_v=4_096, num_warps=8)),
)


def plan(step: str, vocab_size: int, *, with_sums: bool = False) -> Plan:
    """``with_sums``: the forward kernel also gathers statistics, or the smoothed loss."""
    forward = FORWARD_WITH_SUMS if with_sums else FORWARD
    table = forward if step == "forward" else BACKWARD
    return next(row for limit, row in table if vocab_size <= limit)
