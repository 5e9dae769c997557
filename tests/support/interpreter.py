"""Triton's interpreter made as strict as a GPU: bfloat16 that rounds, grids that have limits.

In Triton 3.6 and 3.7 the interpreter keeps bfloat16 as bit patterns in uint16.  Casts from float32
then truncate, ``tl.dot`` multiplies the patterns, and arithmetic and sums add them.
:func:`install` makes casts and ``tl.dot`` right, and has arithmetic on bfloat16 raise TypeError:
our kernels load bfloat16, compute in ``ACC`` and cast once.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter

from fastlm.kernels._launch import MAX_GRID

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")

_Handle = interpreter.TensorHandle


def install() -> None:
    """Patch the interpreter for the whole session."""
    builder, reduce = interpreter.InterpreterBuilder, interpreter.ReduceOps
    _replace(builder, "cast_impl", _cast)
    _replace(builder, "create_fp_to_fp", _cast)
    _replace(builder, "create_dot", _dot)
    for name in ("binary_op", "unary_op", "create_fma", "create_atomic_rmw", "create_erf"):
        _replace(builder, name, _refusing_bfloat16)
    _replace(builder, "ternary_op", _ternary)
    _replace(builder, "create_rsqrt", _refusing_bfloat16)
    for name in ("sum", "min_max"):
        _replace(reduce, name, _refusing_bfloat16)
    for name in ("cumsum", "cumprod"):
        _replace(interpreter.ScanOps, name, _refusing_bfloat16)
    _replace(builder, "set_grid_dim", _limited_grid)
    _replace(interpreter.GridExecutor, "__call__", _without_warnings)
    _replace(interpreter.InterpretedFunction, "__call__", _device_function)


def _replace(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    setattr(owner, name, replacement)


def _is_bfloat16(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_is_bfloat16(item) for item in value)
    dtype = getattr(value, "dtype", None)
    return isinstance(dtype, tl.dtype) and dtype.scalar == tl.bfloat16


def _widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, to nearest, ties to even; NaN stays a quiet NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    up = bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, (bits >> 16) | 0x40, up >> 16).astype(np.uint16)


def _as_float32(handle: Any) -> Any:
    return _Handle(_widened(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _cast(original: Any, self: Any, source: Any, dtype: Any, *rounding_mode: Any) -> Any:
    to_bfloat16 = dtype.scalar == tl.bfloat16
    if not to_bfloat16 and not _is_bfloat16(source):
        return original(self, source, dtype, *rounding_mode)
    if rounding_mode and rounding_mode[0] == interpreter._ir.ROUNDING_MODE.RTZ:
        raise TypeError("bfloat16 cast with rounding towards zero: not modelled here")
    if to_bfloat16 and _is_bfloat16(source):
        return source
    wide = _as_float32(source)
    if to_bfloat16:
        return _Handle(_rounded(wide.data), tl.bfloat16)
    return _Handle(wide.data.astype(interpreter._get_np_dtype(dtype)), dtype.scalar)


def _dot(original: Any, self: Any, a: Any, b: Any, *rest: Any) -> Any:
    return original(self, _as_float32(a), _as_float32(b), *rest)


def _refusing_bfloat16(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    if _is_bfloat16(args):
        raise TypeError("arithmetic on bfloat16 in a kernel: cast to ACC first")
    return original(self, *args, **kwargs)


def _ternary(original: Any, self: Any, a: Any, b: Any, c: Any, op: Any) -> Any:
    # tl.where moves bits, which is right in any dtype
    if op is not np.where:
        return _refusing_bfloat16(original, self, a, b, c, op)
    return original(self, a, b, c, op)


def _limited_grid(original: Any, self: Any, *grid: int) -> None:
    if any(side > limit for side, limit in zip(grid, MAX_GRID, strict=True)):
        raise ValueError(f"grid {grid} is beyond what CUDA takes, {MAX_GRID}")
    original(self, *grid)


def _without_warnings(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    # numpy warns of infinities and NaN that a GPU computes in silence
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        original(self, *args, **kwargs)


def _device_function(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    # Of triton.language a launch patches what its kernel sees.  Doing so again for every function
    # of ours that it calls, as the interpreter does, takes longer than most of them; Triton's own
    # functions see another part.
    if self.fn.__module__.startswith("triton."):
        return original(self, *args, **kwargs)
    return self.rewrite()(*args, **kwargs)


@contextlib.contextmanager
def permuted_grid(seed: int) -> Iterator[None]:
    """Run the programs of every launch inside in a random order that ``seed`` decides."""
    builder = interpreter.interpreter_builder
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    order: list[tuple[int, int, int]] = []

    def permuting_dim(*grid: int) -> None:
        set_dim(*grid)
        flat = np.random.default_rng(seed).permutation(int(np.prod(grid)))
        order[:] = zip(*(axis.tolist() for axis in np.unravel_index(flat, grid)), strict=True)

    def permuted_index(x: int, y: int, z: int) -> None:
        _, ny, nz = builder.grid_dim
        set_index(*order[(x * ny + y) * nz + z])

    builder.set_grid_dim, builder.set_grid_idx = permuting_dim, permuted_index
    try:
        yield
    finally:
        del builder.set_grid_dim, builder.set_grid_idx


@triton.jit
def _cast_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < size, other=0.0)
    tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty), mask=offsets < size)


def bfloat16_boundaries() -> torch.Tensor:
    """Every bfloat16 value, every midpoint, and one float32 step either side of each."""
    starts = torch.arange(1 << 16, dtype=torch.int64) << 16
    steps = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (starts[:, None] + steps).flatten()
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int().view(torch.float32)


def cast_in_a_kernel(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    block = 1 << 16
    _cast_kernel[(triton.cdiv(x.numel(), block),)](x, out, x.numel(), BLOCK=block)
    return out


def check_bfloat16(device: str) -> None:
    """Fail unless kernels round float32 to bfloat16 to nearest, ties to even."""
    values = bfloat16_boundaries().to(device)
    got, want = cast_in_a_kernel(values, torch.bfloat16), values.to(torch.bfloat16)
    wrong = (got.view(torch.int16) != want.view(torch.int16)) & ~(got.isnan() & want.isnan())
    assert not wrong.any(), f"{int(wrong.sum())} of {len(values)} casts to bfloat16 are wrong"
    back = cast_in_a_kernel(want, torch.float32)
    assert torch.equal(back.nan_to_num(), want.float().nan_to_num()), "bfloat16 to float32 is wrong"
