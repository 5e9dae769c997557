"""What every attention kernel shares: which program works on what, which keys a query sees, loads.

A program works in one sequence: a row of the batch without its padding, or one of the documents
that are packed into a row.  In it queries are numbered t in [0, T), keys s in [0, S), and query t
sees the keys s <= t + offset, of them the last ``window``.  The offset is S - T, which aligns the
ends, and less by the padding in front.  If it is negative, the first -offset queries see no key.
Blocks are counted from the beginning of the sequence, so that what surrounds it changes no bit.
"""

import triton
import triton.language as tl

from .._losses import tanh

# what varies from batch to batch: Triton would compile anew for 1, and for multiples of 16
LENGTHS = ["num_queries", "num_keys", "num_documents", "window", "heads_per_section"]
LENGTHS += ["batch_heads", "batch_kv_heads"]
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


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
def place_queries(
    bounds_q_ptr, bounds_k_ptr, key_start_ptr, key_end_ptr, batch_heads, heads, num_queries,
    num_keys, num_documents, heads_per_section,
    BLOCK_M: tl.constexpr, PACKED: tl.constexpr, HAS_START: tl.constexpr, HAS_END: tl.constexpr,
):  # fmt: skip
    """Which queries this program has, and of which sequence.

    Returns:
        head of the batch, first token and number of the sequence's queries, first of its keys'
        tokens, and their number, offset, first query of the block.
    """
    if PACKED:
        num_blocks = num_queries // BLOCK_M + num_documents + 1
        rank, head = locate(num_blocks, batch_heads, heads_per_section)
        document, block = document_of(rank, bounds_q_ptr, num_documents, num_queries, BLOCK_M)
        q_token, q_count = document_bounds(document, bounds_q_ptr, num_documents, num_queries)
        k_token, k_count = document_bounds(document, bounds_k_ptr, num_documents, num_keys)
        first_query = block * BLOCK_M
        offset = k_count - q_count
        # nothing to see after the last document, nor for a block that its document does not need
        spare = (document == num_documents) | (first_query >= q_count)
        k_count = tl.where(spare, 0, k_count)
    else:
        # one more where padding in front takes queries away from whole blocks
        num_blocks = tl.cdiv(num_queries, BLOCK_M) + (1 if HAS_START else 0)
        rank, head = locate(num_blocks, batch_heads, heads_per_section)
        # the last block of queries sees the most keys
        block = num_blocks - 1 - rank
        q_token = tl.zeros((), tl.int32)
        q_count = num_queries
        k_token, k_count, offset = padded_row(
            head // heads, key_start_ptr, key_end_ptr, num_queries, num_keys, HAS_START, HAS_END
        )
        if HAS_START:
            # queries that see keys have blocks of their own, and so the same as without padding
            blind = tl.minimum(tl.maximum(-offset, 0), num_queries)
            seeing_blocks = tl.cdiv(num_queries - blind, BLOCK_M)
            is_blind = block >= seeing_blocks
            block = tl.where(is_blind, block - seeing_blocks, block)
            q_token = tl.where(is_blind, 0, blind)
            q_count = tl.where(is_blind, blind, num_queries - blind)
            k_count = tl.where(is_blind, 0, k_count)
            offset += q_token
        first_query = block * BLOCK_M
    return head, q_token, q_count, k_token, k_count, offset, first_query


@triton.jit
def place_keys(
    bounds_q_ptr, bounds_k_ptr, key_start_ptr, key_end_ptr, batch_kv_heads, kv_heads, num_queries,
    num_keys, num_documents, heads_per_section,
    BLOCK_N: tl.constexpr, PACKED: tl.constexpr, HAS_START: tl.constexpr, HAS_END: tl.constexpr,
    SKIPS_BLIND: tl.constexpr,
):  # fmt: skip
    """The same for a block of keys.

    The queries begin with the first that sees a key, if SKIPS_BLIND: without padding or documents,
    and with no more queries than keys, all do, and registers are scarce.
    """
    if PACKED:
        num_blocks = num_keys // BLOCK_N + num_documents + 1
        rank, head = locate(num_blocks, batch_kv_heads, heads_per_section)
        document, block = document_of(rank, bounds_k_ptr, num_documents, num_keys, BLOCK_N)
        q_token, q_count = document_bounds(document, bounds_q_ptr, num_documents, num_queries)
        k_token, k_count = document_bounds(document, bounds_k_ptr, num_documents, num_keys)
        first_key = block * BLOCK_N
        offset = k_count - q_count
        spare = (document == num_documents) | (first_key >= k_count)
        q_count = tl.where(spare, 0, q_count)
    else:
        num_blocks = tl.cdiv(num_keys, BLOCK_N)
        # the first block of keys is seen by the most queries
        rank, head = locate(num_blocks, batch_kv_heads, heads_per_section)
        first_key = rank * BLOCK_N
        q_token = tl.zeros((), tl.int32)
        q_count = num_queries
        k_token, k_count, offset = padded_row(
            head // kv_heads, key_start_ptr, key_end_ptr, num_queries, num_keys, HAS_START, HAS_END
        )
    if SKIPS_BLIND:
        # blocks of queries are counted from here, so that padding in front changes no sum
        blind = tl.minimum(tl.maximum(-offset, 0), q_count)
        q_token += blind
        q_count -= blind
        offset += blind
    return head, q_token, q_count, k_token, k_count, offset, first_key


@triton.jit
def padded_row(
    batch, key_start_ptr, key_end_ptr, num_queries, num_keys,
    HAS_START: tl.constexpr, HAS_END: tl.constexpr,
):  # fmt: skip
    """``(first key, keys, offset)`` of a row of the batch."""
    start = tl.zeros((), tl.int32)
    end = num_keys
    if HAS_START:
        start = tl.minimum(tl.maximum(tl.load(key_start_ptr + batch), 0), num_keys)
    if HAS_END:
        end = tl.minimum(tl.maximum(tl.load(key_end_ptr + batch), start), num_keys)
    return start, end - start, num_keys - num_queries - start


@triton.jit
def document_of(rank, bounds_ptr, num_documents, num_tokens, BLOCK: tl.constexpr):
    """``(document, block in it)`` of the rank-th program of a head.

    Document d has the programs from ``bounds[d] // BLOCK + d`` on: so many or one more than it
    needs, without a sum over lengths.  What follows the last document counts as one more.
    """
    lanes = tl.arange(0, 128)
    before = 0
    for start in range(0, num_documents + 1, 128):
        documents = start + lanes
        inside = documents <= num_documents
        bounds = tl.load(bounds_ptr + documents, mask=inside, other=0)
        first = tl.minimum(tl.maximum(bounds, 0), num_tokens) // BLOCK + documents
        before += tl.sum((inside & (first <= rank)).to(tl.int32), 0)
    document = tl.maximum(before - 1, 0)
    first_token, _ = document_bounds(document, bounds_ptr, num_documents, num_tokens)
    return document, rank - (first_token // BLOCK + document)


@triton.jit
def document_bounds(document, bounds_ptr, num_documents, num_tokens):
    """``(first token, tokens)``; the tokens after the last document count as one more."""
    first = tl.load(bounds_ptr + document)
    end = tl.load(bounds_ptr + document + 1, mask=document < num_documents, other=num_tokens)
    first = tl.minimum(tl.maximum(first, 0), num_tokens)
    return first, tl.minimum(tl.maximum(end, first), num_tokens) - first


@triton.jit
def visible(queries, keys, num_keys, offset, window, HAS_WINDOW: tl.constexpr):
    """The mask.  ``queries`` and ``keys`` broadcast against each other."""
    seen = (keys <= queries + offset) & (keys < num_keys)
    if HAS_WINDOW:
        seen &= keys > queries + offset - window
    return seen


@triton.jit
def key_range(
    first_query, num_queries, num_keys, offset, window,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """``(start, unmasked_start, unmasked_end, end)`` for a block of queries.

    Keys in [unmasked_start, unmasked_end), a whole number of blocks, are seen by every query of the
    block; the others in [start, end) need the mask; those outside are seen by none.
    """
    past_first = first_query + offset + 1
    past_last = tl.minimum(first_query + BLOCK_M, num_queries) + offset
    end = tl.minimum(tl.maximum(past_last, 0), num_keys)
    unmasked_end = tl.minimum(tl.maximum(past_first, 0), num_keys) // BLOCK_N * BLOCK_N
    start = 0
    unmasked_start = 0
    if HAS_WINDOW:
        start = tl.maximum(past_first - window, 0) // BLOCK_N * BLOCK_N
        unmasked_end = tl.maximum(unmasked_end, start)
        unmasked_start = tl.cdiv(tl.maximum(past_last - window, 0), BLOCK_N) * BLOCK_N
        unmasked_start = tl.minimum(tl.maximum(unmasked_start, start), unmasked_end)
    return start, unmasked_start, unmasked_end, end


@triton.jit
def query_range(
    first_key, num_queries, num_keys, offset, window,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """``(start, unmasked_start, unmasked_end, end)`` for a block of keys.

    Queries in [unmasked_start, unmasked_end), from whole blocks on, see every key of the block; the
    others in [start, end) need the mask; those outside see none.
    """
    start = tl.maximum(first_key - offset, 0) // BLOCK_M * BLOCK_M
    unmasked_start = tl.cdiv(tl.maximum(first_key + BLOCK_N - 1 - offset, 0), BLOCK_M) * BLOCK_M
    end = num_queries
    if HAS_WINDOW:
        past_last = tl.minimum(first_key + BLOCK_N, num_keys) - 1 - offset + window
        end = tl.maximum(tl.minimum(end, past_last), 0)
    unmasked_start = tl.minimum(unmasked_start, end)
    unmasked_end = end
    if HAS_WINDOW:
        unmasked_end = tl.maximum(first_key - offset + window, 0) // BLOCK_M * BLOCK_M
        unmasked_end = tl.maximum(tl.minimum(unmasked_end, end), unmasked_start)
    return start, unmasked_start, unmasked_end, end


@triton.jit
def score_factors(scale, softcap, HAS_SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    """``(inner, outer)``: a score in base 2 is outer times the product of query and key, or, with a
    softcap, outer * capped(inner * product)."""
    if HAS_SOFTCAP:
        cap = tl.full((), softcap, ACC)
        inner, outer = scale / cap, cap * LOG2_E
    else:
        inner, outer = scale, scale * LOG2_E
    return inner, outer


@triton.jit
def positive_scale(q, scale, HAS_SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    """``(q, scale)`` of equal scores, the scale above 0 unless a softcap takes it first.

    Scaling after the row maximum needs that, and moving the sign into the query is exact.
    """
    scale = tl.full((), scale, ACC)
    if not HAS_SOFTCAP:
        sign = tl.where(scale > 0, 1.0, tl.where(scale < 0, -1.0, 0.0))
        q = (q.to(ACC) * sign).to(q.dtype)
        # a scale of 0 empties the query, and the factor may then be anything but 0: 0 * -inf is NaN
        scale = tl.where(scale == 0, 1.0, tl.abs(scale))
    return q, scale


@triton.jit
def softmax_step(scores, row_max, outer):
    """``(p, rescale, row_max)``: exponentials of one more block of scores, in base 2 after
    ``outer``; the factor of what was summed before; the maximum of all."""
    new_max = tl.maximum(row_max, tl.max(scores, 1) * outer)
    # inf - inf is NaN; a row that has seen -inf alone keeps a sum of 0, one of +inf gets +inf
    pivot = tl.where(tl.abs(new_max) == float("inf"), 0.0, new_max)
    return tl.exp2(scores * outer - pivot[:, None]), tl.exp2(row_max - pivot), new_max


@triton.jit
def capped(x, FAST: tl.constexpr):
    """tanh; FAST is off by 1e-7 near 0."""
    if FAST:
        return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)
    else:
        return tanh(x)


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
