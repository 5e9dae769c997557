"""Gated linear unit by the CUDA C++ kernel of ``csrc/glu.cuh``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels._rows import as_long_rows, joint_layout, mergeable, refuses_rows
from fastlm.ops.cuda._extension import address, kernels, place, refuses_device
from fastlm.ops.cuda._rows import no_rows, rows_of

# Of a block; not yet measured on a GPU.
THREADS = 256


def forward_refuses(gate: Tensor, up: Tensor, activation: str) -> str | None:
    return refuses_device(gate, "gate") or refuses_rows(gate, "gate and up", up)


def backward_refuses(dout: Tensor, gate: Tensor, up: Tensor, activation: str) -> str | None:
    return forward_refuses(gate, up, activation)


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _launch(activation, [gate, up], out, None)
    return out


def backward(dout: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    _launch(activation, [gate, up, mergeable(dout, gate, up)], dgate, dup)
    return dgate, dup


def _launch(activation: str, inputs: list[Tensor], out: Tensor, dup: Tensor | None) -> None:
    inputs = as_long_rows(*inputs)
    size = inputs[0].shape[-1]
    inner, strides = joint_layout(*inputs)
    gate, up, *dout = (rows_of(x, s) for x, s in zip(inputs, strides, strict=True))
    kernels().glu(
        gate=gate,
        up=up,
        dout=dout[0] if dout else no_rows(out),
        out=address(out),
        dup=address(dup),
        rows=inputs[0].numel() // max(size, 1),
        inner=inner,
        size=size,
        activation=getattr(kernels().Activation, activation),
        threads=THREADS,
        **place(inputs[0]),
    )
