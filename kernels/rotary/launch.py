"""Allocate outputs and launch, once for queries and once for keys.  Arguments are checked."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .._launch import accumulator, launch
from .._rows import angles_as_read
from .._runtime import refuses_device
from . import tuning
from .kernel import rotate_kernel


def forward_refuses(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> str | None:
    return refuses_device(query, "query")


def backward_refuses(
    dquery: Tensor, dkey: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> str | None:
    return refuses_device(dquery, "query")


def forward(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    return (
        _rotated(query, cos, sin, interleaved, turn_back=False),
        _rotated(key, cos, sin, interleaved, turn_back=False),
    )


def backward(
    dquery: Tensor, dkey: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    return (
        _rotated(dquery, cos, sin, interleaved, turn_back=True),
        _rotated(dkey, cos, sin, interleaved, turn_back=True),
    )


def _rotated(
    heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, *, turn_back: bool
) -> Tensor:
    out = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    batch, length, num_heads, head_dim = heads.shape
    cos, sin, strides = angles_as_read(cos, sin)
    pairs, num_rows = cos.shape[-1], batch * length * num_heads
    plan = tuning.plan(pairs)
    launch(
        rotate_kernel, (triton.cdiv(num_rows, plan.block_rows),),
        heads, cos, sin, out, num_rows, length, num_heads, head_dim, pairs,
        *heads.stride(), *strides,
        INTERLEAVED=interleaved, TURN_BACK=turn_back,
        BLOCK_ROWS=plan.block_rows, BLOCK_P=plan.block_p, ACC=accumulator(heads.dtype),
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    return out
