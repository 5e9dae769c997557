"""Causal attention by its definition: all scores, an explicit mask, softmax.

out[b, t, h] = sum_s p[t, s] value[b, s, g]        g = h // (H / G)
p[t, s] = exp(scale * query[b, t, h] . key[b, s, g] - lse[b, h, t])    for s <= t + S - T, else 0

Sums run over the pairs with s <= t + S - T alone, so that NaN never reaches a query from a key
after it, nor a key from a query before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# elements of the score matrix that the truths hold at once
_SCORES_AT_ONCE = 1 << 22


def forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out ``(B, T, H, Dv)`` in the dtype of query and lse ``(B, H, T)`` in float32 or float64.

    A query that sees no key has out 0 and lse -inf.
    """
    q, k, v = _wide_heads(query, key, value)
    seen = _seen(query.shape[1], key.shape[1], query.device)
    scores = _scores(q, k, scale, seen)
    lse = scores.logsumexp(-1)
    out = _sum_seen(_probabilities(scores, lse, seen), v, seen)
    return out.transpose(1, 2).to(query.dtype).contiguous(), lse


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
    """dquery, dkey, dvalue in the layout and dtype of query, key, value; empty if not needed."""
    q, k, v = _wide_heads(query, key, value)
    do = dout.transpose(1, 2).to(lse.dtype)
    seen = _seen(query.shape[1], key.shape[1], query.device)
    p = _probabilities(_scores(q, k, scale, seen), lse, seen)
    delta = (do * out.transpose(1, 2).to(lse.dtype)).sum(-1)
    if dlse is not None:
        delta = delta - dlse.masked_fill(lse == -torch.inf, 0.0)
    ds = (p * (do @ v.transpose(-2, -1) - delta[..., None])).masked_fill(~seen, 0.0)
    grads = [x.new_empty(0) for x in (query, key, value)]
    if need_dquery:
        grads[0] = _sum_seen(scale * ds, k, seen).transpose(1, 2).to(query.dtype).contiguous()
    if need_dkey_dvalue:
        dk = _sum_seen(scale * ds.transpose(-2, -1), q, seen.T)
        dv = _sum_seen(p.transpose(-2, -1), do, seen.T)
        grads[1:] = [_sum_groups(dk, key), _sum_groups(dv, value)]
    return grads[0], grads[1], grads[2]


def _wide_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(B, H, ., D)`` in float32 or float64, keys and values repeated for heads that share one."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    group_size = query.shape[2] // key.shape[2]
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (query, key, value))
    return q, k.repeat_interleave(group_size, 1), v.repeat_interleave(group_size, 1)


def _seen(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    queries = torch.arange(num_queries, device=device)
    return torch.arange(num_keys, device=device) <= queries[:, None] + (num_keys - num_queries)


def _scores(q: Tensor, k: Tensor, scale: float, seen: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * scale).masked_fill(~seen, -torch.inf)


def _probabilities(scores: Tensor, lse: Tensor, seen: Tensor) -> Tensor:
    nothing = ~seen | (lse[..., None] == -torch.inf)
    return (scores - lse[..., None]).exp().masked_fill(nothing, 0.0)


def _sum_seen(weights: Tensor, rows: Tensor, seen: Tensor) -> Tensor:
    """``weights @ rows``, weights 0 where not seen, without what 0 * NaN makes of those zeros."""
    finite = rows.isfinite()
    if finite.all():
        return weights @ rows
    total = weights @ rows.masked_fill(~finite, 0.0)
    rest = rows.masked_fill(finite, 0.0)
    for at in (~finite).any(-1).flatten(0, -2).any(0).nonzero().flatten():
        product = weights[..., at, None] * rest[..., at, None, :]
        total += product.masked_fill(~seen[:, at, None] | finite[..., at, None, :], 0.0)
    return total


def _sum_groups(grad: Tensor, like: Tensor) -> Tensor:
    """``(B, H, S, D)`` to ``(B, S, G, D)``, summed over the heads of each group."""
    grouped = grad.unflatten(1, (like.shape[2], -1)).sum(2)
    return grouped.transpose(1, 2).to(like.dtype).contiguous()


def truth_forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, num_queries, heads, _ = query.shape
    out = query.new_zeros((batch, num_queries, heads, value.shape[-1]), dtype=torch.float64)
    lse = query.new_full((batch, heads, num_queries), -torch.inf, dtype=torch.float64)
    for q_at, k_at, lse_at in _slices(query, key):
        q, k, v = query[q_at].double(), key[k_at].double(), value[k_at].double()
        out[q_at], lse[lse_at] = forward(q, k, v, scale)
    return out, lse


def truth_backward(
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
    dquery, dkey, dvalue = (torch.zeros_like(x, dtype=torch.float64) for x in (query, key, value))
    for q_at, k_at, lse_at in _slices(query, key):
        q, k, v = query[q_at].double(), key[k_at].double(), value[k_at].double()
        do, dl = dout[q_at].double(), None if dlse is None else dlse[lse_at].double()
        dq, dk, dv = backward(do, dl, q, k, v, *forward(q, k, v, scale), scale, True, True)
        dquery[q_at] = dq
        dkey[k_at] += dk
        dvalue[k_at] += dv
    empty = query.new_empty(0, dtype=torch.float64)
    return (
        dquery if need_dquery else empty,
        dkey if need_dkey_dvalue else empty,
        dvalue if need_dkey_dvalue else empty.clone(),
    )


def _slices(query: Tensor, key: Tensor) -> Iterator[tuple[Any, Any, Any]]:
    """Where in query, key and lse to find blocks of queries and the keys before their diagonal."""
    batch, num_queries, heads, _ = query.shape
    num_keys, kv_heads = key.shape[1:3]
    group_size = heads // kv_heads
    rows = max(1, _SCORES_AT_ONCE // max(1, num_keys * group_size))
    for b, g, start in itertools.product(
        range(batch), range(kv_heads), range(0, num_queries, rows)
    ):
        stop = min(start + rows, num_queries)
        seen = max(0, stop + num_keys - num_queries)
        one, group = slice(b, b + 1), slice(g * group_size, (g + 1) * group_size)
        yield (
            (one, slice(start, stop), group),
            (one, slice(0, seen), slice(g, g + 1)),
            (one, group, slice(start, stop)),
        )


def plain_forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """torch's fused attention in the working dtype; lse from inputs upcast to float32.

    torch fuses where query and value have one head_dim.  Elsewhere it would compute in float32,
    whatever the dtype, so columns of zeros make the two equal: they change no score and no sum.
    Inputs that are not finite count as 0, lest they leave no finite result to measure errors by.
    """
    if 0 in (query.numel(), key.numel(), value.numel()):
        return forward(query, key, value, scale)
    query, key, value = map(_finite, (query, key, value))
    seen = _seen(query.shape[1], key.shape[1], query.device)
    width, value_dim = max(query.shape[-1], value.shape[-1]), value.shape[-1]
    q, k, v = (F.pad(x, (0, width - x.shape[-1])).transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
    wide_q, wide_k, _ = _wide_heads(query, key, value)
    lse = _scores(wide_q, wide_k, scale, seen).logsumexp(-1)
    return out[..., :value_dim].transpose(1, 2), lse


def _finite(x: Tensor) -> Tensor:
    return x.nan_to_num(0.0, 0.0, 0.0)


def plain_backward(
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
    q, k, v = inputs = [x.detach().requires_grad_() for x in (query, key, value)]
    with torch.enable_grad():
        out, lse = plain_forward(q, k, v, scale)
        outputs = [(out, dout)] if dlse is None else [(out, dout), (lse, dlse)]
        roots, grads = zip(*((root, _finite(grad)) for root, grad in outputs), strict=True)
        dquery, dkey, dvalue = torch.autograd.grad(roots, inputs, grads, materialize_grads=True)
    empty = query.new_empty(0)
    return (
        dquery if need_dquery else empty,
        dkey if need_dkey_dvalue else empty,
        dvalue if need_dkey_dvalue else empty.clone(),
    )


def forward_refuses(*args: object) -> None:
    return None


backward_refuses = forward_refuses
