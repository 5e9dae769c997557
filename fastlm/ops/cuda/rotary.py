"""Rotary embedding by the CUDA C++ kernel of ``csrc/rotary.cuh``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels._rows import angles_as_read
from fastlm.ops.cuda._extension import address, dtype_of, kernels, place, refuses_device

# Of a block; not yet measured on a GPU.
THREADS = 256


def forward_refuses(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> str | None:
    return refuses_device(query, "query")


def backward_refuses(
    dquery: Tensor, dkey: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> str | None:
    return refuses_device(dquery, "query")


def forward(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    return (
        _rotated(query, cos, sin, interleaved, turns_back=False),
        _rotated(key, cos, sin, interleaved, turns_back=False),
    )


def backward(
    dquery: Tensor, dkey: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    return (
        _rotated(dquery, cos, sin, interleaved, turns_back=True),
        _rotated(dkey, cos, sin, interleaved, turns_back=True),
    )


def _rotated(
    heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, *, turns_back: bool
) -> Tensor:
    out = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    cos, sin, angle_strides = angles_as_read(cos, sin)
    kernels().rotate(
        heads=address(heads),
        strides=heads.stride(),
        cos=address(cos),
        sin=address(sin),
        angle_dtype=dtype_of(cos),
        angle_strides=angle_strides,
        out=address(out),
        dtype=dtype_of(heads),
        shape=tuple(heads.shape),
        pairs=cos.shape[-1],
        is_interleaved=interleaved,
        turns_back=turns_back,
        threads=THREADS,
        **place(heads),
    )
    return out
