"""Rotary embedding: (a, b) -> (a cos - b sin, b cos + a sin) for each pair of channels."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """``(B, T, heads, D)`` by ``(T, R/2)`` or ``(B, T, R/2)`` to the same shapes, rotated."""
    return _rotated(query, cos, sin, interleaved), _rotated(key, cos, sin, interleaved)


def backward(
    dquery: Tensor, dkey: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """A rotation is orthogonal: its gradient turns back by the same angle."""
    return forward(dquery, dkey, cos, -sin, interleaved)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    dtype = torch.promote_types(heads.dtype, torch.float32)
    x = heads.to(dtype)
    c, s = cos.to(dtype)[..., None, :], sin.to(dtype)[..., None, :]
    pairs = cos.shape[-1]
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * c - b * s, b * c + a * s), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :pairs], turned[..., pairs:]
        turned = torch.cat((a * c - b * s, b * c + a * s), dim=-1)
    return torch.cat((turned, rest), dim=-1).to(heads.dtype).contiguous()


def truth_forward(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """One sequence at a time."""
    angles = [(c.double(), s.double()) for c, s in zip(*_by_batch(query, cos, sin), strict=True)]
    queries, keys = [], []
    for q, k, (c, s) in zip(query.split(1), key.split(1), angles, strict=True):
        turned_q, turned_k = forward(q.double(), k.double(), c, s, interleaved)
        queries.append(turned_q)
        keys.append(turned_k)
    if not queries:
        return query.double(), key.double()
    return torch.cat(queries), torch.cat(keys)


def truth_backward(
    dquery: Tensor, dkey: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    return truth_forward(dquery, dkey, cos, -sin, interleaved)


def _by_batch(query: Tensor, *tables: Tensor) -> list[list[Tensor]]:
    batch = query.shape[0]
    return [list(x.split(1)) if x.dim() == 3 else [x] * batch for x in tables]


plain_forward = forward
plain_backward = backward


def forward_refuses(*args: object) -> None:
    return None


backward_refuses = forward_refuses
