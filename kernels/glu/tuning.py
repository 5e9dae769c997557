"""Launch settings of the kernels of gated linear units.

They change speed, never a bit.  Chosen from ahead-of-time compilation (no spills in 16
bits, 16-byte loads); not yet measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    block: int
    num_warps: int
    num_stages: int = 1


# (largest size of a row, settings), smallest first; the last row serves everything above it.
FORWARD = (
    (1_024, Plan(block=1_024, num_warps=4)),
    (1 << 62, Plan(block=4_096, num_warps=8)),
)
BACKWARD = (
    (1_024, Plan(block=1_024, num_warps=4)),
    (1 << 62, Plan(block=2_048, num_warps=8)),
)


def plan(step: str, size: int) -> Plan:
    table = FORWARD if step == "forward" else BACKWARD
    return next(row for limit, row in table if size <= limit)
