"""Rotate new keys and write them, with their values, into a cache.

One program writes BLOCK heads of tokens of one row of the batch, or, of rows that stand side by
side, BLOCK tokens of one head.  A row that does not fit writes nothing.
"""

import triton
import triton.language as tl

from ..attention.tiles import document_bounds
from .cache import load_turned, pages_exist, quantized, row_length, row_of, token_offsets

# what varies from call to call: Triton would compile anew for 1, and for multiples of 16
LENGTHS = [
    "batch", "num_queries", "cache_length", "capacity", "max_pages", "page_size", "num_pages",
]  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
def append_kernel(
    key_ptr,  # (B, T, G, HEAD_DIM)
    value_ptr,  # (B, T, G, VALUE_DIM)
    k_cache_ptr,  # (B, S, G, HEAD_DIM), or pages
    v_cache_ptr,  # (B, S, G, VALUE_DIM), or pages
    k_scale_ptr,  # (B, S, G) float32, or pages, written if HAS_SCALES
    v_scale_ptr,
    seqlens_ptr,  # (B,) int32, read if HAS_LENGTHS
    table_ptr,  # (B, max_pages) int32, read if IS_PAGED
    bounds_ptr,  # (rows + 1,) int32, read if IS_PACKED
    cos_ptr,  # (positions, PAIRS), read if PAIRS > 0
    sin_ptr,
    stride_kb,
    stride_kt,
    stride_kg,
    stride_vb,
    stride_vt,
    stride_vg,
    stride_kcb,  # from page to page if IS_PAGED
    stride_kcs,
    stride_kcg,
    stride_vcb,
    stride_vcs,
    stride_vcg,
    stride_ksb,
    stride_kss,
    stride_ksg,
    stride_vsb,
    stride_vss,
    stride_vsg,
    batch,  # B, or rows if IS_PACKED
    kv_heads,  # G
    num_queries,  # T, of all rows if IS_PACKED
    cache_length,  # read unless HAS_LENGTHS
    capacity,
    max_pages,
    page_size,
    num_pages,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    IS_PAGED: tl.constexpr,
    IS_PACKED: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    if IS_PACKED:
        row, block = row_of(program // kv_heads, bounds_ptr, batch, num_queries, 1, BLOCK)
        first_token, count = document_bounds(row, bounds_ptr, batch, num_queries)
        tokens = block * BLOCK + lanes
        heads = program % kv_heads + tl.zeros((BLOCK,), tl.int64)
        given_row = tl.zeros((), tl.int64)
    else:
        blocks = tl.cdiv(num_queries * kv_heads, BLOCK)
        row, first_token, count = program // blocks, 0, num_queries
        tokens = (program % blocks * BLOCK + lanes) // kv_heads
        heads = ((program % blocks * BLOCK + lanes) % kv_heads).to(tl.int64)
        given_row = row.to(tl.int64)
    row = row.to(tl.int64)
    start, fits = row_length(seqlens_ptr, row, cache_length, count, capacity, HAS_LENGTHS)
    if IS_PAGED:
        # of all its tokens, so that a row is written where its result is a number
        end = tl.where(fits, start + count, 0)
        fits = fits & pages_exist(0, end, row, table_ptr, max_pages, page_size, num_pages)
    inside = (tokens < count) & fits
    positions = start + tokens
    tokens = (first_token + tokens).to(tl.int64)

    offsets = given_row * stride_kb + tokens * stride_kt + heads * stride_kg
    key = load_turned(
        key_ptr, offsets, inside, positions, cos_ptr, sin_ptr,
        HEAD_DIM, BLOCK_D, PAIRS, INTERLEAVED, ACC,
    )  # fmt: skip
    offsets = token_offsets(
        positions, inside, row, table_ptr, max_pages, page_size, stride_kcb, stride_kcs, IS_PAGED
    )
    offsets += heads * stride_kcg
    if HAS_SCALES:
        key, scale = quantized(key, ACC)
        at = token_offsets(
            positions, inside, row, table_ptr, max_pages, page_size, stride_ksb, stride_kss,
            IS_PAGED,
        )  # fmt: skip
        tl.store(k_scale_ptr + at + heads * stride_ksg, scale, mask=inside)
    cols = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (cols < HEAD_DIM)[None, :]
    tl.store(k_cache_ptr + offsets[:, None] + cols[None, :], key, mask=mask)

    cols = tl.arange(0, BLOCK_V)
    mask = inside[:, None] & (cols < VALUE_DIM)[None, :]
    offsets = given_row * stride_vb + tokens * stride_vt + heads * stride_vg
    value = tl.load(value_ptr + offsets[:, None] + cols[None, :], mask=mask, other=0.0)
    offsets = token_offsets(
        positions, inside, row, table_ptr, max_pages, page_size, stride_vcb, stride_vcs, IS_PAGED
    )
    offsets += heads * stride_vcg
    if HAS_SCALES:
        value, scale = quantized(value, ACC)
        at = token_offsets(
            positions, inside, row, table_ptr, max_pages, page_size, stride_vsb, stride_vss,
            IS_PAGED,
        )  # fmt: skip
        tl.store(v_scale_ptr + at + heads * stride_vsg, scale, mask=inside)
    tl.store(v_cache_ptr + offsets[:, None] + cols[None, :], value, mask=mask)
