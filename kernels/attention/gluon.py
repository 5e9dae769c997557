"""Launch the Gluon kernels.  Arguments are already checked by the caller.

They serve plain causal attention of Hopper GPUs: everything else is refused by name.  The backward
is that of the portable kernels.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .._launch import launch
from .._runtime import INTERPRETED, device_of, refuses_device
from . import gluon_tuning as tuning
from .gluon_forward import forward_kernel
from .launch import backward, backward_refuses, section

__all__ = ["backward", "backward_refuses", "forward", "forward_refuses"]

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def forward_refuses(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    scale: float,
    window_size: int | None,
    softcap: float | None,
) -> str | None:
    if INTERPRETED:
        return "Triton's interpreter cannot run Gluon kernels"
    reason = refuses_device(query, "query")
    if reason is not None:
        return reason
    arch = device_of(query).arch
    if arch != 90:
        return f"the Gluon kernel is for sm_90, query is on sm_{arch}"
    options = {
        "sinks": sinks, "cu_seqlens_q": cu_seqlens_q, "key_start": key_start, "key_end": key_end,
        "window_size": window_size, "softcap": softcap,
    }  # fmt: skip
    for name, option in options.items():
        if option is not None:
            return f"the Gluon kernel has no {name}"
    if query.dtype not in _DTYPES:
        dtype = str(query.dtype).removeprefix("torch.")
        return f"the Gluon kernel is for bfloat16 and float16, query is {dtype}"
    if query.shape[-1] not in tuning.FORWARD or value.shape[-1] != query.shape[-1]:
        dims = ", ".join(map(str, tuning.FORWARD))
        return (
            f"the Gluon kernel is for a head_dim of {dims} of query, key and value, "
            f"got {query.shape[-1]} and {value.shape[-1]}"
        )
    if scale <= 0:
        return f"the Gluon kernel needs a scale above 0, got {scale}"
    for name, x in (("query", query), ("key", key), ("value", value)):
        reason = _refuses_copies(name, x)
        if reason is not None:
            return reason
    return None


def _refuses_copies(name: str, x: Tensor) -> str | None:
    """Why TMA does not read ``x``."""
    if x.numel() == 0:
        return f"the Gluon kernel needs elements, {name} has none"
    if x.stride(-1) != 1:
        return f"the last dimension of {name} has stride {x.stride(-1)}: it must be contiguous"
    units = 16 // x.itemsize
    used = [stride for stride, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1]
    if any(stride <= 0 or stride % units for stride in used) or x.data_ptr() % 16:
        return (
            f"TMA needs {name} to begin at a multiple of 16 bytes and its strides to be such "
            f"multiples, got strides {tuple(x.stride())}"
        )
    return None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    scale: float,
    window_size: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    batch, num_queries, heads, head_dim = query.shape
    num_keys, kv_heads = key.shape[1:3]
    out = query.new_empty(query.shape)
    lse = query.new_empty((batch, heads, num_queries), dtype=torch.float32)
    plan = tuning.FORWARD[head_dim]
    blocks = triton.cdiv(num_queries, 2 * plan.block_m)
    launch(
        forward_kernel, (blocks * batch * heads,),
        _descriptor(query, plan.block_m), _descriptor(key, plan.block_n),
        _descriptor(value, plan.block_n), out, lse,
        batch * heads, heads, heads // kv_heads, num_queries, num_keys,
        section(query, key, value), scale,
        HEAD_DIM=head_dim, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, STAGES=plan.stages,
        CONSUMER_REGISTERS=plan.consumer_registers, COPY_REGISTERS=plan.copy_registers,
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    return out, lse


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """For tiles of ``rows`` tokens of one head."""
    block = [1, rows, 1, x.shape[-1]]
    layout = gl.NVMMASharedLayout.get_default_for(block, _DTYPES[x.dtype])
    # the stride of a dimension of size 1 is never used, but must be one that TMA takes
    strides = [
        stride if size > 1 else x.shape[-1]
        for stride, size in zip(x.stride(), x.shape, strict=True)
    ]
    return TensorDescriptor(x, list(x.shape), strides, block, layout)
