"""Allocate outputs and launch.  Arguments are already checked by the caller."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .._launch import accumulator, launch
from .._rows import as_long_rows, joint_layout, mergeable, refuses_rows
from .._runtime import refuses_device
from . import tuning
from .kernel import backward_kernel, forward_kernel


def forward_refuses(gate: Tensor, up: Tensor, activation: str) -> str | None:
    return refuses_device(gate, "gate") or refuses_rows(gate, "gate and up", up)


def backward_refuses(dout: Tensor, gate: Tensor, up: Tensor, activation: str) -> str | None:
    return forward_refuses(gate, up, activation)


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _launch("forward", forward_kernel, activation, [gate, up], [out])
    return out


def backward(dout: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    inputs = [mergeable(dout, gate, up), gate, up]
    _launch("backward", backward_kernel, activation, inputs, [dgate, dup])
    return dgate, dup


def _launch(
    step: str, kernel: Any, activation: str, inputs: list[Tensor], outputs: list[Tensor]
) -> None:
    inputs = as_long_rows(*inputs)
    size = inputs[0].shape[-1]
    plan = tuning.plan(step, size)
    blocks_per_row = triton.cdiv(size, plan.block)
    num_rows = inputs[0].numel() // max(size, 1)
    inner, strides = joint_layout(*inputs)
    launch(
        kernel, (num_rows * blocks_per_row,),
        *inputs, *outputs, size, inner, blocks_per_row,
        *(n for x, rows in zip(inputs, strides, strict=True) for n in (*rows, x.stride(-1))),
        ACTIVATION=activation, BLOCK=plan.block, ACC=accumulator(inputs[0].dtype),
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
