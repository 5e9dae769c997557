"""Gated linear units: an activated gate times another projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.ops._autograd import once_differentiable
from fastlm.ops._checks import (
    check_choice,
    check_dtype,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
)
from fastlm.ops._define import define_op

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid")
BACKENDS = {
    "triton": "fastlm.kernels.glu",
    "cuda": "fastlm.ops.cuda.glu",
    "torch": "fastlm.ops.eager.glu",
    "reference": "fastlm.ops.reference.glu",
}


def glu(gate: Tensor, up: Tensor, activation: str = "silu", backend: str = "auto") -> Tensor:
    """``activation(gate) * up``, keeping only its two inputs for the gradient.

    Agrees with that product in torch, which also keeps the activated gate; low precision is
    computed in float32 and rounded once (Shazeer, 2020, https://arxiv.org/abs/2002.05202).

    Args:
        gate: ``(..., I)``; float32, bfloat16, float16 or float64; any strides.
        up: Shape and dtype of ``gate``.
        activation: ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` (its tanh approximation), ``"relu"``,
            ``"relu2"`` (its square) or ``"sigmoid"``.
        backend: ``"auto"``, ``"triton"``, ``"cuda"``, ``"torch"`` or ``"reference"``.

    Returns:
        A new tensor of the same shape and dtype.

    Raises:
        ValueError: Shapes or devices do not match, or ``activation`` is not known.
        TypeError: A dtype is not one of those above, or the two differ.
        NotImplementedError: ``backend`` cannot take these inputs; the message says why.
    """
    check_tensor("glu", "gate", gate)
    check_tensor("glu", "up", up)
    check_dtype("glu", "gate", gate)
    check_same_dtype("glu", "up", up, "gate", gate)
    check_shape("glu", "up", up, gate.shape, "to match gate")
    check_same_device("glu", "up", up, "gate", gate)
    check_choice("glu", "activation", activation, ACTIVATIONS)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _GLU.apply(gate, up, activation, backend)
    return _forward(gate, up, activation, backend)


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """``silu(gate) * up``: :func:`glu` with the activation of Llama and Qwen."""
    return glu(gate, up, "silu", backend)


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str, backend: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.backend = activation, backend
        return _forward(gate, up, activation, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(dout, *ctx.saved_tensors, ctx.activation, ctx.backend), None, None


def _forward_fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _backward_fake(
    dout: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


_forward = define_op("glu", "forward", BACKENDS, fake=_forward_fake)
_backward = define_op("glu", "backward", BACKENDS, fake=_backward_fake)
