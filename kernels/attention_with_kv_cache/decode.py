"""Causal attention over a cache, with the keys of a row divided among programs.

    split i:  out_i = sum_s exp(score_s - lse_i) value_s     over the keys of the split
              lse_i = log(sum_s exp(score_s))
    together: out = sum_i exp(lse_i - lse) out_i,  lse = log(sum_i exp(lse_i))

(Dao et al., 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html.)  One program computes
BLOCK_M (query, head) pairs of one key/value head over one split, so that heads that share keys read
them once.  Where a split begins depends on the length of its row alone: SPLIT_KEYS keys each, more
where there would be more than MOST_SPLITS.

Rows that stand side by side have counts of queries that the host does not know, and each count
wants tiles and splits of its own: a launch takes the rows with more than ``least`` and at most
``most`` pairs, and leaves the others.
"""

import triton
import triton.language as tl

from ..attention.tiles import (
    LOG2_E,
    capped,
    document_bounds,
    positive_scale,
    score_factors,
    softmax_step,
    visible,
)
from .cache import load_turned, pages_exist, row_length, row_of, token_offsets

LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
# what varies from call to call: Triton would compile anew for 1, and for multiples of 16
LENGTHS = [
    "batch_kv_heads", "num_queries", "cache_length", "capacity", "max_pages", "page_size",
    "num_pages", "window", "parts", "splits", "least", "most", "slots", "row_slots", "batch",
]  # fmt: skip


@triton.jit
def keys_of_split(
    length, parts, BLOCK_N: tl.constexpr, SPLIT_KEYS: tl.constexpr, MOST_SPLITS: tl.constexpr
):
    """How many keys a split of a row has; with SPLIT_KEYS == 0 there are ``parts`` splits."""
    if SPLIT_KEYS == 0:
        keys = tl.cdiv(tl.cdiv(length, parts), BLOCK_N) * BLOCK_N
    else:
        keys = SPLIT_KEYS * tl.cdiv(length, SPLIT_KEYS * MOST_SPLITS)
    return tl.maximum(keys, BLOCK_N)


@triton.jit
def first_slot(row, first_token, row_slots):
    """Where the results of a row begin that are to be put together."""
    return tl.where(row_slots > 0, row * row_slots, first_token)


@triton.jit(do_not_specialize=LENGTHS)
def decode_kernel(
    q_ptr,  # (B, T, H, HEAD_DIM)
    k_ptr,  # (B, S, G, HEAD_DIM), or pages
    v_ptr,  # (B, S, G, VALUE_DIM), or pages
    k_scale_ptr,  # (B, S, G) float32, or pages, read if HAS_SCALES
    v_scale_ptr,
    out_ptr,  # (B, T, H, VALUE_DIM) contiguous if IS_WHOLE, else (B, H, T, splits, VALUE_DIM) ACC
    lse_ptr,  # (B, H, T) contiguous ACC, natural, if IS_WHOLE, else (B, H, T, splits), base 2
    # of the latter (H, slots, ...) for (B, H, T, ...) if IS_PACKED
    sinks_ptr,  # (H,), read if HAS_SINKS
    seqlens_ptr,  # (B,) int32, read if HAS_LENGTHS
    table_ptr,  # (B, max_pages) int32, read if IS_PAGED
    bounds_ptr,  # (rows + 1,) int32, read if IS_PACKED
    cos_ptr,  # (positions, PAIRS), read if PAIRS > 0
    sin_ptr,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,  # from page to page if IS_PAGED
    stride_ks,
    stride_kg,
    stride_vb,
    stride_vs,
    stride_vg,
    stride_ksb,
    stride_kss,
    stride_ksg,
    stride_vsb,
    stride_vss,
    stride_vsg,
    batch_kv_heads,  # B * G, rows * G if IS_PACKED
    kv_heads,  # G
    group_size,  # query heads per key/value head
    num_queries,  # T, of all rows if IS_PACKED
    cache_length,  # read unless HAS_LENGTHS
    capacity,
    max_pages,
    page_size,
    num_pages,
    window,  # keys, read if HAS_WINDOW
    parts,  # read if SPLIT_KEYS == 0
    splits,  # that there is room for
    least,  # these four are read if IS_PACKED
    most,
    slots,  # queries that there is room for
    row_slots,  # those of one row, or 0 where every query has one
    scale: tl.float64,
    softcap: tl.float64,  # read if HAS_SOFTCAP
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    APPENDS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    IS_PAGED: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    IS_PACKED: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FAST_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0)
    kv_head = (program % kv_heads).to(tl.int64)
    batch = batch_kv_heads // kv_heads
    if IS_PACKED and SPLIT_KEYS == 0:
        # blocks of all rows, or one more for each than it needs
        blocks = num_queries * group_size // BLOCK_M + batch
        row, block = row_of(
            program // kv_heads % blocks, bounds_ptr, batch, num_queries, group_size, BLOCK_M
        )
        split = program // kv_heads // blocks
    else:
        # no row has more
        pairs = num_queries * group_size
        if IS_PACKED:
            pairs = tl.minimum(pairs, most)
        blocks = tl.cdiv(pairs, BLOCK_M)
        row = program % batch_kv_heads // kv_heads
        block = program // batch_kv_heads % blocks
        split = program // batch_kv_heads // blocks
    first_token, count = 0, num_queries
    if IS_PACKED:
        first_token, count = document_bounds(row, bounds_ptr, batch, num_queries)
    row = row.to(tl.int64)
    new = count if APPENDS else 0
    length, fits = row_length(seqlens_ptr, row, cache_length, new, capacity, HAS_LENGTHS)
    length = tl.where(fits, length + new, 0)
    offset = length - count
    split_keys = keys_of_split(length, parts, BLOCK_N, SPLIT_KEYS, MOST_SPLITS)
    # not split * split_keys, which may pass 2**31 for a split that the row does not have
    has_nothing = split >= tl.cdiv(tl.maximum(length, 1), split_keys)
    if IS_PACKED:
        pairs = count * group_size
        has_nothing |= (pairs <= least) | (pairs > most) | (block * BLOCK_M >= pairs)
    if has_nothing:
        return
    start = split * split_keys
    stored_end = start + tl.minimum(split_keys, length - start)
    if IS_PAGED:
        fits = fits & pages_exist(
            start, stored_end, row, table_ptr, max_pages, page_size, num_pages
        )
        stored_end = tl.where(fits, stored_end, start)

    pairs = block * BLOCK_M + tl.arange(0, BLOCK_M)
    queries = pairs // group_size
    heads = kv_head * group_size + pairs % group_size
    inside = pairs < count * group_size
    tokens = first_token + queries.to(tl.int64)
    given_row = tl.zeros((), tl.int64) if IS_PACKED else row
    q = load_turned(
        q_ptr, given_row * stride_qb + tokens * stride_qt + heads * stride_qh,
        inside & fits, queries + offset, cos_ptr, sin_ptr,
        HEAD_DIM, BLOCK_D, PAIRS, INTERLEAVED, ACC,
    )  # fmt: skip
    q, scale = positive_scale(q, scale, HAS_SOFTCAP, ACC)
    inner, outer = score_factors(scale, softcap, HAS_SOFTCAP, ACC)

    row_max = tl.full((BLOCK_M,), float("-inf"), ACC)
    row_sum = tl.zeros((BLOCK_M,), ACC)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + heads, mask=inside & (split == 0), other=float("-inf"))
        row_max = sink.to(ACC) * LOG2_E
        row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0).to(ACC)
    acc = tl.zeros((BLOCK_M, BLOCK_V), ACC)
    last_query = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // group_size, count - 1)
    end = tl.minimum(stored_end, last_query + offset + 1)
    if HAS_WINDOW:
        first_seen = tl.maximum(block * BLOCK_M // group_size + offset + 1 - window, 0)
        start = tl.maximum(start, first_seen // BLOCK_N * BLOCK_N)
    key_cols, value_cols = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    for first_key in range(start, end, BLOCK_N):
        keys = first_key + tl.arange(0, BLOCK_N)
        stored = keys < length
        offsets = token_offsets(
            keys, stored, row, table_ptr, max_pages, page_size, stride_kb, stride_ks, IS_PAGED
        )
        k = tl.load(
            k_ptr + kv_head * stride_kg + offsets[:, None] + key_cols[None, :],
            mask=stored[:, None] & (key_cols < HEAD_DIM)[None, :], other=0.0,
        )  # fmt: skip
        # 8 bits are exact in any dtype of q
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION, out_dtype=ACC)
        if HAS_SCALES:
            offsets = token_offsets(
                keys, stored, row, table_ptr, max_pages, page_size, stride_ksb, stride_kss, IS_PAGED
            )
            k_scale = tl.load(k_scale_ptr + kv_head * stride_ksg + offsets, mask=stored, other=0.0)
            scores *= k_scale.to(ACC)[None, :]
        if HAS_SOFTCAP:
            scores = capped(scores * inner, FAST_CAP)
        seen = visible(queries[:, None], keys[None, :], length, offset, window, HAS_WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        p, rescale, row_max = softmax_step(scores, row_max, outer)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None]
        offsets = token_offsets(
            keys, stored, row, table_ptr, max_pages, page_size, stride_vb, stride_vs, IS_PAGED
        )
        v = tl.load(
            v_ptr + kv_head * stride_vg + offsets[:, None] + value_cols[None, :],
            mask=stored[:, None] & (value_cols < VALUE_DIM)[None, :], other=0.0,
        )  # fmt: skip
        if HAS_SCALES:
            offsets = token_offsets(
                keys, stored, row, table_ptr, max_pages, page_size, stride_vsb, stride_vss, IS_PAGED
            )
            v_scale = tl.load(v_scale_ptr + kv_head * stride_vsg + offsets, mask=stored, other=0.0)
            # not into p, which may be too small for float16 then
            v = (v.to(ACC) * v_scale.to(ACC)[:, None]).to(q.dtype)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION, out_dtype=ACC)

    # a row that sees no key has a sum of 0 and a maximum of -inf: out 0, lse -inf
    row_sum = tl.where(row_sum == 0, 1.0, row_sum)
    out = acc / row_sum[:, None]
    lse = row_max + tl.log2(row_sum)
    # a split without its pages makes the whole row NaN
    out = tl.where(fits, out, float("nan"))
    lse = tl.where(fits, lse, float("nan"))
    statistics = (given_row * kv_heads * group_size + heads) * num_queries + tokens
    if IS_WHOLE:
        lse *= LN_2
        tokens += given_row * num_queries
        outs = (tokens * kv_heads * group_size + heads) * VALUE_DIM
    else:
        if IS_PACKED:
            statistics = heads * slots + first_slot(row, first_token, row_slots) + queries
        statistics = statistics * splits + split
        outs = statistics * VALUE_DIM
    tl.store(lse_ptr + statistics, lse, mask=inside)
    mask = inside[:, None] & (value_cols < VALUE_DIM)[None, :]
    out_ptrs = out_ptr + outs[:, None] + value_cols[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=LENGTHS)
def combine_kernel(
    parts_out_ptr,  # (B, H, T, splits, VALUE_DIM) ACC, (H, slots, splits, VALUE_DIM) if IS_PACKED
    parts_lse_ptr,  # the same without VALUE_DIM, base 2
    out_ptr,  # (B, T, H, VALUE_DIM), contiguous
    lse_ptr,  # (B, H, T), contiguous, ACC
    seqlens_ptr,  # (B,) int32, read if HAS_LENGTHS
    bounds_ptr,  # (rows + 1,) int32, read if IS_PACKED
    batch,
    heads,  # H
    group_size,
    num_queries,  # T, of all rows if IS_PACKED
    cache_length,  # read unless HAS_LENGTHS
    capacity,
    parts,  # read if SPLIT_KEYS == 0
    splits,
    least,  # as above
    most,
    slots,
    row_slots,
    VALUE_DIM: tl.constexpr,
    APPENDS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    IS_PACKED: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,  # of decode_kernel
    BLOCK_S: tl.constexpr,  # splits at a time
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program puts one query of one head together, from the splits that its row has.

    Of rows that stand side by side it is all queries of a row with more than ``least`` and at most
    ``most`` pairs.
    """
    program = tl.program_id(0).to(tl.int64)
    if IS_PACKED:
        head, row = program % heads, program // heads
        first_token, count = document_bounds(row, bounds_ptr, batch, num_queries)
        first_part = head * slots + first_slot(row, first_token, row_slots)
        first_out, first_statistic = first_token, head * num_queries + first_token
        pairs = count * group_size
        queries = tl.where((pairs > least) & (pairs <= most), count, 0)
    else:
        row, count, queries = program // num_queries // heads, num_queries, 1
        head = program // num_queries % heads
        first_part, first_statistic = program, program
        first_out = row * num_queries + program % num_queries
    new = count if APPENDS else 0
    length, fits = row_length(seqlens_ptr, row, cache_length, new, capacity, HAS_LENGTHS)
    length = tl.where(fits, length + new, 0)
    split_keys = keys_of_split(length, parts, BLOCK_N, SPLIT_KEYS, MOST_SPLITS)
    there = tl.cdiv(tl.maximum(length, 1), split_keys)
    for query in range(queries):
        out, lse = combined(
            parts_out_ptr, parts_lse_ptr, (first_part + query) * splits, there,
            VALUE_DIM, BLOCK_S, BLOCK_V, ACC,
        )  # fmt: skip
        tl.store(lse_ptr + first_statistic + query, lse)
        cols = tl.arange(0, BLOCK_V)
        out_ptrs = out_ptr + ((first_out + query) * heads + head) * VALUE_DIM + cols
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=cols < VALUE_DIM)


@triton.jit
def combined(
    out_ptr, lse_ptr, first_part, count,
    VALUE_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``(out, natural lse)`` of ``count`` splits; out is NaN where that of one is."""
    lanes, cols = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_V)
    largest = tl.full((), float("-inf"), ACC)
    for start in range(0, count, BLOCK_S):
        there = start + lanes < count
        lse = tl.load(lse_ptr + first_part + start + lanes, mask=there, other=float("-inf"))
        largest = tl.maximum(largest, tl.max(lse, 0))
    # inf - inf is NaN: where nothing is seen, or a score is +inf
    pivot = tl.where(tl.abs(largest) == float("inf"), 0.0, largest)
    total = tl.zeros((), ACC)
    acc = tl.zeros((BLOCK_V,), ACC)
    for start in range(0, count, BLOCK_S):
        there = start + lanes < count
        lse = tl.load(lse_ptr + first_part + start + lanes, mask=there, other=float("-inf"))
        weight = tl.exp2(lse - pivot)
        offsets = (first_part + start + lanes)[:, None] * VALUE_DIM + cols[None, :]
        mask = there[:, None] & (cols < VALUE_DIM)[None, :]
        part = tl.load(out_ptr + offsets, mask=mask, other=0.0)
        total += tl.sum(weight, 0)
        acc += tl.sum(part * weight[:, None], 0)
    total = tl.where(total == 0, 1.0, total)
    return acc / total, (largest + tl.log2(total)) * LN_2
