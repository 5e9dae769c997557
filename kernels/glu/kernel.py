"""Kernels of gated linear units (Shazeer, 2020, https://arxiv.org/abs/2002.05202).

    out   = act(gate) up                            forward
    dgate = dout up act'(gate),  dup = dout act(gate)   backward, which activates the gate again

One program has BLOCK elements of a row and reads each once.  Row r of a tensor is at
(r // inner) * stride_outer + (r % inner) * stride_inner, so that the halves of one projection are
read in place.
"""

import triton
import triton.language as tl

from .._losses import tanh

_SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
_SQRT_2_OVER_PI: tl.constexpr = tl.constexpr(0.7978845608028654)
_1_OVER_SQRT_2_PI: tl.constexpr = tl.constexpr(0.3989422804014327)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    """The activation and its derivative; of the two, what is not used is not computed."""
    if ACTIVATION == "silu":
        share = 1.0 / (1.0 + tl.exp(-x))
        value, slope = x * share, share * (1.0 + x * (1.0 - share))
    elif ACTIVATION == "sigmoid":
        value = 1.0 / (1.0 + tl.exp(-x))
        slope = value * (1.0 - value)
    elif ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.erf(x * _SQRT_HALF))
        value, slope = x * below, below + x * tl.exp(-0.5 * x * x) * _1_OVER_SQRT_2_PI
    elif ACTIVATION == "gelu_tanh":
        # Hendrycks and Gimpel, 2016, https://arxiv.org/abs/1606.08415
        t = tanh((x + 0.044715 * x * x * x) * _SQRT_2_OVER_PI)
        rise = (1.0 + 3.0 * 0.044715 * x * x) * (1.0 - t * t) * _SQRT_2_OVER_PI
        value, slope = 0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * rise
    else:
        # not the maximum with 0, which would drop NaN
        positive = tl.where(x <= 0.0, 0.0, x)
        if ACTIVATION == "relu":
            value, slope = positive, tl.where(x > 0.0, 1.0, 0.0).to(x.dtype)
        else:
            value, slope = positive * positive, 2.0 * positive
    return value, slope


@triton.jit
def _place(size, inner, blocks_per_row, BLOCK: tl.constexpr):
    """Of this program: where its row is, as two numbers, its columns, and which are in the row."""
    # one grid dimension: y and z end at 65,535; int64: rows of 14,336 pass 2**31 at row 149,797
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks_per_row
    cols = (program % blocks_per_row) * BLOCK + tl.arange(0, BLOCK)
    return row // inner, row % inner, row * size + cols, cols, cols < size


@triton.jit
def _load(
    ptr, outer, within, cols, stride_outer, stride_inner, stride_col, mask, ACC: tl.constexpr
):
    ptr += outer * stride_outer + within * stride_inner
    return tl.load(ptr + cols * stride_col, mask=mask, other=0.0).to(ACC)


@triton.jit(do_not_specialize=["inner", "blocks_per_row"])
def forward_kernel(
    gate_ptr,  # (outer, inner, size)
    up_ptr,  # (outer, inner, size)
    out_ptr,  # (outer * inner, size)
    size,
    inner,
    blocks_per_row,
    gate_outer,
    gate_inner,
    gate_col,
    up_outer,
    up_inner,
    up_col,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    outer, within, place, cols, mask = _place(size, inner, blocks_per_row, BLOCK)
    gate = _load(gate_ptr, outer, within, cols, gate_outer, gate_inner, gate_col, mask, ACC)
    up = _load(up_ptr, outer, within, cols, up_outer, up_inner, up_col, mask, ACC)
    value, _ = _activated(gate, ACTIVATION)
    tl.store(out_ptr + place, (value * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["inner", "blocks_per_row"])
def backward_kernel(
    dout_ptr,  # (outer, inner, size)
    gate_ptr,  # (outer, inner, size)
    up_ptr,  # (outer, inner, size)
    dgate_ptr,  # (outer * inner, size)
    dup_ptr,  # (outer * inner, size)
    size,
    inner,
    blocks_per_row,
    dout_outer,
    dout_inner,
    dout_col,
    gate_outer,
    gate_inner,
    gate_col,
    up_outer,
    up_inner,
    up_col,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    outer, within, place, cols, mask = _place(size, inner, blocks_per_row, BLOCK)
    dout = _load(dout_ptr, outer, within, cols, dout_outer, dout_inner, dout_col, mask, ACC)
    gate = _load(gate_ptr, outer, within, cols, gate_outer, gate_inner, gate_col, mask, ACC)
    up = _load(up_ptr, outer, within, cols, up_outer, up_inner, up_col, mask, ACC)
    value, slope = _activated(gate, ACTIVATION)
    tl.store(dgate_ptr + place, (dout * up * slope).to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + place, (dout * value).to(dup_ptr.dtype.element_ty), mask=mask)
