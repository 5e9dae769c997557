"""Launch settings of the linear cross-entropy kernels.

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
LOSS = (
    (1_024, Plan(block_v=1_024, num_warps=4)),
    (1 << 62, Plan(block_v=4_096, num_warps=16)),
)
# Six numbers a lane: in 16 warps, of 128 registers a thread, they would spill.
SHARD = (
    (1_024, Plan(block_v=1_024, num_warps=4)),
    (1 << 62, Plan(block_v=2_048, num_warps=8)),
)
# Up to 16,384 a row is one block and stays in registers between its two passes.
GRADIENT = (
    (1_024, Plan(block_v=1_024, num_warps=4)),
    (4_096, Plan(block_v=4_096, num_warps=8)),
    (8_192, Plan(block_v=8_192, num_warps=8)),
    (16_384, Plan(block_v=16_384, num_warps=16)),
    (1 << 62, Plan(block_v=8_192, num_warps=16)),
)
# Options keep more in registers; above 8,192 classes a row is then read twice.
GRADIENT_WITH_OPTIONS = (
    (1_024, Plan(block_v=1_024, num_warps=8)),
    (4_096, Plan(block_v=4_096, num_warps=16)),
    (8_192, Plan(block_v=8_192, num_warps=8)),
    (1 << 62, Plan(block_v=4_096, num_warps=16)),
)
TABLES = {
    "loss": LOSS,
    "shard": SHARD,
    "gradient": GRADIENT,
    "gradient with options": GRADIENT_WITH_OPTIONS,
}


@dataclass(frozen=True)
class BiasPlan:
    block_r: int
    block_v: int
    num_warps: int
    num_stages: int = 1


BIAS = BiasPlan(block_r=16, block_v=128, num_warps=4)


def plan(step: str, vocab_size: int) -> Plan:
    return next(row for limit, row in TABLES[step] if vocab_size <= limit)
