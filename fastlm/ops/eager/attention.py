"""Causal attention by torch's own flash attention, on CPU and CUDA.

Its operators are called directly because ``scaled_dot_product_attention`` drops the lse.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

# of the four only this one has a binding, which is faster to call
_flash_cpu = torch._scaled_dot_product_flash_attention_for_cpu
_flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_flash_cuda = torch.ops.aten._scaled_dot_product_flash_attention.default
_flash_cuda_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default


def forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, num_queries, heads, _ = query.shape
    num_keys, kv_heads, value_dim = value.shape[1:]
    blind = max(0, num_queries - num_keys)
    if batch == 0 or num_queries == blind:
        return _nothing_seen(query, value)
    if blind:
        out, lse = _nothing_seen(query, value)
        out[:, blind:], lse[..., blind:] = forward(query[:, blind:], key, value, scale)
        return out, lse
    if num_queries == 1 and heads > kv_heads and not query.is_cuda:
        # query heads that share keys become queries of one head, and read each key once
        group = query[:, 0].unflatten(1, (kv_heads, -1)).transpose(1, 2)
        out, lse = _flash(group, key, value, scale, masked=False)
        out = out.transpose(1, 2).reshape(batch, 1, heads, value_dim)
        return out, lse.reshape(batch, heads, 1)
    out, lse = _flash(query, key, value, scale, masked=num_queries > 1)
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
    """One operator gives all three gradients, so leaving one out would save no time."""
    num_queries, head_dim = query.shape[1], query.shape[3]
    num_keys, value_dim = value.shape[1], value.shape[3]
    blind = max(0, num_queries - num_keys)
    if query.shape[0] == 0 or num_queries == blind:
        dquery, dkey, dvalue = (x.new_zeros(x.shape) for x in (query, key, value))
    elif blind:
        dlse = None if dlse is None else dlse[..., blind:]
        seeing, dkey, dvalue = backward(
            dout[:, blind:], dlse, query[:, blind:], key, value, out[:, blind:], lse[..., blind:],
            scale, True, need_dkey_dvalue,
        )  # fmt: skip
        dquery = F.pad(seeing, (0, 0, 0, 0, blind, 0))
    else:
        width = _width(head_dim, value_dim + (dlse is not None), query)
        q, k, v, do, o = (_ready(x, width) for x in (query, key, value, dout, out))
        if dlse is not None:
            # a value column of ones adds dlse to each dout value^T, which is what the lse asks for;
            # in out that column is zero, so the row sums of dout out stay as they were
            v[..., value_dim] = 1.0
            do[..., value_dim] = dlse.to(do.dtype)
        grads = _flash_backward(do, q, k, v, o, lse, scale, masked=num_queries > 1)
        dquery, dkey, dvalue = (
            _finish(grad, like) for grad, like in zip(grads, (query, key, value), strict=True)
        )
    empty = query.new_empty(0)
    return (
        dquery if need_dquery else empty,
        dkey if need_dkey_dvalue else empty.clone(),
        dvalue if need_dkey_dvalue else empty.clone(),
    )


def _nothing_seen(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch, num_queries, heads, _ = query.shape
    out = query.new_zeros((batch, num_queries, heads, value.shape[-1]))
    dtype = torch.promote_types(query.dtype, torch.float32)
    return out, query.new_full((batch, heads, num_queries), -torch.inf, dtype=dtype)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, scale: float, masked: bool
) -> tuple[Tensor, Tensor]:
    value_dim = value.shape[-1]
    width = _width(query.shape[-1], value_dim, query)
    q, k, v = _ready(query, width), _ready(key, width), _ready(value, width)
    if query.is_cuda:
        out, lse = _flash_cuda(q, k, v, 0.0, masked, False, scale=scale)[:2]
    else:
        square = q.shape[2] == k.shape[2]
        mask = _mask(q, k) if masked and not square else None
        out, lse = _flash_cpu(q, k, v, 0.0, masked and square, attn_mask=mask, scale=scale)
    return _finish(out, query, value_dim), lse.contiguous()


def _flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    masked: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.is_cuda:
        # of the lse this operator reads no strides
        no_seed = torch.empty(2, dtype=torch.uint64, device=q.device)
        return _flash_cuda_backward(
            dout, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, masked,
            no_seed, no_seed, scale=scale,
        )  # fmt: skip
    square = q.shape[2] == k.shape[2]
    mask = _mask(q, k) if masked and not square else None
    return _flash_cpu_backward(
        dout, q, k, v, out, lse, 0.0, masked and square, attn_mask=mask, scale=scale
    )


def _mask(q: Tensor, k: Tensor) -> Tensor:
    """``(T, S)`` to add to scores.  CUDA's operator aligns the ends itself, the CPU's does not."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    mask = q.new_full((num_queries, num_keys), -torch.inf)
    return mask.triu_(num_keys - num_queries + 1)


def _width(head_dim: int, value_dim: int, query: Tensor) -> int:
    """torch wants one head_dim for all, on CUDA a multiple of 8."""
    width = max(head_dim, value_dim)
    return -(-width // 8) * 8 if query.is_cuda else width


def _ready(x: Tensor, width: int) -> Tensor:
    """``(B, T, H, D)`` to ``(B, H, T, width)``: a view, unless torch takes no such view."""
    if x.itemsize == 2 and not x.is_cuda:
        x = x.to(_cpu_dtype(x.dtype))
    if x.shape[-1] != width:
        x = F.pad(x, (0, width - x.shape[-1]))
    elif x.stride(3) != 1:
        x = x.contiguous()
    return x.transpose(1, 2)


def _finish(x: Tensor, like: Tensor, dim: int | None = None) -> Tensor:
    """``(B, H, T, width)`` to contiguous ``(B, T, H, D)`` in the dtype of ``like``."""
    x, dim = x.transpose(1, 2), dim or like.shape[-1]
    if x.shape[-1] != dim:
        x = x[..., :dim]
    if x.dtype != like.dtype:
        x = x.to(like.dtype)
    return x.contiguous()


@functools.cache
def _cpu_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the CPU multiplies a 16-bit ``dtype`` in: without instructions for it, torch crawls."""
    mkldnn = torch.ops.mkldnn
    bf16 = dtype == torch.bfloat16
    native = mkldnn._is_mkldnn_bf16_supported if bf16 else mkldnn._is_mkldnn_fp16_supported
    return dtype if native() else torch.float32


def _refuses(query: Tensor, scale: float) -> str | None:
    if query.is_cpu:
        return None
    if query.is_cuda and query.itemsize != 2:
        name = str(query.dtype).removeprefix("torch.")
        return f"torch's flash attention on CUDA takes bfloat16 and float16, not {name}"
    if query.is_cuda and scale < torch.finfo(torch.float32).tiny:
        return (
            "torch's flash attention on CUDA masks scores before it scales them: "
            f"scale must be a normal float32 above 0, not {scale}"
        )
    if not query.is_cuda:
        return f"torch's flash attention has no operator with lse on {query.device.type}"
    return None


def forward_refuses(query: Tensor, key: Tensor, value: Tensor, scale: float) -> str | None:
    return _refuses(query, scale)


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
    if query.is_cuda and dlse is not None:
        width = _width(query.shape[-1], value.shape[-1] + 1, query)
        if width > 256:
            return (
                "torch's flash attention on CUDA ends at a head_dim of 256, and the gradient of "
                f"lse takes a column beside value's {value.shape[-1]}"
            )
    return _refuses(query, scale)
