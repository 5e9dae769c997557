"""Gated linear unit: out = act(gate) up."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ELEMENTS_AT_ONCE = 1 << 20


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    x = gate.to(torch.promote_types(gate.dtype, torch.float32))
    value, _ = _activated(x, activation)
    return (value * up).to(gate.dtype).contiguous()


def backward(dout: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """dgate = dout up act'(gate), dup = dout act(gate)."""
    x = gate.to(torch.promote_types(gate.dtype, torch.float32))
    value, slope = _activated(x, activation)
    grad = dout.to(x.dtype)
    dgate, dup = grad * up * slope, grad * value
    return dgate.to(gate.dtype).contiguous(), dup.to(up.dtype).contiguous()


def _activated(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The activation and its derivative."""
    if activation == "silu":
        gate = x.sigmoid()
        return x * gate, gate * (1 + x * (1 - gate))
    if activation == "gelu":
        below = 0.5 * (1 + (x * math.sqrt(0.5)).erf())
        density = (-0.5 * x.square()).exp() / math.sqrt(2 * math.pi)
        return x * below, below + x * density
    if activation == "gelu_tanh":
        # Hendrycks and Gimpel, 2016, https://arxiv.org/abs/1606.08415
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        tanh = inner.tanh()
        slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x.square()) * (1 - tanh.square())
        return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * slope
    if activation == "sigmoid":
        gate = x.sigmoid()
        return gate, gate * (1 - gate)
    positive = x.relu()
    if activation == "relu":
        return positive, (x > 0).to(x.dtype)
    return positive.square(), 2 * positive


def truth_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    parts = [
        forward(g.double(), u.double(), activation)
        for g, u in zip(*(_slices(x) for x in (gate, up)), strict=True)
    ]
    return torch.cat(parts).view(gate.shape)


def truth_backward(
    dout: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    parts = [
        backward(d.double(), g.double(), u.double(), activation)
        for d, g, u in zip(*(_slices(x) for x in (dout, gate, up)), strict=True)
    ]
    dgate, dup = (torch.cat(part).view(gate.shape) for part in zip(*parts, strict=True))
    return dgate, dup


def _slices(x: Tensor) -> tuple[Tensor, ...]:
    return x.reshape(-1).split(_ELEMENTS_AT_ONCE)


plain_forward = forward
plain_backward = backward


def forward_refuses(*args: object) -> None:
    return None


backward_refuses = forward_refuses
