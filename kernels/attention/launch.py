"""Allocate outputs and launch.  Arguments are already checked by the caller."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .._launch import accumulator, launch
from .._runtime import device_of, refuses_device
from . import tuning
from .backward import delta_kernel, dkdv_kernel, dq_kernel
from .forward import forward_kernel


def _refuses(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    reason = refuses_device(query, "query")
    if reason is not None:
        return reason
    for name, x in (("query", query), ("key", key), ("value", value)):
        # the stride of a dimension of size 1 is never used
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            return f"the last dimension of {name} has stride {x.stride(-1)}: it must be contiguous"
        if x.shape[-1] > tuning.MAX_HEAD_DIM:
            return (
                f"{name} has a head_dim of {x.shape[-1]}, the kernels end at {tuning.MAX_HEAD_DIM}"
            )
    return None


def forward_refuses(query: Tensor, key: Tensor, value: Tensor, scale: float) -> str | None:
    return _refuses(query, key, value)


def backward_refuses(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    need_dquery: bool,
    need_dkey_dvalue: bool,
) -> str | None:
    return _refuses(query, key, value)


def forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, num_queries, heads, _ = query.shape
    num_keys, kv_heads, value_dim = value.shape[1:]
    out = query.new_empty((batch, num_queries, heads, value_dim))
    lse = query.new_empty(
        (batch, heads, num_queries), dtype=torch.promote_types(query.dtype, torch.float32)
    )
    plan = _plan("forward", query, value)
    launch(
        forward_kernel, (triton.cdiv(num_queries, plan.block_m) * batch * heads,),
        query, key, value, out, lse,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        batch * heads, heads, heads // kv_heads, num_queries, num_keys,
        _section(query, key, value), scale,
        BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, **_dims(query, value),
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    need_dquery: bool,
    need_dkey_dvalue: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_queries, heads, _ = query.shape
    num_keys, kv_heads, value_dim = value.shape[1:]
    group_size = heads // kv_heads
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    out, lse = out.contiguous(), lse.contiguous()
    dims = _dims(query, value)
    sizes = (num_queries, num_keys)
    delta = torch.empty_like(lse)
    plan = _plan("delta", query, value)
    launch(
        delta_kernel, (triton.cdiv(num_queries, plan.block_m) * batch * heads,),
        out, dout, lse, lse if dlse is None else dlse.contiguous(), delta,
        *dout.stride()[:3], heads, num_queries,
        VALUE_DIM=value_dim, BLOCK_M=plan.block_m, BLOCK_V=dims["BLOCK_V"], ACC=dims["ACC"],
        HAS_DLSE=dlse is not None, num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip

    dquery, dkey, dvalue = (x.new_empty(0) for x in (query, key, value))
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *dout.stride()[:3])
    if need_dkey_dvalue:
        dkey, dvalue = key.new_empty(key.shape), value.new_empty(value.shape)
        plan = _plan("dkdv", query, value)
        query_bytes = num_queries * group_size * (query.shape[-1] + value_dim) * query.itemsize
        launch(
            dkdv_kernel, (triton.cdiv(num_keys, plan.block_n) * batch * kv_heads,),
            query, key, value, dout, lse, delta, dkey, dvalue, *strides,
            batch * kv_heads, kv_heads, group_size, *sizes,
            tuning.heads_per_section(batch * kv_heads, 1, query_bytes), scale,
            BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, **dims,
            num_warps=plan.num_warps, num_stages=plan.num_stages,
        )  # fmt: skip
    if need_dquery:
        dquery = query.new_empty(query.shape)
        plan = _plan("dq", query, value)
        launch(
            dq_kernel, (triton.cdiv(num_queries, plan.block_m) * batch * heads,),
            query, key, value, dout, lse, delta, dquery, *strides,
            batch * heads, heads, group_size, *sizes,
            _section(query, key, value), scale,
            BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, **dims,
            num_warps=plan.num_warps, num_stages=plan.num_stages,
        )  # fmt: skip
    return dquery, dkey, dvalue


def _plan(step: str, query: Tensor, value: Tensor) -> tuning.Plan:
    arch = device_of(query).arch
    return tuning.plan(step, query.shape[-1], value.shape[-1], query.dtype, arch)


def _dims(query: Tensor, value: Tensor) -> dict[str, Any]:
    """The compile-time values that are not in the plan.  A product needs 16 columns or more."""
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    return {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_V": max(16, triton.next_power_of_2(value_dim)),
        "ACC": accumulator(query.dtype),
    }


def _section(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Query heads that walk over their keys at the same time."""
    batch, _, heads, head_dim = query.shape
    _, num_keys, kv_heads, value_dim = value.shape
    key_bytes = num_keys * (head_dim + value_dim) * key.itemsize
    return tuning.heads_per_section(batch * heads, heads // kv_heads, key_bytes)
