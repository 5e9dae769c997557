"""What every attention kernel shares: which program works on what, which keys a query sees, loads.

Queries are numbered t in [0, T), keys s in [0, S), aligned at their ends: query t sees the keys
s <= t + offset with offset = S - T.  If it is negative, the first -offset queries see no key.
"""

import triton
import triton.language as tl


@triton.jit
def locate(num_blocks, num_heads, heads_per_section):
    """``(block, head)`` of this program in a grid of ``num_blocks * num_heads`` programs.

    Heads come in sections whose keys and values fit the L2 cache together; inside a section the
    block changes slowest, so that all heads run their longest block first and the shortest last.
    One grid dimension: y and z end at 65,535.
    """
    program = tl.program_id(0)
    section = program // (heads_per_section * num_blocks)
    first_head = section * heads_per_section
    heads = tl.minimum(heads_per_section, num_heads - first_head)
    rank = program - first_head * num_blocks
    return rank // heads, (first_head + rank % heads).to(tl.int64)


@triton.jit
def visible(queries, keys, offset):
    """The mask.  ``queries`` and ``keys`` broadcast against each other."""
    return keys <= queries + offset


@triton.jit
def key_range(first_query, num_queries, num_keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """``(unmasked_end, end)`` for a block of queries.

    Keys in [0, unmasked_end), a whole number of blocks, are seen by every query of the block; keys
    in [unmasked_end, end) need the mask; later ones are seen by none.
    """
    offset = num_keys - num_queries
    last_query = tl.minimum(first_query + BLOCK_M, num_queries) - 1
    unmasked_end = tl.maximum(first_query + offset + 1, 0) // BLOCK_N * BLOCK_N
    return unmasked_end, tl.maximum(last_query + offset + 1, 0)


@triton.jit
def query_range(first_key, num_queries, num_keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """``(start, unmasked_start)`` for a block of keys.

    Queries from unmasked_start, a whole number of blocks, to the end see every key of the block;
    queries in [start, unmasked_start) need the mask; earlier ones see none.
    """
    offset = num_keys - num_queries
    start = tl.maximum(first_key - offset, 0) // BLOCK_M * BLOCK_M
    unmasked_start = tl.cdiv(tl.maximum(first_key + BLOCK_N - 1 - offset, 0), BLOCK_M) * BLOCK_M
    return start, tl.minimum(unmasked_start, num_queries)


@triton.jit
def load_rows(
    ptr,
    rows,
    num_rows,
    stride,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    """``(len(rows), BLOCK)``, zero from column DIM on and, if checked, from row num_rows on."""
    cols = tl.arange(0, BLOCK)
    # int64: 8 heads of 128 stored side by side pass 2**31 elements at token 2,097,152
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if CHECK_ROWS and DIM < BLOCK:
        tile = tl.load(ptrs, mask=(rows < num_rows)[:, None] & (cols < DIM)[None, :], other=0.0)
    elif CHECK_ROWS:
        tile = tl.load(ptrs, mask=(rows < num_rows)[:, None], other=0.0)
    elif DIM < BLOCK:
        tile = tl.load(ptrs, mask=(cols < DIM)[None, :], other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def store_rows(ptr, rows, num_rows, stride, tile, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The reverse of ``load_rows``, rounding ``tile`` to the dtype of ``ptr``."""
    cols = tl.arange(0, BLOCK)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    mask = (rows < num_rows)[:, None] & (cols < DIM)[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)
