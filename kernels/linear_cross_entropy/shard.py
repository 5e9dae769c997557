"""What a shard of the classes knows of each row, for all shards to be put together.

The sums are those of ``_shards.py``, in one read of the row: one running maximum per lane, and
sums relative to it that follow when it rises (Milakov and Gimelshein, 2018,
https://arxiv.org/abs/1805.02867, algorithm 3).  One program per row.
"""

import triton
import triton.language as tl

from .._losses import load_block, load_target
from .kernel import PER_ROW, ROWS


@triton.jit(do_not_specialize=ROWS, do_not_specialize_on_alignment=PER_ROW)
def shard_kernel(
    logits_ptr,  # (rows, vocab_size) ACC
    bias_ptr,  # (vocab_size,), read if HAS_BIAS
    weight_ptr,  # (num_classes,) ACC, read if HAS_WEIGHT and SMOOTHED
    targets_ptr,  # (rows,) int64
    sums_ptr,  # (3 + 2 NEED_STATS + SMOOTHED, rows) ACC
    rows,
    vocab_size,  # of the shard
    first_class,
    ignore_index,
    softcap: tl.float64,
    logit_scale: tl.float64,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SMOOTHED: tl.constexpr,
    NEED_STATS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
):
    # int64: a shard of 262,144 passes 2**31 elements at row 8,192
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocab_size
    sums_ptr += row
    column = tl.load(targets_ptr + row) - first_class
    x_target, _ = load_target(
        logits_ptr, bias_ptr, weight_ptr, 1, column, ignore_index - first_class, vocab_size,
        logit_scale, softcap, HAS_BIAS, False, HAS_SOFTCAP, ACC,
    )  # fmt: skip
    here = (column >= 0) & (column < vocab_size)
    lanes = tl.arange(0, BLOCK_V).to(tl.int64)
    running_max = tl.full((BLOCK_V,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_V,), ACC)
    moment = tl.zeros((BLOCK_V,), ACC)
    weighted = tl.zeros((BLOCK_V,), ACC)
    weights = tl.zeros((BLOCK_V,), ACC)  # their sum so far
    best = tl.zeros((BLOCK_V,), tl.int32)  # the block that running_max was first seen in
    for start in range(0, vocab_size, BLOCK_V):
        cols = start + lanes
        x = load_block(
            logits_ptr, bias_ptr, 1, cols, vocab_size, logit_scale, softcap,
            HAS_BIAS, HAS_SOFTCAP, ACC,
        )  # fmt: skip
        new_max = tl.maximum(running_max, x)
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        rise = tl.where(running_max == float("-inf"), 0.0, pivot - running_max)
        decay, e = tl.exp(running_max - pivot), tl.exp(x - pivot)
        if NEED_STATS:
            moment = decay * (moment - rise * total)
            moment += e * tl.where(x == float("-inf"), 0.0, x - pivot)
            best = tl.where(x > running_max, start // BLOCK_V, best)
        if SMOOTHED:
            in_row = cols < vocab_size
            weight = tl.where(in_row, 1.0, 0.0).to(ACC)
            if HAS_WEIGHT:
                weight = tl.load(weight_ptr + first_class + cols, mask=in_row, other=0.0)
            weighted += tl.where(in_row, weight * (x - pivot), 0.0) - rise * weights
            weights += weight
        total = total * decay + e
        running_max = new_max
    maximum = tl.max(running_max, 0)
    pivot = tl.where(maximum == float("-inf"), 0.0, maximum)
    shares = tl.exp(running_max - pivot)
    fall = tl.where(running_max == float("-inf"), 0.0, running_max - pivot)
    tl.store(sums_ptr, maximum)
    tl.store(sums_ptr + rows, tl.sum(total * shares, 0))
    tl.store(sums_ptr + 2 * rows, tl.where(here, x_target, 0.0))
    if NEED_STATS:
        tl.store(sums_ptr + 3 * rows, tl.sum(shares * (moment + fall * total), 0))
        places = best.to(tl.int64) * BLOCK_V + lanes
        first = tl.min(tl.where(running_max == maximum, places, vocab_size - 1), 0)
        tl.store(sums_ptr + 4 * rows, first.to(ACC))
    if SMOOTHED:
        # where a lane has seen only -inf, no fall could change its sum
        last = 5 if NEED_STATS else 3
        tl.store(sums_ptr + last * rows, tl.sum(weighted + fall * weights, 0))
