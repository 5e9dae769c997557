"""Causal attention by its definition: all scores, an explicit mask, softmax.

out[b, t, h] = sum_s p[t, s] value[b, s, g]        g = h // (H / G)
p[t, s] = exp(score[t, s] - lse[b, h, t])          for keys s that query t sees, else 0
score[t, s] = scale * query[b, t, h] . key[b, s, g], or softcap tanh(that / softcap)
lse[b, h, t] = log(sum_s exp(score[t, s]) + exp(sinks[h])), the last where there are sinks

Sums run over the pairs that see each other alone, so that NaN never reaches a query from a key
after it, nor a key from a query before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# by itself, since ours may have taken its place in torch.nn.functional
from torch._C._nn import scaled_dot_product_attention

from fastlm.ops.reference._key_ranges import Sequences, key_ranges

# elements of the score matrix that the truths hold at once
_SCORES_AT_ONCE = 1 << 22


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
    """out ``(B, T, H, Dv)`` in the dtype of query and lse ``(B, H, T)`` in float32 or float64.

    A query that sees no key has out 0 and lse -inf, or its sink.
    """
    sequences = (cu_seqlens_q, cu_seqlens_k, key_start, key_end)
    seen = _seen(*_ranges(query, key, sequences, window_size), key.shape[1])
    return _forward(query, key, value, sinks, seen, scale, softcap)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    seen: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    q, k, v = _wide_heads(query, key, value)
    scores, _ = _scores(q, k, scale, softcap, seen)
    lse = scores.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    out = _sum_seen(_probabilities(scores, lse, seen), v, seen)
    return out.transpose(1, 2).to(query.dtype).contiguous(), lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window_size: int | None,
    softcap: float | None,
    need_dquery: bool,
    need_dkey_dvalue: bool,
    need_dsinks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dquery, dkey, dvalue in the layout and dtype of their inputs, and dsinks ``(B, H, T)``, for
    each query, in that of lse; empty if not needed.
    """
    sequences = (cu_seqlens_q, cu_seqlens_k, key_start, key_end)
    seen = _seen(*_ranges(query, key, sequences, window_size), key.shape[1])
    grads = _backward(dout, dlse, query, key, value, sinks, seen, out, lse, scale, softcap)
    needs = (need_dquery, need_dkey_dvalue, need_dkey_dvalue, need_dsinks)
    dquery, dkey, dvalue, dsinks = _needed(grads, needs, (query, key, value, lse))
    return dquery, dkey, dvalue, dsinks


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    seen: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    q, k, v = _wide_heads(query, key, value)
    do = dout.transpose(1, 2).to(lse.dtype)
    scores, slope = _scores(q, k, scale, softcap, seen)
    p = _probabilities(scores, lse, seen)
    delta = (do * out.transpose(1, 2).to(lse.dtype)).sum(-1)
    if dlse is not None:
        delta = delta - dlse.masked_fill(lse == -torch.inf, 0.0)
    ds = p * (do @ v.transpose(-2, -1) - delta[..., None])
    if slope is not None:
        ds = ds * slope
    ds = scale * ds.masked_fill(~seen, 0.0)
    dq = _sum_seen(ds, k, seen).transpose(1, 2).to(query.dtype).contiguous()
    seen = seen.transpose(-2, -1)
    dk = _sum_groups(_sum_seen(ds.transpose(-2, -1), q, seen), key)
    dv = _sum_groups(_sum_seen(p.transpose(-2, -1), do, seen), value)
    if sinks is None:
        return dq, dk, dv, None
    # a key whose value is 0
    dsinks = -((sinks.to(lse.dtype)[:, None] - lse).exp() * delta)
    return dq, dk, dv, dsinks.masked_fill(lse == -torch.inf, 0.0)


def _needed(
    grads: tuple[Tensor | None, ...], needs: tuple[bool, ...], like: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    return tuple(
        grad if need and grad is not None else x.new_empty(0)
        for grad, need, x in zip(grads, needs, like, strict=True)
    )


def _ranges(
    query: Tensor, key: Tensor, sequences: Sequences, window_size: int | None
) -> tuple[Tensor, Tensor]:
    return key_ranges(query.shape[1], key.shape[1], *sequences, window_size, query.device)


def _seen(first: Tensor, end: Tensor, num_keys: int) -> Tensor:
    """``(B or 1, 1, T, S)``"""
    keys = torch.arange(num_keys, device=first.device)
    return ((keys >= first[..., None]) & (keys < end[..., None]))[:, None]


def _wide_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(B, H, ., D)`` in float32 or float64, keys and values repeated for heads that share one."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    group_size = query.shape[2] // key.shape[2]
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (query, key, value))
    return q, k.repeat_interleave(group_size, 1), v.repeat_interleave(group_size, 1)


def _scores(
    q: Tensor, k: Tensor, scale: float, softcap: float | None, seen: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The scores, -inf where not seen, and the slope of the softcap."""
    scores, slope = q @ k.transpose(-2, -1) * scale, None
    if softcap is not None:
        capped = (scores / softcap).tanh()
        scores, slope = softcap * capped, 1 - capped.square()
    return scores.masked_fill(~seen, -torch.inf), slope


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
        total += product.masked_fill(~seen[..., at, None] | finite[..., at, None, :], 0.0)
    return total


def _sum_groups(grad: Tensor, like: Tensor) -> Tensor:
    """``(B, H, S, D)`` to ``(B, S, G, D)``, summed over the heads of each group."""
    grouped = grad.unflatten(1, (like.shape[2], -1)).sum(2)
    return grouped.transpose(1, 2).to(like.dtype).contiguous()


def truth_forward(
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
    batch, num_queries, heads, _ = query.shape
    out = query.new_zeros((batch, num_queries, heads, value.shape[-1]), dtype=torch.float64)
    lse = query.new_full((batch, heads, num_queries), -torch.inf, dtype=torch.float64)
    sequences = (cu_seqlens_q, cu_seqlens_k, key_start, key_end)
    for at in _slices(query, key, sequences, window_size):
        q, k, v, s = at.widened(query, key, value, sinks)
        out[at.queries], lse[at.rows] = _forward(q, k, v, s, at.seen, scale, softcap)
    return out, lse


def truth_backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window_size: int | None,
    softcap: float | None,
    need_dquery: bool,
    need_dkey_dvalue: bool,
    need_dsinks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dquery, dkey, dvalue = (torch.zeros_like(x, dtype=torch.float64) for x in (query, key, value))
    dsinks = None if sinks is None else torch.zeros_like(lse, dtype=torch.float64)
    sequences = (cu_seqlens_q, cu_seqlens_k, key_start, key_end)
    for at in _slices(query, key, sequences, window_size):
        q, k, v, s = at.widened(query, key, value, sinks)
        known = _forward(q, k, v, s, at.seen, scale, softcap)
        do, dl = dout[at.queries].double(), None if dlse is None else dlse[at.rows].double()
        dq, dk, dv, ds = _backward(do, dl, q, k, v, s, at.seen, *known, scale, softcap)
        dquery[at.queries] = dq
        dkey[at.keys] += dk
        dvalue[at.keys] += dv
        if dsinks is not None and ds is not None:
            dsinks[at.rows] = ds
    needs = (need_dquery, need_dkey_dvalue, need_dkey_dvalue, need_dsinks)
    wide = (query.new_empty(0, dtype=torch.float64),) * 4
    dquery, dkey, dvalue, dsinks = _needed((dquery, dkey, dvalue, dsinks), needs, wide)
    return dquery, dkey, dvalue, dsinks


@dataclass(frozen=True)
class _Slice:
    """Where to find some queries of the heads that share a key, and the keys they see."""

    row: slice
    tokens: slice
    seen_tokens: slice
    heads: slice
    kv_head: slice
    seen: Tensor

    @property
    def queries(self) -> tuple[slice, ...]:
        return self.row, self.tokens, self.heads

    @property
    def keys(self) -> tuple[slice, ...]:
        return self.row, self.seen_tokens, self.kv_head

    @property
    def rows(self) -> tuple[slice, ...]:
        """Of the lse."""
        return self.row, self.heads, self.tokens

    def widened(
        self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        s = None if sinks is None else sinks[self.heads].double()
        return query[self.queries].double(), key[self.keys].double(), value[self.keys].double(), s


def _slices(
    query: Tensor, key: Tensor, sequences: Sequences, window_size: int | None
) -> Iterator[_Slice]:
    batch, num_queries, heads, _ = query.shape
    num_keys, kv_heads = key.shape[1:3]
    group_size = heads // kv_heads
    first, end = _ranges(query, key, sequences, window_size)
    first, end = first.expand(batch, -1), end.expand(batch, -1)
    step = max(1, _SCORES_AT_ONCE // max(1, num_keys * group_size))
    for b, start in itertools.product(range(batch), range(0, num_queries, step)):
        row, tokens = slice(b, b + 1), slice(start, min(start + step, num_queries))
        least, most = int(first[b, tokens].min()), int(end[b, tokens].max())
        seen = _seen(first[row, tokens] - least, end[row, tokens] - least, most - least)
        for g in range(kv_heads):
            group = slice(g * group_size, (g + 1) * group_size)
            yield _Slice(row, tokens, slice(least, most), group, slice(g, g + 1), seen)


def plain_forward(
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
    """torch's fused attention in the working dtype; lse from inputs upcast to float32.

    torch fuses where query and value have one head_dim.  Elsewhere it would compute in float32,
    whatever the dtype, so columns of zeros make the two equal: they change no score and no sum.
    It has no softcap and no sinks, ``(H,)`` or ``(B, H, T)``: then this is eager torch, with a
    softmax in float32.
    Inputs that are not finite count as 0, lest they leave no finite result to measure errors by.
    """
    sequences = (cu_seqlens_q, cu_seqlens_k, key_start, key_end)
    seen = _seen(*_ranges(query, key, sequences, window_size), key.shape[1])
    if 0 in (query.numel(), key.numel(), value.numel()):
        return _forward(query, key, value, sinks, seen, scale, softcap)
    query, key, value = map(_finite, (query, key, value))
    wide_q, wide_k, _ = _wide_heads(query, key, value)
    lse = _scores(wide_q, wide_k, scale, softcap, seen)[0].logsumexp(-1)
    if sinks is not None:
        sinks = sinks[:, None] if sinks.dim() == 1 else sinks
        lse = torch.logaddexp(lse, sinks.to(lse.dtype))
    if softcap is None and sinks is None:
        return _fused(query, key, value, seen, scale), lse
    return _eager(query, key, value, sinks, seen, scale, softcap), lse


def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    seen: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    group_size = query.shape[2] // key.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    k, v = k.repeat_interleave(group_size, 1), v.repeat_interleave(group_size, 1)
    scores, _ = _scores(q, k, scale, softcap, seen)
    if sinks is None:
        scores = scores.masked_fill(~seen.any(-1, keepdim=True), 0.0)
    else:
        sink = sinks.to(scores.dtype)[..., None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    dtype = torch.promote_types(query.dtype, torch.float32)
    p = scores.softmax(-1, dtype=dtype)[..., : k.shape[2]].masked_fill(~seen, 0.0)
    return (p.to(query.dtype) @ v).transpose(1, 2)


def _fused(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    width, value_dim = max(query.shape[-1], value.shape[-1]), value.shape[-1]
    q, k, v = (F.pad(x, (0, width - x.shape[-1])).transpose(1, 2) for x in (query, key, value))
    out = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
    return out[..., :value_dim].transpose(1, 2)


def _finite(x: Tensor) -> Tensor:
    return x.nan_to_num(0.0, 0.0, 0.0)


def plain_backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window_size: int | None,
    softcap: float | None,
    need_dquery: bool,
    need_dkey_dvalue: bool,
    need_dsinks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sequences = (cu_seqlens_q, cu_seqlens_k, key_start, key_end)
    q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
    # one for each query
    s = None if sinks is None else sinks.detach()[None, :, None].expand(lse.shape).requires_grad_()
    leaves = [x for x in (q, k, v, s) if x is not None]
    with torch.enable_grad():
        out, lse = plain_forward(q, k, v, s, *sequences, scale, window_size, softcap)
        outputs = [(out, dout)] if dlse is None else [(out, dout), (lse, dlse)]
        roots, grads = zip(*((root, _finite(grad)) for root, grad in outputs), strict=True)
        results = torch.autograd.grad(roots, leaves, grads, materialize_grads=True)
    needs = (need_dquery, need_dkey_dvalue, need_dkey_dvalue, need_dsinks)
    dsinks = results[3] if sinks is not None else None
    like = (query, key, value, lse)
    dquery, dkey, dvalue, dsinks = _needed((*results[:3], dsinks), needs, like)
    return dquery, dkey, dvalue, dsinks


def forward_refuses(*args: object) -> None:
    return None


backward_refuses = forward_refuses
