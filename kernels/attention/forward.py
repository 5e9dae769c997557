"""Causal attention, forward.

    out = softmax(scale * query key^T, over visible keys) value
    lse = log sum_s exp(scale * query key_s)

One program computes BLOCK_M queries of one head and walks over the keys they see, BLOCK_N at a
time, with a running maximum and sum (Dao, 2023, https://arxiv.org/abs/2307.08691, algorithm 1).
Blocks that all its queries see come first, without a mask; those on the diagonal follow, with it.

Exponentials are base 2: exp(scale * x) = 2^(scale * log2(e) * x), one multiply-add per score.
Scaling after the row maximum needs a positive scale, so the sign goes into the query: exact.
"""

import triton
import triton.language as tl

from .tiles import key_range, load_rows, locate, store_rows, visible

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def forward_kernel(
    q_ptr,  # (B, T, H, HEAD_DIM)
    k_ptr,  # (B, S, H / group_size, HEAD_DIM)
    v_ptr,  # (B, S, H / group_size, VALUE_DIM)
    out_ptr,  # (B, T, H, VALUE_DIM), contiguous, dtype of q
    lse_ptr,  # (B, H, T), contiguous, ACC
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
    heads_per_section,
    scale: tl.float64,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
):
    num_blocks = tl.cdiv(num_queries, BLOCK_M)
    rank, head = locate(num_blocks, batch_heads, heads_per_section)
    # the last block of queries sees the most keys
    first_query = (num_blocks - 1 - rank) * BLOCK_M
    batch = head // heads
    kv_head = head % heads // group_size
    q_ptr += batch * stride_qb + head % heads * stride_qh
    k_ptr += batch * stride_kb + kv_head * stride_kg
    v_ptr += batch * stride_vb + kv_head * stride_vg

    queries = first_query + tl.arange(0, BLOCK_M)
    scale = tl.full((), scale, ACC)
    sign = tl.where(scale > 0, 1.0, tl.where(scale < 0, -1.0, 0.0))
    # a scale of 0 empties the query, and the factor may then be anything but 0: 0 * -inf is NaN
    scale_log2 = tl.where(scale == 0, 1.0, tl.abs(scale)) * LOG2_E
    q = load_rows(q_ptr, queries, num_queries, stride_qt, HEAD_DIM, BLOCK_D, True)
    q = (q.to(ACC) * sign).to(q.dtype)

    unmasked_end, end = key_range(first_query, num_queries, num_keys, BLOCK_M, BLOCK_N)
    row_max = tl.full((BLOCK_M,), float("-inf"), ACC)
    row_sum = tl.zeros((BLOCK_M,), ACC)
    acc = tl.zeros((BLOCK_M, BLOCK_V), ACC)
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q, queries, k_ptr, v_ptr, stride_ks, stride_vs, 0, unmasked_end,
        num_queries, num_keys, scale_log2, HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V, ACC,
        MASKED=False,
    )  # fmt: skip
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q, queries, k_ptr, v_ptr, stride_ks, stride_vs, unmasked_end, end,
        num_queries, num_keys, scale_log2, HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V, ACC,
        MASKED=True,
    )  # fmt: skip

    # a row that sees no key has a sum of 0 and a maximum of -inf: out 0, lse -inf
    row_sum = tl.where(row_sum == 0, 1.0, row_sum)
    out = acc / row_sum[:, None]
    out_ptr += (batch * num_queries * heads + head % heads) * VALUE_DIM
    store_rows(out_ptr, queries, num_queries, heads * VALUE_DIM, out, VALUE_DIM, BLOCK_V)
    lse = (row_max + tl.log2(row_sum)) * LN_2
    tl.store(lse_ptr + head * num_queries + queries, lse, mask=queries < num_queries)


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
    num_queries,
    num_keys,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
    MASKED: tl.constexpr,
):
    for first_key in range(start, end, BLOCK_N):
        keys = first_key + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, keys, num_keys, stride_ks, HEAD_DIM, BLOCK_D, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC)
        if MASKED:
            seen = visible(queries[:, None], keys[None, :], num_keys - num_queries)
            scores = tl.where(seen, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        # inf - inf is NaN; a row that has seen -inf alone keeps a sum of 0, one of +inf gets +inf
        pivot = tl.where(tl.abs(new_max) == float("inf"), 0.0, new_max)
        p = tl.exp2(scores * scale_log2 - pivot[:, None])
        rescale = tl.exp2(row_max - pivot)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None]
        v = load_rows(v_ptr, keys, num_keys, stride_vs, VALUE_DIM, BLOCK_V, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee", out_dtype=ACC)
        row_max = new_max
    return acc, row_max, row_sum
