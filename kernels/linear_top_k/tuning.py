"""Launch settings of the top-k kernel.

They change speed and rounding, never meaning.  Chosen from ahead-of-time compilation (no spills,
16-byte loads); not yet measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

# Each class asked for costs a round over the lanes, one after another.  From about this many on, a
# selection that reads the row a few times more, as torch's does, is expected to be the cheaper one.
MOST_ASKED = 128


@dataclass(frozen=True)
class Plan:
    """``block_v`` lanes, and how many elements of one lane are looked through at once."""

    block_v: int
    block_lane: int
    num_warps: int
    num_stages: int = 1


# (largest vocab_size, settings), smallest first; the last row serves everything above it.  More
# lanes are read again in fewer bytes, and fewer are compared in less time.
FORWARD = (
    (1_024, Plan(block_v=1_024, block_lane=1, num_warps=4)),
    (65_536, Plan(block_v=2_048, block_lane=32, num_warps=8)),
    (1 << 62, Plan(block_v=4_096, block_lane=64, num_warps=16)),
)


def plan(vocab_size: int) -> Plan:
    return next(row for limit, row in FORWARD if vocab_size <= limit)
