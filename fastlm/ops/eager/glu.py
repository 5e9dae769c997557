"""Gated linear unit by torch's activation kernels; the backward activates the gate again."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten

# name -> act(x), and act'(x) * grad from (grad, x)
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, _aten.silu_backward),
    "gelu": (F.gelu, _aten.gelu_backward),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda grad, x: _aten.gelu_backward(grad, x, approximate="tanh"),
    ),
    "relu": (F.relu, lambda grad, x: _aten.threshold_backward(grad, x, 0)),
    "relu2": (lambda x: F.relu(x).square_(), lambda grad, x: F.relu(x).mul_(grad).mul_(2)),
    "sigmoid": (torch.sigmoid, lambda grad, x: _aten.sigmoid_backward(grad, x.sigmoid())),
}


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    activate, _ = _ACTIVATIONS[activation]
    return activate(_wide(gate)).mul_(up).to(gate.dtype).contiguous()


def backward(dout: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    activate, gradient = _ACTIVATIONS[activation]
    x, grad = _wide(gate), _wide(dout)
    dup = activate(x).mul_(grad).to(up.dtype).contiguous()
    dgate = gradient(grad * up, x).to(gate.dtype).contiguous()
    return dgate, dup


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def forward_refuses(*args: object) -> None:
    return None


backward_refuses = forward_refuses
