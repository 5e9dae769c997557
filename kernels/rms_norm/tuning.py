"""Launch settings of the RMSNorm kernels.

They change speed and rounding, never meaning.  Chosen from ahead-of-time compilation (no spills in
16 bits, 16-byte loads); not yet measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Vectors at a time and elements of each.

    Attributes:
        is_whole: ``block_c`` elements are all of a vector, which then is read once.
        rows: Vectors that one program of the backward pass goes through, a multiple of
            ``block_rows``: their part of the weight's gradient is one row of the partial sums.
    """

    block_rows: int
    block_c: int
    num_warps: int
    num_stages: int = 1
    is_whole: bool = True
    rows: int = 0


# (largest size of a vector, settings), smallest first; the last row serves everything above it.
FORWARD = (
    (32, Plan(block_rows=128, block_c=32, num_warps=4)),
    (128, Plan(block_rows=16, block_c=128, num_warps=4)),
    (256, Plan(block_rows=8, block_c=256, num_warps=4)),
    (512, Plan(block_rows=4, block_c=512, num_warps=4)),
    (1_024, Plan(block_rows=2, block_c=1_024, num_warps=4)),
    (2_048, Plan(block_rows=1, block_c=2_048, num_warps=4)),
    (4_096, Plan(block_rows=1, block_c=4_096, num_warps=8)),
    (8_192, Plan(block_rows=1, block_c=8_192, num_warps=16)),
    (16_384, Plan(block_rows=1, block_c=16_384, num_warps=16)),
    (1 << 62, Plan(block_rows=1, block_c=8_192, num_warps=16, is_whole=False)),
)
# A lane keeps the weight and the sums for its gradient besides the vector and its gradient.
BACKWARD = (
    (32, Plan(block_rows=64, block_c=32, num_warps=4, rows=256)),
    (128, Plan(block_rows=16, block_c=128, num_warps=4, rows=128)),
    (256, Plan(block_rows=4, block_c=256, num_warps=2, rows=64)),
    (512, Plan(block_rows=2, block_c=512, num_warps=2, rows=32)),
    (1_024, Plan(block_rows=2, block_c=1_024, num_warps=4, rows=16)),
    (2_048, Plan(block_rows=1, block_c=2_048, num_warps=4, rows=16)),
    (4_096, Plan(block_rows=1, block_c=4_096, num_warps=8, rows=16)),
    (8_192, Plan(block_rows=1, block_c=8_192, num_warps=16, rows=16)),
    (1 << 62, Plan(block_rows=1, block_c=4_096, num_warps=16, is_whole=False)),
)
# The weight's gradient of vectors that no lane holds whole.
WIDE_WEIGHT = Plan(block_rows=8, block_c=256, num_warps=4, rows=128)
# Adds up the partial sums.
WEIGHT = Plan(block_rows=64, block_c=32, num_warps=4)


def plan(step: str, size: int) -> Plan:
    """``step``: ``"forward"``, ``"backward"``, ``"wide_weight"`` or ``"weight"``."""
    if step in ("wide_weight", "weight"):
        return WIDE_WEIGHT if step == "wide_weight" else WEIGHT
    table = FORWARD if step == "forward" else BACKWARD
    return next(row for limit, row in table if size <= limit)
