"""Causal attention, forward.

    score = scale * query key^T, or softcap tanh(scale * query key^T / softcap)
    lse   = log(sum_s exp(score_s) + exp(sink))                  over visible keys
    out   = sum_s exp(score_s - lse) value_s

One program computes BLOCK_M queries of one head and walks over the keys they see, BLOCK_N at a
time, with a running maximum and sum (Dao, 2023, https://arxiv.org/abs/2307.08691, algorithm 1).
Blocks that all its queries see need no mask; those at the far end of the window come before them,
those on the diagonal after.

Exponentials are base 2: exp(scale * x) = 2^(scale * log2(e) * x), one multiply-add per score.
A sink is the learned score of a key without a value: what the running sum starts with.
"""

import triton
import triton.language as tl

from .tiles import (
    LENGTHS,
    LOG2_E,
    capped,
    key_range,
    load_rows,
    place_queries,
    positive_scale,
    score_factors,
    softmax_step,
    store_rows,
    visible,
)

LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    q_ptr,  # (B, T, H, HEAD_DIM)
    k_ptr,  # (B, S, H / group_size, HEAD_DIM)
    v_ptr,  # (B, S, H / group_size, VALUE_DIM)
    out_ptr,  # (B, T, H, VALUE_DIM), contiguous, dtype of q
    lse_ptr,  # (B, H, T), contiguous, ACC
    sinks_ptr,  # (H,), read if HAS_SINKS
    bounds_q_ptr,  # (num_documents + 1,) int32, read if PACKED, as the next
    bounds_k_ptr,
    key_start_ptr,  # (B,) int32, read if HAS_START
    key_end_ptr,  # (B,) int32, read if HAS_END
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kg,
    stride_vb,
    stride_vs,
    stride_vg,
    batch_heads,  # B * H
    heads,  # H
    group_size,  # query heads per key/value head
    num_queries,  # T
    num_keys,  # S
    num_documents,
    window,  # keys, read if HAS_WINDOW
    heads_per_section,
    scale: tl.float64,
    softcap: tl.float64,  # read if HAS_SOFTCAP
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_END: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FAST_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
):
    head, q_token, q_count, k_token, k_count, offset, first_query = place_queries(
        bounds_q_ptr, bounds_k_ptr, key_start_ptr, key_end_ptr, batch_heads, heads, num_queries,
        num_keys, num_documents, heads_per_section, BLOCK_M, PACKED, HAS_START, HAS_END,
    )  # fmt: skip
    batch = head // heads
    kv_head = head % heads // group_size
    q_ptr += batch * stride_qb + head % heads * stride_qh + q_token.to(tl.int64) * stride_qt
    k_ptr += batch * stride_kb + kv_head * stride_kg + k_token.to(tl.int64) * stride_ks
    v_ptr += batch * stride_vb + kv_head * stride_vg + k_token.to(tl.int64) * stride_vs

    queries = first_query + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, queries, q_count, stride_qt, HEAD_DIM, BLOCK_D, True)
    q, scale = positive_scale(q, scale, HAS_SOFTCAP, ACC)
    inner, outer = score_factors(scale, softcap, HAS_SOFTCAP, ACC)

    row_max = tl.full((BLOCK_M,), float("-inf"), ACC)
    row_sum = tl.zeros((BLOCK_M,), ACC)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head % heads).to(ACC) * LOG2_E
        row_max = tl.zeros((BLOCK_M,), ACC) + sink
        row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0).to(ACC)
    acc = tl.zeros((BLOCK_M, BLOCK_V), ACC)
    start, unmasked_start, unmasked_end, end = key_range(
        first_query, q_count, k_count, offset, window, BLOCK_M, BLOCK_N, HAS_WINDOW
    )
    # in heads wider than 256 three loops spill
    IS_ONE_LOOP: tl.constexpr = HAS_WINDOW and BLOCK_D + BLOCK_V > 512
    if IS_ONE_LOOP:
        unmasked_end = start
    if HAS_WINDOW and not IS_ONE_LOOP:
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q, queries, k_ptr, v_ptr, stride_ks, stride_vs,
            start, tl.minimum(unmasked_start, end), k_count, offset, window, inner, outer,
            HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V, ACC, HAS_WINDOW, HAS_SOFTCAP,
            FAST_CAP, PRECISION, MASKED=True,
        )  # fmt: skip
    if not IS_ONE_LOOP:
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q, queries, k_ptr, v_ptr, stride_ks, stride_vs,
            unmasked_start, unmasked_end, k_count, offset, window, inner, outer,
            HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V, ACC, HAS_WINDOW, HAS_SOFTCAP,
            FAST_CAP, PRECISION, MASKED=False,
        )  # fmt: skip
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q, queries, k_ptr, v_ptr, stride_ks, stride_vs,
        unmasked_end, end, k_count, offset, window, inner, outer,
        HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V, ACC, HAS_WINDOW, HAS_SOFTCAP,
        FAST_CAP, PRECISION, MASKED=True,
    )  # fmt: skip

    # a row that sees no key has a sum of 0 and a maximum of -inf: out 0, lse -inf
    row_sum = tl.where(row_sum == 0, 1.0, row_sum)
    out = acc / row_sum[:, None]
    out_ptr += ((batch * num_queries + q_token) * heads + head % heads) * VALUE_DIM
    store_rows(out_ptr, queries, q_count, heads * VALUE_DIM, out, VALUE_DIM, BLOCK_V)
    lse = (row_max + tl.log2(row_sum)) * LN_2
    lse_ptr += head * num_queries + q_token
    tl.store(lse_ptr + queries, lse, mask=queries < q_count)


@triton.jit
def _attend(
    acc,  # (BLOCK_M, BLOCK_V) ACC
    row_max,  # (BLOCK_M,) ACC, of scores in base 2
    row_sum,  # (BLOCK_M,) ACC
    q,  # (BLOCK_M, BLOCK_D)
    queries,
    k_ptr,
    v_ptr,
    stride_ks,
    stride_vs,
    start,
    end,
    num_keys,
    offset,
    window,
    inner,
    outer,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FAST_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    for first_key in range(start, end, BLOCK_N):
        keys = first_key + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, keys, num_keys, stride_ks, HEAD_DIM, BLOCK_D, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        if HAS_SOFTCAP:
            scores = capped(scores * inner, FAST_CAP)
        if MASKED:
            seen = visible(queries[:, None], keys[None, :], num_keys, offset, window, HAS_WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        p, rescale, row_max = softmax_step(scores, row_max, outer)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None]
        v = load_rows(v_ptr, keys, num_keys, stride_vs, VALUE_DIM, BLOCK_V, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc, row_max, row_sum
