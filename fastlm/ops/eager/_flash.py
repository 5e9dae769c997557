"""torch's own flash attention, on CPU and CUDA, with its lse and its gradient.

Its operators are called directly because ``scaled_dot_product_attention`` drops the lse.  Tensors
are ``(B, heads, length, width)``, as :func:`ready` makes them.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

# of the four only this one has a binding, which is faster to call
_cpu = torch._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_cuda = torch.ops.aten._scaled_dot_product_flash_attention.default
_cuda_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default


def is_plain(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the CPU's kernel takes ``(B, T, H, D)`` as they are: nothing to pad, cast or cut."""
    shape = query.shape
    return (
        query.is_cpu
        and query.itemsize > 2
        and shape[1] == key.shape[1] > 1
        and shape[3] == value.shape[3]
        and shape[0] > 0
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
    )


def flash_plain(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The whole of a call that :func:`is_plain`; of a small one this Python is a tenth."""
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    out, lse = _cpu(q, k, v, 0.0, True, scale=scale)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def flash_plain_out(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """out alone, as torch differentiates it."""
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    # torch lays it out like query
    return _cpu(q, k, v, 0.0, True, scale=scale)[0].transpose(1, 2).contiguous()


def flash_plain_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients, contiguous."""
    if dout.stride(3) != 1:
        dout = dout.contiguous()
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    grads = _cpu_backward(
        dout.transpose(1, 2), q, k, v, out.transpose(1, 2), lse, 0.0, True, scale=scale
    )
    dquery, dkey, dvalue = grads
    return (
        dquery.transpose(1, 2).contiguous(),
        dkey.transpose(1, 2).contiguous(),
        dvalue.transpose(1, 2).contiguous(),
    )


def flash(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool, added: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out and lse; queries see all keys, or those up to their own end, or what ``added`` leaves.

    On a CPU the lse of a query that sees nothing is 0.

    Args:
        q: ``(B, H, T, width)``.
        k: ``(B, G, S, width)``.
        v: ``(B, G, S, width)``.
        scale: Factor of the scores.
        causal: With T == S, or on CUDA any, aligned at the ends.
        added: To scores, from :func:`added_band`; CPU only.
    """
    if q.is_cuda:
        return _cuda(q, k, v, 0.0, causal, False, scale=scale)[:2]
    heads, kv_heads = q.shape[1], k.shape[1]
    if q.shape[2] == 1 and heads > kv_heads and added is None:
        # query heads that share keys become queries of one head, and read each key once
        out, lse = _cpu(q.view(len(q), kv_heads, -1, q.shape[3]), k, v, 0.0, False, scale=scale)
        return out.reshape(len(q), heads, 1, -1), lse.reshape(len(q), heads, 1)
    return _cpu(q, k, v, 0.0, causal, attn_mask=added, scale=scale)


def flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *,
    causal: bool,
    added: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    if q.is_cuda:
        # of the lse this operator reads no strides
        no_seed = torch.empty(2, dtype=torch.uint64, device=q.device)
        return _cuda_backward(
            dout, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal,
            no_seed, no_seed, scale=scale,
        )  # fmt: skip
    return _cpu_backward(dout, q, k, v, out, lse, 0.0, causal, attn_mask=added, scale=scale)


def added_band(num_queries: int, num_keys: int, diagonal: int, width: int, query: Tensor) -> Tensor:
    """0 and -inf: query t sees the last ``width`` keys up to t + diagonal.

    In the dtype that :func:`ready` makes ``query``; CPU only.
    """
    dtype = _cpu_dtype(query.dtype) if query.itemsize == 2 else query.dtype
    added = torch.full((num_queries, num_keys), -torch.inf, dtype=dtype).triu_(diagonal + 1)
    if width < num_queries + diagonal:
        added += torch.full_like(added, -torch.inf).tril_(diagonal - width)
    return added


def width_of(head_dim: int, value_dim: int, like: Tensor) -> int:
    """torch wants one head_dim for all, on CUDA a multiple of 8."""
    width = max(head_dim, value_dim)
    return -(-width // 8) * 8 if like.is_cuda else width


def ready(x: Tensor, width: int) -> Tensor:
    """``(B, T, H, D)`` to ``(B, H, T, width)``: a view, unless torch takes no such view."""
    if x.itemsize == 2:
        x = x.to(dtype_of(x))
    if x.shape[-1] != width:
        x = F.pad(x, (0, width - x.shape[-1]))
    if x.stride(3) != 1:  # a padded copy too, which keeps the order that dimensions have in memory
        x = x.contiguous()
    return x.transpose(1, 2)


def finish(x: Tensor, like: Tensor, dim: int | None = None) -> Tensor:
    """``(B, H, T, width)`` to contiguous ``(B, T, H, D)`` in the dtype of ``like``."""
    x, dim = x.transpose(1, 2), dim or like.shape[-1]
    if x.shape[-1] != dim:
        x = x[..., :dim]
    if x.dtype != like.dtype:
        x = x.to(like.dtype)
    return x.contiguous()


def dtype_of(x: Tensor) -> torch.dtype:
    """What torch is to multiply ``x`` in."""
    return _cpu_dtype(x.dtype) if x.itemsize == 2 and not x.is_cuda else x.dtype


@functools.cache
def _cpu_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the CPU multiplies a 16-bit ``dtype`` in: without instructions for it, torch crawls."""
    mkldnn = torch.ops.mkldnn
    bf16 = dtype == torch.bfloat16
    native = mkldnn._is_mkldnn_bf16_supported if bf16 else mkldnn._is_mkldnn_fp16_supported
    return dtype if native() else torch.float32
