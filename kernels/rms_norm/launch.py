"""Allocate outputs and launch.  Arguments are already checked by the caller."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .._launch import accumulator, launch
from .._rows import joint_layout, mergeable, refuses_rows
from .._runtime import refuses_device
from . import tuning
from .kernel import (
    backward_kernel,
    forward_kernel,
    weight_kernel,
    wide_backward_kernel,
    wide_weight_kernel,
)


def forward_refuses(
    input: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    weight_offset: float,
) -> str | None:
    name = "input" if residual is None else "input and residual"
    return refuses_device(input, "input") or refuses_rows(input, name, residual)


def backward_refuses(
    dout: Tensor,
    dtotal: Tensor | None,
    vectors: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    weight_offset: float,
    needs_vectors: bool,
    needs_weight: bool,
) -> str | None:
    return refuses_device(vectors, "input") or refuses_rows(vectors, "input")


def forward(
    input: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    other = input if residual is None else residual
    dtype = torch.promote_types(input.dtype, other.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    out = torch.empty(input.shape, dtype=dtype, device=input.device)
    total = torch.empty(0 if residual is None else input.shape, dtype=dtype, device=input.device)
    rstd = torch.empty(input.shape[:-1], dtype=wide, device=input.device)
    size, num_rows = input.shape[-1], rstd.numel()
    plan = tuning.plan("forward", size)
    inner, [of_input, of_residual] = joint_layout(input, other)
    launch(
        forward_kernel, (triton.cdiv(num_rows, plan.block_rows),),
        input, other, _weight(weight, input), out, total, rstd,
        num_rows, size, inner, *of_input, input.stride(-1), *of_residual, other.stride(-1),
        eps, weight_offset,
        HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None, IS_WHOLE=plan.is_whole,
        BLOCK_ROWS=plan.block_rows, BLOCK_C=plan.block_c, ACC=accumulator(dtype),
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    return out, total, rstd


def backward(
    dout: Tensor,
    dtotal: Tensor | None,
    vectors: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    weight_offset: float,
    needs_vectors: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    dtype, device = vectors.dtype, vectors.device
    size, num_rows = vectors.shape[-1], rstd.numel()
    needs_weight = needs_weight and weight is not None
    plan = tuning.plan("backward", size)
    by_rows = plan if plan.is_whole else tuning.plan("wide_weight", size)
    parts = triton.cdiv(num_rows, by_rows.rows) if needs_weight else 0
    dvectors = torch.empty(vectors.shape if needs_vectors else 0, dtype=dtype, device=device)
    partial = torch.empty((parts, size), dtype=rstd.dtype, device=device)

    dout = mergeable(dout, vectors)
    inner, [of_dout, of_vectors] = joint_layout(dout, vectors)
    sizes = (num_rows, size, inner)
    strides = (*of_dout, dout.stride(-1), *of_vectors, vectors.stride(-1))
    incoming = (
        dout, vectors if dtotal is None else dtotal.contiguous(), vectors, _weight(weight, vectors),
        rstd,
    )  # fmt: skip
    has = {"HAS_DTOTAL": dtotal is not None, "HAS_WEIGHT": weight is not None}
    if plan.is_whole:
        launch(
            backward_kernel, (triton.cdiv(num_rows, plan.rows),),
            *incoming, dvectors, partial, *sizes, *strides, weight_offset, **has,
            NEEDS_VECTORS=needs_vectors, NEEDS_WEIGHT=needs_weight,
            ROWS=plan.rows, BLOCK_ROWS=plan.block_rows, BLOCK_C=plan.block_c,
            ACC=accumulator(dtype), num_warps=plan.num_warps, num_stages=plan.num_stages,
        )  # fmt: skip
    elif needs_vectors:
        launch(
            wide_backward_kernel, (triton.cdiv(num_rows, plan.block_rows),),
            *incoming, dvectors, *sizes, *strides, weight_offset, **has,
            BLOCK_ROWS=plan.block_rows, BLOCK_C=plan.block_c,
            ACC=accumulator(dtype), num_warps=plan.num_warps, num_stages=plan.num_stages,
        )  # fmt: skip
    if weight is None or not needs_weight:
        return dvectors, torch.empty(0, dtype=dtype, device=device)
    if not plan.is_whole:
        blocks_per_row = triton.cdiv(size, by_rows.block_c)
        launch(
            wide_weight_kernel, (parts * blocks_per_row,),
            dout, vectors, rstd, partial, *sizes, blocks_per_row, *strides,
            ROWS=by_rows.rows, BLOCK_ROWS=by_rows.block_rows, BLOCK_C=by_rows.block_c,
            ACC=accumulator(dtype), num_warps=by_rows.num_warps, num_stages=by_rows.num_stages,
        )  # fmt: skip
    return dvectors, _added_up(partial, weight)


def _added_up(partial: Tensor, weight: Tensor) -> Tensor:
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    num_parts, size = partial.shape
    plan = tuning.plan("weight", size)
    launch(
        weight_kernel, (triton.cdiv(size, plan.block_c),),
        partial, dweight, num_parts, size,
        BLOCK_ROWS=plan.block_rows, BLOCK_C=plan.block_c, ACC=accumulator(partial.dtype),
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    return dweight


def _weight(weight: Tensor | None, like: Tensor) -> Tensor:
    """As the kernels read it; ``like`` in place of none."""
    return like if weight is None else weight.contiguous()
