"""Causal attention, backward.

    p     = exp(score - lse)                        recomputed, never stored
    delta = sum_v dout out - dlse                   one number per query
    ds    = p (dout value^T - delta)                times 1 - (score / softcap)^2 under a softcap
    dvalue = p^T dout      dkey = scale ds^T query      dquery = scale ds key

(Dao, 2023, https://arxiv.org/abs/2307.08691, algorithm 2, in two kernels.)  One keeps the gradients
of BLOCK_N keys and walks over the queries of every head that shares them; the other keeps the
gradient of BLOCK_M queries and walks over keys.  Scores are computed twice, and in exchange nothing
is added through memory: no atomics, no order to depend on.  A sink's gradient needs lse and delta
alone: the launch computes it.
"""

import triton
import triton.language as tl

from .tiles import (
    LENGTHS,
    LOG2_E,
    capped,
    key_range,
    load_rows,
    place_keys,
    place_queries,
    query_range,
    score_factors,
    store_rows,
    visible,
)


@triton.jit(do_not_specialize=LENGTHS)
def delta_kernel(
    out_ptr,  # (B, T, H, VALUE_DIM), contiguous
    dout_ptr,  # (B, T, H, VALUE_DIM)
    lse_ptr,  # (B, H, T), contiguous, ACC
    dlse_ptr,  # (B, H, T), contiguous; not read unless HAS_DLSE
    delta_ptr,  # (B, H, T), contiguous, ACC
    stride_ob,
    stride_ot,
    stride_oh,
    heads,
    num_queries,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    num_blocks = tl.cdiv(num_queries, BLOCK_M)
    program = tl.program_id(0)
    head = (program // num_blocks).to(tl.int64)
    queries = program % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = queries < num_queries
    batch = head // heads
    out_ptr += (batch * num_queries * heads + head % heads) * VALUE_DIM
    dout_ptr += batch * stride_ob + head % heads * stride_oh

    out = load_rows(out_ptr, queries, num_queries, heads * VALUE_DIM, VALUE_DIM, BLOCK_V, True)
    dout = load_rows(dout_ptr, queries, num_queries, stride_ot, VALUE_DIM, BLOCK_V, True)
    delta = tl.sum(out.to(ACC) * dout.to(ACC), 1)
    statistics = head * num_queries + queries
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + statistics, mask=inside, other=0.0).to(ACC)
    # p = 0 in a row that sees no key, but 0 * NaN is NaN, and the gradient of its lse may be that
    lse = tl.load(lse_ptr + statistics, mask=inside, other=float("-inf"))
    delta = tl.where(lse == float("-inf"), 0.0, delta)
    tl.store(delta_ptr + statistics, delta, mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def dkdv_kernel(
    q_ptr,  # (B, T, H, HEAD_DIM)
    k_ptr,  # (B, S, H / group_size, HEAD_DIM)
    v_ptr,  # (B, S, H / group_size, VALUE_DIM)
    dout_ptr,  # (B, T, H, VALUE_DIM)
    lse_ptr,  # (B, H, T), contiguous, ACC
    delta_ptr,  # (B, H, T), contiguous, ACC
    dk_ptr,  # like k, contiguous
    dv_ptr,  # like v, contiguous
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
    stride_ob,
    stride_ot,
    stride_oh,
    batch_kv_heads,  # B * H / group_size
    kv_heads,  # H / group_size
    group_size,
    num_queries,
    num_keys,
    num_documents,
    window,  # keys, read if HAS_WINDOW
    heads_per_section,
    scale: tl.float64,
    softcap: tl.float64,  # read if HAS_SOFTCAP
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    SKIPS_BLIND: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_END: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FAST_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
):
    kv, q_token, q_count, k_token, k_count, offset, first_key = place_keys(
        bounds_q_ptr, bounds_k_ptr, key_start_ptr, key_end_ptr, batch_kv_heads, kv_heads,
        num_queries, num_keys, num_documents, heads_per_section,
        BLOCK_N, PACKED, HAS_START, HAS_END, SKIPS_BLIND,
    )  # fmt: skip
    batch = kv // kv_heads
    kv_head = kv % kv_heads
    first_head = kv_head * group_size
    q_token, k_token = q_token.to(tl.int64), k_token.to(tl.int64)
    q_ptr += batch * stride_qb + first_head * stride_qh + q_token * stride_qt
    k_ptr += batch * stride_kb + kv_head * stride_kg + k_token * stride_ks
    v_ptr += batch * stride_vb + kv_head * stride_vg + k_token * stride_vs
    dout_ptr += batch * stride_ob + first_head * stride_oh + q_token * stride_ot
    lse_ptr += kv * group_size * num_queries + q_token
    delta_ptr += kv * group_size * num_queries + q_token

    keys = first_key + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, keys, k_count, stride_ks, HEAD_DIM, BLOCK_D, True)
    v = load_rows(v_ptr, keys, k_count, stride_vs, VALUE_DIM, BLOCK_V, True)
    scale = tl.full((), scale, ACC)
    inner, outer = score_factors(scale, softcap, HAS_SOFTCAP, ACC)
    start, unmasked_start, unmasked_end, end = query_range(
        first_key, q_count, k_count, offset, window, BLOCK_M, BLOCK_N, HAS_WINDOW
    )
    dk = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    dv = tl.zeros((BLOCK_N, BLOCK_V), ACC)
    # the accumulators of wide heads leave no registers for the three loops of a window; above 256,
    # and where elements are loaded one by one, tiles are smaller and three take fewer than one
    IS_WIDE: tl.constexpr = BLOCK_D + BLOCK_V > 256 and BLOCK_D + BLOCK_V <= 512
    IS_ONE_LOOP: tl.constexpr = HAS_WINDOW and IS_WIDE and HEAD_DIM % 8 == 0
    if IS_ONE_LOOP:
        unmasked_start = end
    dk, dv = _gather_dkdv(
        dk, dv, k, v, keys, q_ptr, dout_ptr, lse_ptr, delta_ptr,
        stride_qt, stride_qh, stride_ot, stride_oh, group_size, num_queries,
        start, unmasked_start, q_count, k_count, offset, window, inner, outer,
        HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_D, BLOCK_V, ACC, HAS_WINDOW, HAS_SOFTCAP,
        FAST_CAP, PRECISION, MASKED=True,
    )  # fmt: skip
    if not IS_ONE_LOOP:
        dk, dv = _gather_dkdv(
            dk, dv, k, v, keys, q_ptr, dout_ptr, lse_ptr, delta_ptr,
            stride_qt, stride_qh, stride_ot, stride_oh, group_size, num_queries,
            unmasked_start, unmasked_end, q_count, k_count, offset, window, inner, outer,
            HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_D, BLOCK_V, ACC, HAS_WINDOW, HAS_SOFTCAP,
            FAST_CAP, PRECISION, MASKED=False,
        )  # fmt: skip
    if HAS_WINDOW and not IS_ONE_LOOP:
        dk, dv = _gather_dkdv(
            dk, dv, k, v, keys, q_ptr, dout_ptr, lse_ptr, delta_ptr,
            stride_qt, stride_qh, stride_ot, stride_oh, group_size, num_queries,
            unmasked_end, end, q_count, k_count, offset, window, inner, outer,
            HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_D, BLOCK_V, ACC, HAS_WINDOW, HAS_SOFTCAP,
            FAST_CAP, PRECISION, MASKED=True,
        )  # fmt: skip

    row = (batch * num_keys + k_token) * kv_heads + kv_head
    dk_ptr += row * HEAD_DIM
    dv_ptr += row * VALUE_DIM
    store_rows(dk_ptr, keys, k_count, kv_heads * HEAD_DIM, dk * scale, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr, keys, k_count, kv_heads * VALUE_DIM, dv, VALUE_DIM, BLOCK_V)


@triton.jit
def _gather_dkdv(
    dk,  # (BLOCK_N, BLOCK_D) ACC
    dv,  # (BLOCK_N, BLOCK_V) ACC
    k,  # (BLOCK_N, BLOCK_D)
    v,  # (BLOCK_N, BLOCK_V)
    keys,
    q_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    stride_qt,
    stride_qh,
    stride_ot,
    stride_oh,
    group_size,
    head_stride,  # of lse and delta
    start,
    end,
    num_queries,
    num_keys,
    offset,
    window,
    inner,
    outer,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FAST_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    # one loop over all heads of the group: nested loops cost the registers that dk and dv need
    num_blocks = tl.cdiv(end - start, BLOCK_M)
    for step in range(num_blocks * group_size):
        member = (step // num_blocks).to(tl.int64)
        queries = start + step % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        q = load_rows(
            q_ptr + member * stride_qh, queries, num_queries, stride_qt, HEAD_DIM, BLOCK_D, True
        )
        # scores are transposed, so that p and ds are first operands of their products, in registers
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC)
        lse = _lse_log2(lse_ptr + member * head_stride, queries, num_queries)
        seen = visible(queries[None, :], keys[:, None], num_keys, offset, window, HAS_WINDOW)
        p, slope = _probabilities(
            scores, seen, lse[None, :], inner, outer, HAS_SOFTCAP, FAST_CAP, MASKED
        )
        dout = load_rows(
            dout_ptr + member * stride_oh, queries, num_queries, stride_ot, VALUE_DIM, BLOCK_V, True
        )
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION, out_dtype=ACC)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION, out_dtype=ACC)
        delta_ptrs = delta_ptr + member * head_stride + queries
        delta = tl.load(delta_ptrs, mask=queries < num_queries, other=0.0)
        ds = p * (dp - delta[None, :])
        if HAS_SOFTCAP:
            ds *= slope
        if MASKED:
            # not left to p = 0: values of keys out of sight may be NaN
            ds = tl.where(seen, ds, 0.0)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=ACC)
    return dk, dv


@triton.jit(do_not_specialize=LENGTHS)
def dq_kernel(
    q_ptr,  # (B, T, H, HEAD_DIM)
    k_ptr,  # (B, S, H / group_size, HEAD_DIM)
    v_ptr,  # (B, S, H / group_size, VALUE_DIM)
    dout_ptr,  # (B, T, H, VALUE_DIM)
    lse_ptr,  # (B, H, T), contiguous, ACC
    delta_ptr,  # (B, H, T), contiguous, ACC
    dq_ptr,  # like q, contiguous
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
    stride_ob,
    stride_ot,
    stride_oh,
    batch_heads,  # B * H
    heads,
    group_size,
    num_queries,
    num_keys,
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
    q_token, k_token = q_token.to(tl.int64), k_token.to(tl.int64)
    q_ptr += batch * stride_qb + head % heads * stride_qh + q_token * stride_qt
    k_ptr += batch * stride_kb + kv_head * stride_kg + k_token * stride_ks
    v_ptr += batch * stride_vb + kv_head * stride_vg + k_token * stride_vs
    dout_ptr += batch * stride_ob + head % heads * stride_oh + q_token * stride_ot
    lse_ptr += head * num_queries + q_token
    delta_ptr += head * num_queries + q_token

    queries = first_query + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, queries, q_count, stride_qt, HEAD_DIM, BLOCK_D, True)
    dout = load_rows(dout_ptr, queries, q_count, stride_ot, VALUE_DIM, BLOCK_V, True)
    lse = _lse_log2(lse_ptr, queries, q_count)
    delta = tl.load(delta_ptr + queries, mask=queries < q_count, other=0.0)
    scale = tl.full((), scale, ACC)
    inner, outer = score_factors(scale, softcap, HAS_SOFTCAP, ACC)
    start, unmasked_start, unmasked_end, end = key_range(
        first_query, q_count, k_count, offset, window, BLOCK_M, BLOCK_N, HAS_WINDOW
    )
    dq = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    IS_ONE_LOOP: tl.constexpr = HAS_WINDOW and BLOCK_D + BLOCK_V > 256
    if IS_ONE_LOOP:
        unmasked_end = start
    if HAS_WINDOW and not IS_ONE_LOOP:
        dq = _gather_dq(
            dq, q, dout, lse, delta, queries, k_ptr, v_ptr, stride_ks, stride_vs,
            start, tl.minimum(unmasked_start, end), k_count, offset, window, inner, outer,
            HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V, ACC, HAS_WINDOW, HAS_SOFTCAP,
            FAST_CAP, PRECISION, MASKED=True,
        )  # fmt: skip
    if not IS_ONE_LOOP:
        dq = _gather_dq(
            dq, q, dout, lse, delta, queries, k_ptr, v_ptr, stride_ks, stride_vs,
            unmasked_start, unmasked_end, k_count, offset, window, inner, outer,
            HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V, ACC, HAS_WINDOW, HAS_SOFTCAP,
            FAST_CAP, PRECISION, MASKED=False,
        )  # fmt: skip
    dq = _gather_dq(
        dq, q, dout, lse, delta, queries, k_ptr, v_ptr, stride_ks, stride_vs,
        unmasked_end, end, k_count, offset, window, inner, outer,
        HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V, ACC, HAS_WINDOW, HAS_SOFTCAP,
        FAST_CAP, PRECISION, MASKED=True,
    )  # fmt: skip

    dq_ptr += ((batch * num_queries + q_token) * heads + head % heads) * HEAD_DIM
    store_rows(dq_ptr, queries, q_count, heads * HEAD_DIM, dq * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _gather_dq(
    dq,  # (BLOCK_M, BLOCK_D) ACC
    q,  # (BLOCK_M, BLOCK_D)
    dout,  # (BLOCK_M, BLOCK_V)
    lse,  # (BLOCK_M,) ACC, base 2
    delta,  # (BLOCK_M,) ACC
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
        v = load_rows(v_ptr, keys, num_keys, stride_vs, VALUE_DIM, BLOCK_V, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        seen = visible(queries[:, None], keys[None, :], num_keys, offset, window, HAS_WINDOW)
        p, slope = _probabilities(
            scores, seen, lse[:, None], inner, outer, HAS_SOFTCAP, FAST_CAP, MASKED
        )
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
        ds = p * (dp - delta[:, None])
        if HAS_SOFTCAP:
            ds *= slope
        if MASKED:
            # not left to p = 0: values of keys out of sight may be NaN
            ds = tl.where(seen, ds, 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=ACC)
    return dq


@triton.jit
def _probabilities(
    products, seen, lse, inner, outer,
    HAS_SOFTCAP: tl.constexpr, FAST_CAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """p, and the slope of the softcap; products and lse broadcast against each other."""
    slope = products
    if HAS_SOFTCAP:
        products = capped(products * inner, FAST_CAP)
        slope = 1.0 - products * products
    scores = products * outer - lse
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    return tl.exp2(scores), slope


@triton.jit
def _lse_log2(lse_ptr, queries, num_queries):
    """lse in base 2; +inf, which makes p = 0, past the last query and for one that sees no key."""
    lse = tl.load(lse_ptr + queries, mask=queries < num_queries, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
