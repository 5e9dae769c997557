"""The rotary kernel (Su et al., 2021, https://arxiv.org/abs/2104.09864).

    (a, b) -> (a cos - b sin, b cos + a sin)        for each pair of channels

The gradient is the rotation by the opposite angle.  A program has BLOCK_ROWS heads, of one token or
of several, and reads their channels once: each pair is in two registers of a lane.  Channels beyond
the pairs are copied.
"""

import triton
import triton.language as tl


# what varies from call to call: Triton would compile anew for 1, and for multiples of 16
@triton.jit(do_not_specialize=["num_rows", "length", "num_heads"])
def rotate_kernel(
    x_ptr,  # (B, T, num_heads, head_dim)
    cos_ptr,  # (B, T, pairs), by strides that may be 0
    sin_ptr,  # of the same strides
    out_ptr,  # (B, T, num_heads, head_dim), without gaps
    num_rows,  # B * T * num_heads
    length,  # T
    num_heads,
    head_dim,
    pairs,
    stride_b,
    stride_t,
    stride_h,
    stride_d,
    angles_b,
    angles_t,
    angles_p,
    INTERLEAVED: tl.constexpr,
    TURN_BACK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
):
    # int64: 32 heads of 128 channels pass 2**31 elements at token 524,288
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    has_row = (rows < num_rows)[:, None]
    token, head = rows // num_heads, rows % num_heads
    batch, position = token // length, token % length
    x_ptrs = (x_ptr + batch * stride_b + position * stride_t + head * stride_h)[:, None]
    out_ptrs = (out_ptr + rows * head_dim)[:, None]
    cos_ptrs = (cos_ptr + batch * angles_b + position * angles_t)[:, None]
    sin_ptrs = (sin_ptr + batch * angles_b + position * angles_t)[:, None]
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty

    for start in range(0, pairs, BLOCK_P):
        pair = (start + tl.arange(0, BLOCK_P).to(tl.int64))[None, :]
        mask = has_row & (pair < pairs)
        cos = tl.load(cos_ptrs + pair * angles_p, mask=mask, other=0.0).to(ACC)
        sin = tl.load(sin_ptrs + pair * angles_p, mask=mask, other=0.0).to(ACC)
        if TURN_BACK:
            sin = -sin
        if INTERLEAVED:
            # neighbours are read and written together, and parted in registers
            cols = (2 * start + tl.arange(0, 2 * BLOCK_P).to(tl.int64))[None, :]
            inside = has_row & (cols < 2 * pairs)
            x = tl.load(x_ptrs + cols * stride_d, mask=inside, other=0.0).to(ACC)
            a, b = tl.split(tl.reshape(x, (BLOCK_ROWS, BLOCK_P, 2)))
            turned = tl.join(a * cos - b * sin, b * cos + a * sin)
            turned = tl.reshape(turned, (BLOCK_ROWS, 2 * BLOCK_P))
            tl.store(out_ptrs + cols, turned.to(DTYPE), mask=inside)
        else:
            a = tl.load(x_ptrs + pair * stride_d, mask=mask, other=0.0).to(ACC)
            b = tl.load(x_ptrs + (pairs + pair) * stride_d, mask=mask, other=0.0).to(ACC)
            tl.store(out_ptrs + pair, (a * cos - b * sin).to(DTYPE), mask=mask)
            tl.store(out_ptrs + pairs + pair, (b * cos + a * sin).to(DTYPE), mask=mask)
    for start in range(2 * pairs, head_dim, BLOCK_P):
        cols = (start + tl.arange(0, BLOCK_P).to(tl.int64))[None, :]
        mask = has_row & (cols < head_dim)
        rest = tl.load(x_ptrs + cols * stride_d, mask=mask, other=0.0)
        tl.store(out_ptrs + cols, rest, mask=mask)
