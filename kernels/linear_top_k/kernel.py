"""The k most likely classes of a chunk of logits.

    u       = logits + bias
    x       = logit_scale u, or softcap tanh(logit_scale u / softcap)      in ACC
    logprob = x - log sum_v exp(x[v])

Column v belongs to lane v mod BLOCK_V.  One read of the row keeps the sum of exponentials, with one
running maximum and sum per lane (Milakov and Gimelshein, 2018, https://arxiv.org/abs/1805.02867,
algorithm 3), and the best element of each lane.  Then k rounds of a tournament: the best of the
lanes is the next class, and its lane alone is read again for the best of what comes after it in
the order.  One program per row.

The order is that of u, descending, of -u with a negative scale: x has the same up to rounding,
and u is one sum, so that what is read again has the same bits.  Of equals the lowest class comes
first, which makes the order total and the result independent of blocks.
"""

import triton
import triton.language as tl

from .._losses import transform

# No class, and after all of them.
_NONE: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def top_k_kernel(
    logits_ptr,  # (rows, vocab_size) ACC
    bias_ptr,  # (vocab_size,), read if HAS_BIAS
    logprobs_ptr,  # (rows, k) ACC; x if IS_SHARD
    indices_ptr,  # (rows, k) int64
    keys_ptr,  # (rows, k) ACC, written if IS_SHARD
    sums_ptr,  # (rows, 2) ACC, maximum and total, written if IS_SHARD
    vocab_size,
    k,
    softcap: tl.float64,
    logit_scale: tl.float64,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SCALE_IS_NEGATIVE: tl.constexpr,
    IS_SHARD: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_LANE: tl.constexpr,
    ACC: tl.constexpr,
):
    # int64: a vocabulary of 262,144 passes 2**31 elements at row 8,192
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocab_size
    logprobs_ptr += row * k
    indices_ptr += row * k
    keys_ptr += row * k
    lanes = tl.arange(0, BLOCK_V)
    running_max = tl.full((BLOCK_V,), float("-inf"), ACC)
    running_sum = tl.zeros((BLOCK_V,), ACC)
    keys = tl.full((BLOCK_V,), float("-inf"), ACC)  # the best of each lane
    blocks = tl.zeros((BLOCK_V,), tl.int32)  # where the block it stands in starts
    for start in range(0, vocab_size, BLOCK_V):
        cols = start + lanes
        in_row = cols < vocab_size
        u = _load(logits_ptr, bias_ptr, cols, in_row, HAS_BIAS, ACC)
        key = _key(u, in_row, SCALE_IS_NEGATIVE)
        blocks = tl.where(key > keys, start, blocks)
        keys = tl.maximum(keys, key)
        x = tl.where(in_row, transform(u, logit_scale, softcap, HAS_SOFTCAP, ACC), float("-inf"))
        new_max = tl.maximum(running_max, x)
        # exp(-inf - -inf) is NaN; a lane that has seen only -inf keeps a sum of zero
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        running_sum = running_sum * tl.exp(running_max - pivot) + tl.exp(x - pivot)
        running_max = new_max
    classes = blocks + lanes
    maximum = tl.max(running_max, 0)
    origin = maximum
    if IS_SHARD:
        # a shard of nothing but -inf adds nothing: it is no NaN
        origin = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(running_sum * tl.exp(running_max - origin), 0)
    log_sum = tl.log(total)
    if IS_SHARD:
        tl.store(sums_ptr + 2 * row, maximum)
        tl.store(sums_ptr + 2 * row + 1, total)

    for place in range(k):
        best = tl.max(keys, 0)
        found = tl.min(tl.where(keys == best, classes, _NONE), 0)
        u = -best if SCALE_IS_NEGATIVE else best
        x = transform(u, logit_scale, softcap, HAS_SOFTCAP, ACC)
        if IS_SHARD:
            tl.store(keys_ptr + place, best)
        else:
            # in two steps: their sum, rounded, has lost what a likely class is judged by
            x = (x - maximum) - log_sum
        tl.store(logprobs_ptr + place, x)
        tl.store(indices_ptr + place, found.to(tl.int64))
        next_key, next_class = _next_of_lane(
            logits_ptr, bias_ptr, best, found, vocab_size,
            HAS_BIAS, SCALE_IS_NEGATIVE, BLOCK_V, BLOCK_LANE, ACC,
        )  # fmt: skip
        is_lane = lanes == found % BLOCK_V
        keys = tl.where(is_lane, next_key, keys)
        classes = tl.where(is_lane, next_class, classes)


@triton.jit
def _next_of_lane(
    logits_ptr, bias_ptr, best, found, vocab_size,
    HAS_BIAS: tl.constexpr, SCALE_IS_NEGATIVE: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_LANE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Key and class of what comes after ``found`` in its lane; -inf and _NONE after the last."""
    places = tl.arange(0, BLOCK_LANE) * BLOCK_V + found % BLOCK_V
    keys = tl.full((BLOCK_LANE,), float("-inf"), ACC)
    classes = tl.full((BLOCK_LANE,), _NONE, tl.int32)
    for start in range(0, vocab_size, BLOCK_LANE * BLOCK_V):
        cols = start + places
        in_row = cols < vocab_size
        u = _load(logits_ptr, bias_ptr, cols, in_row, HAS_BIAS, ACC)
        key = _key(u, in_row, SCALE_IS_NEGATIVE)
        is_after = in_row & ((key < best) | ((key == best) & (cols > found)))
        is_better = is_after & ((key > keys) | (classes == _NONE))
        keys = tl.where(is_better, key, keys)
        classes = tl.where(is_better, cols, classes)
    next_key = tl.max(keys, 0)
    return next_key, tl.min(tl.where(keys == next_key, classes, _NONE), 0)


@triton.jit
def _load(logits_ptr, bias_ptr, cols, in_row, HAS_BIAS: tl.constexpr, ACC: tl.constexpr):
    u = tl.load(logits_ptr + cols, mask=in_row, other=0.0).to(ACC)
    if HAS_BIAS:
        u += tl.load(bias_ptr + cols, mask=in_row, other=0.0).to(ACC)
    return u


@triton.jit
def _key(u, in_row, SCALE_IS_NEGATIVE: tl.constexpr):
    """What is larger comes first: NaN with infinity, and nothing beyond the row."""
    key = -u if SCALE_IS_NEGATIVE else u
    return tl.where(in_row, tl.where(u == u, key, float("inf")), float("-inf"))
