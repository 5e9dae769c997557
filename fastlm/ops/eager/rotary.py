"""Rotary embedding as x [cos cos] + swapped(x) [-sin sin]: three passes, one temporary."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    cos, sin = cos.to(dtype)[..., None, :], sin.to(dtype)[..., None, :]
    cos = _joined(cos, cos, interleaved)
    sin = _joined(-sin, sin, interleaved)
    return _rotated(query, cos, sin, interleaved), _rotated(key, cos, sin, interleaved)


def backward(
    dquery: Tensor, dkey: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    return forward(dquery, dkey, cos, -sin, interleaved)


def _joined(first: Tensor, second: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.stack((first, second), dim=-1).flatten(-2)
    return torch.cat((first, second), dim=-1)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    channels = cos.shape[-1]
    x = heads[..., :channels].to(cos.dtype)
    if interleaved:
        out = _joined(x[..., 1::2], x[..., 0::2], interleaved)
    else:
        half = channels // 2
        out = _joined(x[..., half:], x[..., :half], interleaved)
    out = out.mul_(sin).addcmul_(x, cos).to(heads.dtype)
    if channels == heads.shape[-1]:
        # torch.cat keeps the memory format of its inputs, channels last for example
        return out.contiguous()
    return torch.cat((out, heads[..., channels:]), dim=-1).contiguous()


def forward_refuses(*args: object) -> None:
    return None


backward_refuses = forward_refuses
