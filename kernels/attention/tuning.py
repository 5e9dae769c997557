"""Launch settings of the attention kernels, and what shared memory they take.

They change speed and rounding, never meaning.  Chosen from ahead-of-time compilation (registers,
spills, shared memory, wgmma on sm_90: docs/attention.md); not yet measured on a GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

from .._runtime import Device


@dataclass(frozen=True)
class Plan:
    """BLOCK_M queries, BLOCK_N keys; ``delta`` has no keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# step -> (largest head_dim, settings), smallest first
Rows = dict[str, tuple[tuple[int, Plan], ...]]

# sm_90 and sm_100: 227 KiB of shared memory.  Above 256 the accumulators of 64 rows do not fit the
# registers, and products of fewer rows run as HMMA.
HOPPER: Rows = {
    "forward": (
        (64, Plan(128, 64, 4, 3)), (128, Plan(128, 64, 8, 3)), (256, Plan(128, 64, 8, 2)),
        (512, Plan(32, 32, 8, 2)),
    ),
    "dkdv": (
        (64, Plan(64, 128, 8, 2)), (128, Plan(32, 128, 8, 2)), (256, Plan(16, 64, 8, 2)),
        (512, Plan(16, 32, 8, 1)),
    ),
    "dq": (
        (64, Plan(128, 64, 8, 2)), (128, Plan(128, 64, 8, 2)), (256, Plan(128, 32, 8, 2)),
        (512, Plan(32, 16, 8, 2)),
    ),
}  # fmt: skip
# with a window there is one loop more, and fewer registers are left
HOPPER_WINDOW: Rows = {
    **HOPPER,
    "forward": (
        (64, Plan(64, 64, 4, 3)), HOPPER["forward"][1], (256, Plan(128, 32, 8, 3)),
        HOPPER["forward"][3],
    ),
}  # fmt: skip
# the others: 99 KiB is the least
PORTABLE: Rows = {
    "forward": (
        (64, Plan(128, 64, 8, 2)), (128, Plan(128, 32, 8, 2)), (256, Plan(64, 32, 8, 1)),
        (512, Plan(32, 16, 8, 2)),
    ),
    "dkdv": (
        (64, Plan(32, 128, 8, 2)), (128, Plan(32, 64, 8, 1)), (256, Plan(16, 64, 8, 1)),
        (512, Plan(16, 16, 8, 1)),
    ),
    "dq": (
        (64, Plan(64, 64, 8, 2)), (128, Plan(64, 32, 8, 2)), (256, Plan(32, 32, 8, 1)),
        (512, Plan(32, 16, 8, 1)),
    ),
}  # fmt: skip
# without tensor cores; float64 is for tests
FLOAT32: Rows = {
    "forward": (
        (64, Plan(32, 32, 4, 1)), (128, Plan(32, 32, 8, 1)), (512, Plan(16, 16, 8, 1)),
    ),
    "dkdv": (
        (64, Plan(32, 32, 8, 1)), (128, Plan(16, 32, 8, 1)), (256, Plan(16, 16, 4, 1)),
        (512, Plan(16, 16, 8, 1)),
    ),
    "dq": ((64, Plan(32, 32, 4, 1)), (512, Plan(16, 16, 8, 1))),
}  # fmt: skip
# float32 whose products may be tf32, on sm_90; elsewhere, and above 256, tf32 takes the rows of
# float32
TF32: Rows = {
    "forward": (
        (64, Plan(128, 32, 8, 2)), (128, Plan(64, 32, 8, 2)), (256, Plan(32, 16, 8, 1)),
    ),
    "dkdv": (
        (64, Plan(32, 64, 8, 2)), (256, Plan(16, 32, 8, 1)),
    ),
    "dq": (
        (64, Plan(64, 32, 8, 2)), (128, Plan(64, 16, 8, 2)), (256, Plan(32, 16, 8, 1)),
    ),
}  # fmt: skip
# Head_dims that are no multiple of 16 bytes.  Elements are loaded one by one, a thread of a tile
# has one column and the address of every row, and fewer rows leave it enough registers.  Products
# of fewer than 64 rows run as HMMA on sm_90.
RAGGED: Rows = {
    "forward": (
        (64, Plan(128, 64, 8, 1)), (128, Plan(64, 32, 8, 1)), (256, Plan(32, 16, 8, 1)),
        (512, Plan(16, 16, 8, 1)),
    ),
    "dkdv": (
        (64, Plan(32, 128, 8, 1)), (128, Plan(32, 32, 8, 1)), (256, Plan(16, 32, 8, 1)),
        (512, Plan(16, 16, 8, 1)),
    ),
    "dq": (
        (64, Plan(64, 32, 8, 1)), (128, Plan(32, 32, 8, 1)), (256, Plan(32, 16, 8, 1)),
        (512, Plan(16, 16, 8, 1)),
    ),
}  # fmt: skip
RAGGED_FLOAT32: Rows = {
    "forward": (
        (64, Plan(32, 32, 8, 1)), (128, Plan(32, 16, 8, 1)), FLOAT32["forward"][-1],
    ),
    "dkdv": (*FLOAT32["dkdv"][:2], FLOAT32["dkdv"][-1]),
    "dq": (
        (64, Plan(16, 32, 4, 1)), (256, Plan(16, 16, 4, 1)), (512, Plan(16, 16, 8, 1)),
    ),
}  # fmt: skip
FLOAT64: Rows = {
    "forward": ((512, Plan(16, 16, 8, 1)),),
    "dkdv": ((512, Plan(16, 16, 8, 1)),),
    "dq": ((512, Plan(16, 16, 8, 1)),),
}
DELTA: Rows = {
    "delta": ((256, Plan(32, 0, 4, 1)), (512, Plan(16, 0, 4, 1))),
}

MAX_HEAD_DIM = 512
# Keys and values that programs running at the same time share; below the L2 of sm_80, 40 MB.
SECTION_BYTES = 32 * 2**20
# Shared memory for the barriers that sm_100 waits at, and to begin the tiles behind them at a
# multiple of as much; float64 is never compiled.
_BARRIERS = 1024

_BY_ARCH = {
    80: PORTABLE, 86: PORTABLE, 89: PORTABLE, 90: HOPPER, 100: HOPPER, 120: PORTABLE,
}  # fmt: skip


@functools.cache
def plan(
    step: str,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: Device,
    has_window: bool = False,
    tf32: bool = False,
) -> Plan | None:
    """The row for ``step``: forward, delta, dkdv or dq; None where none fits the device."""
    for table in _tables(step, head_dim, value_dim, dtype, device.arch, has_window, tf32):
        for limit, row in table[step]:
            if max(head_dim, value_dim) <= limit:
                needed = shared_memory(step, row, head_dim, value_dim, dtype)
                if needed <= device.shared_memory:
                    return row
                break
    return None


def _tables(
    step: str,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    arch: int,
    has_window: bool,
    tf32: bool,
) -> tuple[Rows, ...]:
    """Preferred first.  An unknown arch takes its elder's."""
    ragged = is_ragged(head_dim, value_dim, dtype)
    if step == "delta":
        return (DELTA,)
    if dtype == torch.float64:
        return (FLOAT64,)
    if dtype == torch.float32:
        if ragged:
            return (RAGGED_FLOAT32,)
        return (TF32, FLOAT32) if tf32 and 90 <= arch < 100 else (FLOAT32,)
    if ragged:
        return (RAGGED,)
    if _BY_ARCH[max(known for known in _BY_ARCH if known <= arch)] is PORTABLE:
        return (PORTABLE,)
    return (HOPPER_WINDOW if has_window else HOPPER, PORTABLE)


def is_ragged(head_dim: int, value_dim: int, dtype: torch.dtype) -> bool:
    """Whether rows of a tile are no multiple of 16 bytes, and so loaded one element at a time."""
    return any(dim * dtype.itemsize % 16 for dim in (head_dim, value_dim))


def shared_memory(step: str, row: Plan, head_dim: int, value_dim: int, dtype: torch.dtype) -> int:
    """Bytes that a program takes at most.

    Tiles that it keeps, once; tiles that it walks over, for every stage; one of these laid out for
    another of its products; and tiles of scores in the precision they are added in.
    """
    wide = max(4, dtype.itemsize)
    if step == "delta":
        return row.block_m * row.num_warps * wide
    query, value = block(head_dim), block(value_dim)
    kept, walked = {
        "forward": (row.block_m * query, row.block_n * (query + value)),
        "dq": (row.block_m * (query + value), row.block_n * (query + value)),
        "dkdv": (row.block_n * (query + value), row.block_m * (query + value)),
    }[step]
    tiles = kept + row.num_stages * walked
    scores = row.block_m * row.block_n
    if step == "dq" and row.num_stages == 1:
        # loaded through registers, key is laid out for either of its two products, and the second
        # layout may take the place of value
        tiles += row.block_n * max(0, query - value)
    if step == "dkdv":
        # loaded through registers, or on sm_100, query or dout is laid out for either of its two
        # products; walked in stages, sm_100 keeps a second tile of scores
        tiles += row.block_m * max(query, value)
        scores *= min(row.num_stages, 2)
        # lse and delta
        scores += 2 * row.num_stages * row.block_m
    barriers = 0 if dtype == torch.float64 else _BARRIERS
    return tiles * dtype.itemsize + scores * wide + barriers


def block(dim: int) -> int:
    """Columns of a tile: a product needs 16 or more."""
    return max(16, triton.next_power_of_2(dim))


def heads_per_section(heads: int, group_size: int, bytes_per_group: int) -> int:
    """How many of ``heads`` run together, so that what their groups read fits the L2 cache."""
    groups = max(1, SECTION_BYTES // max(1, bytes_per_group))
    return max(1, min(heads, groups * group_size))
