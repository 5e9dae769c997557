"""Launch settings of the attention kernels.

They change speed and rounding, never meaning.  Chosen from ahead-of-time compilation (registers,
spills, shared memory, wgmma on sm_90: docs/attention.md); not yet measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Plan:
    """BLOCK_M queries, BLOCK_N keys; ``delta`` has no keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# step -> (largest head_dim, settings), smallest first
Rows = dict[str, tuple[tuple[int, Plan], ...]]

# sm_90 and sm_100: 227 KiB of shared memory
HOPPER: Rows = {
    "forward": ((64, Plan(128, 64, 4, 3)), (128, Plan(128, 64, 8, 3)), (256, Plan(128, 64, 8, 2))),
    "dkdv": ((64, Plan(64, 128, 8, 2)), (128, Plan(32, 128, 8, 2)), (256, Plan(16, 64, 8, 2))),
    "dq": ((64, Plan(128, 64, 8, 2)), (128, Plan(128, 64, 8, 2)), (256, Plan(128, 32, 8, 2))),
}
# with a window there is one loop more, and fewer registers are left
HOPPER_WINDOW: Rows = {
    **HOPPER,
    "forward": ((64, Plan(64, 64, 4, 3)), HOPPER["forward"][1], (256, Plan(128, 32, 8, 3))),
}
# the others: 99 KiB is the least
PORTABLE: Rows = {
    "forward": ((64, Plan(128, 64, 8, 2)), (128, Plan(128, 32, 8, 2)), (256, Plan(64, 32, 8, 1))),
    "dkdv": ((64, Plan(32, 128, 8, 2)), (128, Plan(32, 64, 8, 1)), (256, Plan(16, 64, 8, 1))),
    "dq": ((64, Plan(64, 64, 8, 2)), (128, Plan(64, 32, 8, 2)), (256, Plan(32, 32, 8, 1))),
}
# without tensor cores; float64 is for tests
FLOAT32: Rows = {
    "forward": ((64, Plan(32, 32, 4, 1)), (128, Plan(32, 32, 8, 1)), (256, Plan(16, 16, 8, 1))),
    "dkdv": ((64, Plan(32, 32, 8, 1)), (128, Plan(16, 32, 8, 1)), (256, Plan(16, 16, 8, 1))),
    "dq": ((64, Plan(32, 32, 4, 1)), (128, Plan(16, 16, 8, 1)), (256, Plan(16, 16, 4, 1))),
}
# Head_dims that are no multiple of 16 bytes.  Elements are loaded one by one, a thread of a tile
# has one column and the address of every row, and fewer rows leave it enough registers.  Products
# of fewer than 64 rows run as HMMA on sm_90.
RAGGED: Rows = {
    "forward": ((64, Plan(128, 64, 8, 1)), (128, Plan(64, 32, 8, 1)), (256, Plan(32, 16, 8, 1))),
    "dkdv": ((64, Plan(32, 128, 8, 1)), (128, Plan(32, 32, 8, 1)), (256, Plan(16, 32, 8, 1))),
    "dq": ((64, Plan(64, 32, 8, 1)), (128, Plan(32, 32, 8, 1)), (256, Plan(32, 16, 8, 1))),
}
RAGGED_FLOAT32: Rows = {**FLOAT32, "dq": ((64, Plan(32, 16, 8, 1)), *FLOAT32["dq"][1:])}
FLOAT64: Rows = {
    "forward": ((256, Plan(16, 16, 8, 1)),),
    "dkdv": ((256, Plan(16, 16, 8, 1)),),
    "dq": ((256, Plan(16, 16, 8, 1)),),
}
DELTA: Rows = {"delta": ((64, Plan(64, 0, 4, 1)), (256, Plan(32, 0, 4, 1)))}

MAX_HEAD_DIM = 256
# Keys and values that programs running at the same time share; below the L2 of sm_80, 40 MB.
SECTION_BYTES = 32 * 2**20

_BY_ARCH = {
    80: PORTABLE, 86: PORTABLE, 89: PORTABLE, 90: HOPPER, 100: HOPPER, 120: PORTABLE,
}  # fmt: skip


def plan(
    step: str,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    arch: int,
    has_window: bool = False,
) -> Plan:
    """The row for ``step``: forward, delta, dkdv or dq.  An unknown arch takes its elder's."""
    is_ragged = head_dim * dtype.itemsize % 16 or value_dim * dtype.itemsize % 16
    if step == "delta":
        rows = DELTA
    elif dtype == torch.float64:
        rows = FLOAT64
    elif dtype == torch.float32:
        rows = RAGGED_FLOAT32 if is_ragged else FLOAT32
    elif is_ragged:
        rows = RAGGED
    else:
        rows = _BY_ARCH[max(known for known in _BY_ARCH if known <= arch)]
        if has_window and rows is HOPPER:
            rows = HOPPER_WINDOW
    return next(row for limit, row in rows[step] if max(head_dim, value_dim) <= limit)


def heads_per_section(heads: int, group_size: int, bytes_per_group: int) -> int:
    """How many of ``heads`` run together, so that what their groups read fits the L2 cache."""
    groups = max(1, SECTION_BYTES // max(1, bytes_per_group))
    return max(1, min(heads, groups * group_size))
