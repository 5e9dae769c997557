"""RMSNorm by the CUDA C++ kernels of ``csrc/rms_norm.cuh``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.kernels._rows import joint_layout, mergeable, refuses_rows
from fastlm.ops.cuda._extension import address, dtype_of, kernels, place, refuses_device
from fastlm.ops.cuda._rows import no_rows, rows_of

# (largest size of a vector, (threads of a block, threads that share a vector, vectors that these go
# through in the backward pass)), smallest first; the last row serves all above it.  Not yet
# measured on a GPU.
PLANS = ((1_024, (128, 32, 32)), (1 << 62, (256, 256, 16)))


def forward_refuses(
    input: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    weight_offset: float,
) -> str | None:
    reason = refuses_device(input, "input")
    if reason is not None or residual is None:
        return reason or refuses_rows(input, "input")
    wide = refuses_device(residual, "residual")
    return wide or refuses_rows(input, "input and residual", residual)


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
    weight = None if weight is None else weight.contiguous()
    inner, [of_input, of_residual] = joint_layout(input, other)
    kernels().rms_norm_forward(
        inputs=kernels().NormInputs(
            vectors=rows_of(input, of_input),
            residual=no_rows(input) if residual is None else rows_of(residual, of_residual),
            weight=address(weight),
            weight_dtype=dtype_of(input if weight is None else weight),
            rows=rstd.numel(),
            inner=inner,
            size=input.shape[-1],
            eps=eps,
            weight_offset=weight_offset,
        ),
        out=address(out),
        total=address(total),
        rstd=address(rstd),
        dtype=dtype_of(out),
        plan=_plan(input),
        **place(input),
    )
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
    dvectors = torch.empty(vectors.shape if needs_vectors else 0, dtype=dtype, device=device)
    dout = mergeable(dout, vectors)
    dtotal = None if dtotal is None else dtotal.contiguous()
    scale = None if weight is None else weight.contiguous()
    _, _, rows_per_team = plan(size)
    teams = -(-num_rows // rows_per_team)
    is_asked = needs_weight and weight is not None
    partial = torch.empty((teams if is_asked else 0, size), dtype=rstd.dtype, device=device)
    inner, [of_dout, of_vectors] = joint_layout(dout, vectors)
    kernels().rms_norm_backward(
        inputs=kernels().NormInputs(
            vectors=rows_of(vectors, of_vectors),
            residual=no_rows(vectors),
            weight=address(scale),
            weight_dtype=dtype_of(vectors if scale is None else scale),
            rows=num_rows,
            inner=inner,
            size=size,
            eps=0.0,
            weight_offset=weight_offset,
        ),
        dout=rows_of(dout, of_dout),
        dtotal=address(dtotal),
        rstd=address(rstd),
        dvectors=address(dvectors if needs_vectors else None),
        partial=address(partial if is_asked else None),
        plan=_plan(vectors),
        **place(vectors),
    )
    if weight is None or not needs_weight:
        return dvectors, torch.empty(0, dtype=dtype, device=device)
    return dvectors, partial.sum(dim=0).to(weight.dtype)


def plan(size: int) -> tuple[int, int, int]:
    """Threads of a block, threads of a team, and rows that a team goes through."""
    return next(row for limit, row in PLANS if size <= limit)


def _plan(input: Tensor) -> Any:
    threads, team, rows_per_team = plan(input.shape[-1])
    return kernels().NormPlan(threads=threads, team=team, rows_per_team=rows_per_team)
