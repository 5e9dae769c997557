"""RMSNorm kernels (Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467).

    x       = input, or input + residual rounded to the dtype it is returned in
    rstd    = (mean(x^2) + eps)^(-1/2)
    out     = x rstd (weight_offset + weight)                                  forward
    n       = x rstd,  g = dout (weight_offset + weight)
    dx      = rstd (g - n mean(g n)) [+ dtotal]                                backward
    dweight = sum over vectors of dout n

A program has BLOCK_ROWS vectors whole and reads each once; of a wider one it reads BLOCK_C
elements at a time, twice.  The backward pass goes through ROWS vectors, one tile after another, and
writes their sum of dout n as one row of partial sums, which another kernel adds up in their order.

Vector r of a tensor is at (r // inner) * stride_outer + (r % inner) * stride_inner: a slice, or
the heads of a projection, are read in place.
"""

import triton
import triton.language as tl


@triton.jit
def _load(ptrs, cols, stride_col, mask, ACC: tl.constexpr):
    """Elements ``cols`` of the vectors at ``ptrs``, zeros where there are none."""
    return tl.load(ptrs[:, None] + cols[None, :] * stride_col, mask=mask, other=0.0).to(ACC)


@triton.jit
def _load_total(
    input_ptrs, residual_ptrs, cols, input_col, residual_col, mask,
    HAS_RESIDUAL: tl.constexpr, TOTAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What is normalised; with a residual the rounded sum, which is what the caller gets."""
    x = _load(input_ptrs, cols, input_col, mask, ACC)
    if HAS_RESIDUAL:
        x += _load(residual_ptrs, cols, residual_col, mask, ACC)
        x = x.to(TOTAL).to(ACC)
    return x


@triton.jit
def _load_scale(weight_ptr, cols, size, weight_offset, HAS_WEIGHT: tl.constexpr, ACC: tl.constexpr):
    """weight_offset + weight, or ones."""
    scale = tl.full((cols.shape[0],), 1.0, ACC)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=cols < size, other=0.0).to(ACC)
        scale = weight + tl.full((), weight_offset, ACC)
    return scale[None, :]


# numbers of rows: Triton would compile anew for 1, and for multiples of 16
@triton.jit(do_not_specialize=["num_rows", "inner"])
def forward_kernel(
    input_ptr,  # (outer, inner, size)
    residual_ptr,  # (outer, inner, size), read if HAS_RESIDUAL
    weight_ptr,  # (size,), read if HAS_WEIGHT
    out_ptr,  # (outer * inner, size)
    total_ptr,  # (outer * inner, size), dtype of out, written if HAS_RESIDUAL
    rstd_ptr,  # (outer * inner,) ACC
    num_rows,
    size,
    inner,
    input_outer,
    input_inner,
    input_col,
    residual_outer,
    residual_inner,
    residual_col,
    eps: tl.float64,
    weight_offset: tl.float64,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    # int64: vectors of 4,096 pass 2**31 elements at row 524,288
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    has_row = (rows < num_rows)[:, None]
    inputs = input_ptr + (rows // inner) * input_outer + (rows % inner) * input_inner
    residuals = residual_ptr + (rows // inner) * residual_outer + (rows % inner) * residual_inner
    outs = (out_ptr + rows * size)[:, None]
    totals = (total_ptr + rows * size)[:, None]
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    lanes = tl.arange(0, BLOCK_C).to(tl.int64)

    squares = tl.zeros((BLOCK_ROWS,), ACC)
    x = tl.zeros((BLOCK_ROWS, BLOCK_C), ACC)
    for start in range(0, BLOCK_C if IS_WHOLE else size, BLOCK_C):
        cols = start + lanes
        mask = has_row & (cols < size)[None, :]
        x = _load_total(
            inputs, residuals, cols, input_col, residual_col, mask, HAS_RESIDUAL, DTYPE, ACC
        )
        squares += tl.sum(x * x, 1)
        if HAS_RESIDUAL:
            tl.store(totals + cols[None, :], x.to(DTYPE), mask=mask)
    rstd = tl.rsqrt(squares / size + tl.full((), eps, ACC))
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)

    for start in range(0, BLOCK_C if IS_WHOLE else size, BLOCK_C):
        cols = start + lanes
        mask = has_row & (cols < size)[None, :]
        if not IS_WHOLE:
            x = _load_total(
                inputs, residuals, cols, input_col, residual_col, mask, HAS_RESIDUAL, DTYPE, ACC
            )
        scale = _load_scale(weight_ptr, cols, size, weight_offset, HAS_WEIGHT, ACC)
        tl.store(outs + cols[None, :], (x * rstd[:, None] * scale).to(DTYPE), mask=mask)


@triton.jit
def _gradient(normal, grad, mean, rstd, dtotal_ptrs, cols, mask, HAS_DTOTAL: tl.constexpr):
    """dx, of the gradient of n and of the mean of their product."""
    dx = (grad - normal * mean[:, None]) * rstd[:, None]
    if HAS_DTOTAL:
        dx += tl.load(dtotal_ptrs + cols[None, :], mask=mask, other=0.0).to(dx.dtype)
    return dx


@triton.jit(do_not_specialize=["num_rows", "inner"])
def backward_kernel(
    dout_ptr,  # (outer, inner, size)
    dtotal_ptr,  # (outer * inner, size), read if HAS_DTOTAL
    vectors_ptr,  # (outer, inner, size)
    weight_ptr,  # (size,), read if HAS_WEIGHT
    rstd_ptr,  # (outer * inner,) ACC
    dvectors_ptr,  # (outer * inner, size), written if NEEDS_VECTORS
    partial_ptr,  # (programs, size) ACC, written if NEEDS_WEIGHT
    num_rows,
    size,
    inner,
    dout_outer,
    dout_inner,
    dout_col,
    vectors_outer,
    vectors_inner,
    vectors_col,
    weight_offset: tl.float64,
    HAS_DTOTAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NEEDS_VECTORS: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C).to(tl.int64)
    in_row = (cols < size)[None, :]
    scale = _load_scale(weight_ptr, cols, size, weight_offset, HAS_WEIGHT, ACC)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_C), ACC)
    for start in range(0, ROWS, BLOCK_ROWS):
        rows = program * ROWS + start + tl.arange(0, BLOCK_ROWS)
        has_row = rows < num_rows
        mask = has_row[:, None] & in_row
        vectors = vectors_ptr + (rows // inner) * vectors_outer + (rows % inner) * vectors_inner
        douts = dout_ptr + (rows // inner) * dout_outer + (rows % inner) * dout_inner
        rstd = tl.load(rstd_ptr + rows, mask=has_row, other=0.0)
        normal = _load(vectors, cols, vectors_col, mask, ACC) * rstd[:, None]
        dout = _load(douts, cols, dout_col, mask, ACC)
        product = dout * normal
        if NEEDS_WEIGHT:
            sums += product
        if NEEDS_VECTORS:
            grad = dout * scale
            mean = tl.sum(product * scale, 1) / size
            dtotals = (dtotal_ptr + rows * size)[:, None]
            dx = _gradient(normal, grad, mean, rstd, dtotals, cols, mask, HAS_DTOTAL)
            dvectors = (dvectors_ptr + rows * size)[:, None] + cols[None, :]
            tl.store(dvectors, dx.to(dvectors_ptr.dtype.element_ty), mask=mask)
    if NEEDS_WEIGHT:
        tl.store(partial_ptr + program * size + cols, tl.sum(sums, 0), mask=cols < size)


@triton.jit(do_not_specialize=["num_rows", "inner"])
def wide_backward_kernel(
    dout_ptr,  # (outer, inner, size)
    dtotal_ptr,  # (outer * inner, size), read if HAS_DTOTAL
    vectors_ptr,  # (outer, inner, size)
    weight_ptr,  # (size,), read if HAS_WEIGHT
    rstd_ptr,  # (outer * inner,) ACC
    dvectors_ptr,  # (outer * inner, size)
    num_rows,
    size,
    inner,
    dout_outer,
    dout_inner,
    dout_col,
    vectors_outer,
    vectors_inner,
    vectors_col,
    weight_offset: tl.float64,
    HAS_DTOTAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    has_row = rows < num_rows
    vectors = vectors_ptr + (rows // inner) * vectors_outer + (rows % inner) * vectors_inner
    douts = dout_ptr + (rows // inner) * dout_outer + (rows % inner) * dout_inner
    dtotals = (dtotal_ptr + rows * size)[:, None]
    dvectors = (dvectors_ptr + rows * size)[:, None]
    rstd = tl.load(rstd_ptr + rows, mask=has_row, other=0.0)
    lanes = tl.arange(0, BLOCK_C).to(tl.int64)
    dots = tl.zeros((BLOCK_ROWS,), ACC)
    for start in range(0, size, BLOCK_C):
        cols = start + lanes
        mask = has_row[:, None] & (cols < size)[None, :]
        normal = _load(vectors, cols, vectors_col, mask, ACC) * rstd[:, None]
        scale = _load_scale(weight_ptr, cols, size, weight_offset, HAS_WEIGHT, ACC)
        dots += tl.sum(_load(douts, cols, dout_col, mask, ACC) * scale * normal, 1)
    mean = dots / size
    for start in range(0, size, BLOCK_C):
        cols = start + lanes
        mask = has_row[:, None] & (cols < size)[None, :]
        normal = _load(vectors, cols, vectors_col, mask, ACC) * rstd[:, None]
        scale = _load_scale(weight_ptr, cols, size, weight_offset, HAS_WEIGHT, ACC)
        grad = _load(douts, cols, dout_col, mask, ACC) * scale
        dx = _gradient(normal, grad, mean, rstd, dtotals, cols, mask, HAS_DTOTAL)
        tl.store(dvectors + cols[None, :], dx.to(dvectors_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "inner", "blocks_per_row"])
def wide_weight_kernel(
    dout_ptr,  # (outer, inner, size)
    vectors_ptr,  # (outer, inner, size)
    rstd_ptr,  # (outer * inner,) ACC
    partial_ptr,  # (programs / blocks_per_row, size) ACC
    num_rows,
    size,
    inner,
    blocks_per_row,
    dout_outer,
    dout_inner,
    dout_col,
    vectors_outer,
    vectors_inner,
    vectors_col,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    # one grid dimension: y and z end at 65,535
    program = tl.program_id(0).to(tl.int64)
    part = program // blocks_per_row
    cols = (program % blocks_per_row) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = (cols < size)[None, :]
    sums = tl.zeros((BLOCK_ROWS, BLOCK_C), ACC)
    for start in range(0, ROWS, BLOCK_ROWS):
        rows = part * ROWS + start + tl.arange(0, BLOCK_ROWS)
        has_row = rows < num_rows
        mask = has_row[:, None] & in_row
        vectors = vectors_ptr + (rows // inner) * vectors_outer + (rows % inner) * vectors_inner
        douts = dout_ptr + (rows // inner) * dout_outer + (rows % inner) * dout_inner
        rstd = tl.load(rstd_ptr + rows, mask=has_row, other=0.0)
        normal = _load(vectors, cols, vectors_col, mask, ACC) * rstd[:, None]
        sums += _load(douts, cols, dout_col, mask, ACC) * normal
    tl.store(partial_ptr + part * size + cols, tl.sum(sums, 0), mask=cols < size)


@triton.jit(do_not_specialize=["num_parts"])
def weight_kernel(
    partial_ptr,  # (num_parts, size) ACC
    dweight_ptr,  # (size,)
    num_parts,
    size,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    cols = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    parts = tl.arange(0, BLOCK_ROWS).to(tl.int64)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_C), ACC)
    for start in range(0, num_parts, BLOCK_ROWS):
        rows = (start + parts)[:, None]
        mask = (rows < num_parts) & (cols < size)[None, :]
        sums += tl.load(partial_ptr + rows * size + cols[None, :], mask=mask, other=0.0)
    dweight = tl.sum(sums, 0).to(dweight_ptr.dtype.element_ty)
    tl.store(dweight_ptr + cols, dweight, mask=cols < size)
