"""Linear layers whose weights have 8 or 4 bits, for decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastlm._errors import ArgumentError
from fastlm.model import quantized_weights as held

if TYPE_CHECKING:
    from fastlm.model.transformer import CausalLM

# What weights may be held in, by the names of the command line, and the bits of those quantised.
WEIGHTS = {"float": None, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class Quantized:
    """What :func:`quantize` did.

    Attributes:
        bits: Of each weight.
        layers: How many were replaced.
        bytes_before: Of all parameters and buffers; what is shared counts once.
        bytes_after: The same, afterwards.  A head that shared the embedding's weight has one of its
            own now.
        read_before: Of the weights of the replaced layers, which each token reads.
        read_after: The same, afterwards.
    """

    bits: int
    layers: int
    bytes_before: int
    bytes_after: int
    read_before: int
    read_after: int

    def __str__(self) -> str:
        held, read = (
            f"{before / 1e6:.1f} to {after / 1e6:.1f} MB"
            for before, after in (
                (self.bytes_before, self.bytes_after), (self.read_before, self.read_after),
            )
        )  # fmt: skip
        return f"{self.layers} layers in int{self.bits}: {held} held, {read} read per token"


def quantize(model: CausalLM, bits: int = 8, *, group_size: int = 128) -> Quantized:
    """Hold the weights of a model's linear layers in 8 or 4 bits, in place.

    Decoding reads every weight once per token and is as fast as memory is; embedding, norms and
    biases stay as they are.  A model that is quantised computes its products in bfloat16, whatever
    the dtype between them is, and has no gradients; its parameters no longer require any.  It can
    be neither saved nor, in 4 bits, moved between CPU and GPU: quantise what was loaded instead.

    Args:
        model: All linear layers of its blocks and its head are replaced, or none, if it raises.  A
            head that shares the embedding's weight gets a quantised one of its own.
        bits: 8, symmetric, with a step for each output; or 4, with a step and a middle for each
            group of inputs of each output.  Both round to nearest: no weight is moved by more than
            half a step.
        group_size: Of 4 bits: 32, 64, 128 or 256 inputs share a step.  Not looked at for 8.

    Returns:
        What was replaced and how many bytes there are now.

    Raises:
        ArgumentError: ``bits`` or ``group_size`` is none of these; or a layer has a size, a device
            or values that this cannot be done with, and is named.
    """
    if bits not in (8, 4):
        raise ArgumentError(f"quantize: bits must be 8 or 4, got {bits}")
    if group_size not in held.GROUP_SIZES:
        raise ArgumentError(
            f"quantize: group_size must be one of {held.GROUP_SIZES}, got {group_size}"
        )
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}
    if not layers:
        raise ArgumentError("quantize: model must have layers that are not quantised, got none")
    _check(layers, bits, group_size)
    before, read_before = _bytes(model), sum(layer.weight.nbytes for layer in layers.values())
    model.requires_grad_(False)
    count, read_after = len(layers), 0
    for name in list(layers):
        # popped, so that the float weight goes before the next one is quantised
        quantized = QuantizedLinear(layers.pop(name), bits, group_size)
        model.set_submodule(name, quantized)
        read_after += quantized.levels.nbytes + quantized.steps.nbytes
    return Quantized(bits, count, before, _bytes(model), read_before, read_after)


def _check(layers: dict[str, nn.Linear], bits: int, group_size: int) -> None:
    for name, layer in layers.items():
        weight = layer.weight.detach()
        refusal = held.int8_refuses(weight) if bits == 8 else held.int4_refuses(weight, group_size)
        if refusal is not None:
            raise ArgumentError(f"quantize: {name}: {refusal}")


class QuantizedLinear(nn.Module):
    """``nn.Linear`` with its weight in 8 or 4 bits; made by :func:`quantize`.

    Args:
        linear: What it replaces.
        bits: 8 or 4.
        group_size: Of 4 bits.
    """

    levels: Tensor
    steps: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, bits: int, group_size: int) -> None:
        super().__init__()
        self.bits, self.group_size = bits, group_size
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        self.dtype = weight.dtype
        if bits == 8:
            levels, steps = held.int8_levels(weight)
        else:
            levels, steps = held.int4_packed(*held.int4_levels(weight, group_size))
        self.register_buffer("levels", levels)
        self.register_buffer("steps", steps)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, input: Tensor) -> Tensor:
        """``(..., C)`` to ``(..., N)``, in the dtype of the input.

        Raises:
            NotImplementedError: The input requires a gradient.
        """
        if input.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                "quantize: quantised layers have no gradients; use torch.no_grad() or a float model"
            )
        rows = input.reshape(-1, self.in_features).bfloat16()
        if self.bits == 8:
            out = held.int8_product(rows, self.levels, self.steps)
        else:
            out = held.int4_product(rows, self.levels, self.steps)[:, : self.out_features]
        out = out.to(input.dtype)
        if self.bias is not None:
            out = out + self.bias
        return out.reshape(*input.shape[:-1], self.out_features)

    @property
    def weight(self) -> Tensor:
        """``(N, C)``: what it multiplies by, made anew each time, in the dtype of the original."""
        if self.bits == 8:
            weight = self.levels.float().mul_(self.steps[:, None])
        else:
            weight = held.int4_unpacked(self.levels, self.steps)[: self.out_features]
        return weight.to(self.dtype)

    def extra_repr(self) -> str:
        grouped = f", group_size={self.group_size}" if self.bits == 4 else ""
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bits={self.bits}{grouped}, bias={bias}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # model.to(dtype) is of what is between the layers: steps and levels are what they are
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.steps.device))
        device, self.dtype = probe.device, probe.dtype
        if self.bits == 4 and device.type != self.steps.device.type:
            raise NotImplementedError(
                f"quantize: int4 weights cannot move from {self.steps.device.type} to "
                f"{device.type}; move the model before it is quantised"
            )
        self.levels, self.steps = self.levels.to(device), self.steps.to(device)
        if self.bias is not None:
            self.bias = fn(self.bias)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise NotImplementedError(
            "quantize: a quantised model cannot be saved; save it before it is quantised"
        )


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
