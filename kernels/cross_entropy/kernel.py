"""Cross-entropy kernels.  With u = logit_scale logits, and x = u or softcap tanh(u / softcap),

    log_sum = log sum_v exp(x[v] - maximum)            forward: one program per row, one read
    logprob = (x[target] - maximum) - log_sum
    entropy = log_sum - sum_v p[v] (x[v] - maximum)    p = exp(x - maximum - log_sum)
    loss    = -(1 - s) w[target] logprob + s / V sum_v w[v] (log_sum - (x[v] - maximum))

w are class weights and s is the label smoothing.  The gradient is in ``_losses.py``; the backward
kernel, one program per block of a row, reads the logits once more.

Never maximum + log_sum: rounded, it has lost what the loss of a likely target consists of.
Milakov and Gimelshein, 2018, https://arxiv.org/abs/1805.02867, algorithm 3.

Row r of the logits is at (r // inner) * stride_outer + (r % inner) * stride_inner, so that a
shifted view like logits[:, :-1] is read in place.

A NaN or +inf among the x of a row, or nothing but -inf, makes its loss and gradient NaN, as does a
target outside the vocabulary; no other row changes and nothing outside the tensors is read.
"""

import triton
import triton.language as tl

from .._losses import (
    gradient,
    load_block,
    load_target,
    loss_factors,
    origin_of,
    smoothed_loss,
    sums_of_row,
)


# rows per sequence: Triton would compile anew for 1, and for multiples of 16
@triton.jit(do_not_specialize=["inner"])
def forward_kernel(
    logits_ptr,  # (outer, inner, vocab_size)
    targets_ptr,  # (outer * inner,) int64
    weight_ptr,  # (vocab_size,) ACC, read if HAS_WEIGHT
    weight_sum_ptr,  # (1,) ACC, read if HAS_WEIGHT and SMOOTHED
    losses_ptr,  # (outer * inner,) ACC
    maximum_ptr,  # (outer * inner,) ACC
    log_sum_ptr,  # (outer * inner,) ACC
    logprobs_ptr,  # (outer * inner,) ACC, written if NEED_STATS, as the next two
    entropy_ptr,  # (outer * inner,) ACC
    predictions_ptr,  # (outer * inner,) int64
    inner,
    stride_outer,
    stride_inner,
    stride_vocab,
    vocab_size,
    ignore_index,
    label_smoothing: tl.float64,
    softcap: tl.float64,
    logit_scale: tl.float64,
    HAS_WEIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SMOOTHED: tl.constexpr,
    NEED_STATS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
):
    # int64: a vocabulary of 128,256 passes 2**31 elements at row 16,744
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += (row // inner) * stride_outer + (row % inner) * stride_inner
    target = tl.load(targets_ptr + row)
    ignored = target == ignore_index
    x_target, w_target = load_target(
        logits_ptr, logits_ptr, weight_ptr, stride_vocab, target, ignore_index, vocab_size,
        logit_scale, softcap, False, HAS_WEIGHT, HAS_SOFTCAP, ACC,
    )  # fmt: skip
    origin = origin_of(x_target)
    maximum, total, mean, first, weighted = sums_of_row(
        logits_ptr, logits_ptr, weight_ptr, stride_vocab, origin, vocab_size, logit_scale, softcap,
        False, HAS_WEIGHT, HAS_SOFTCAP, SMOOTHED, NEED_STATS, BLOCK_V, ACC,
    )  # fmt: skip
    # inf - inf: NaN for a row with +inf, or of -inf alone; maxima drop NaN, sums keep it
    log_sum = tl.log(total)
    maximum = tl.where(log_sum != log_sum, float("nan"), maximum)
    tl.store(maximum_ptr + row, maximum)
    tl.store(log_sum_ptr + row, log_sum)

    surprisal = log_sum - (x_target - maximum)
    loss = smoothed_loss(
        surprisal, log_sum - (origin - maximum), w_target, weighted, weight_sum_ptr,
        vocab_size, label_smoothing, HAS_WEIGHT, SMOOTHED, ACC,
    )  # fmt: skip
    tl.store(losses_ptr + row, tl.where(ignored, 0.0, loss))
    if NEED_STATS:
        tl.store(logprobs_ptr + row, tl.where(ignored, 0.0, -surprisal))
        tl.store(entropy_ptr + row, tl.where(ignored, 0.0, log_sum - mean))
        tl.store(predictions_ptr + row, tl.where(ignored, -1, first))


@triton.jit(do_not_specialize=["inner"])
def backward_kernel(
    dlosses_ptr,  # (outer * inner,)
    dlogprobs_ptr,  # (outer * inner,), read if HAS_DSTATS, as the next
    dlse_ptr,  # (outer * inner,)
    dentropy_ptr,  # (outer * inner,), read if HAS_DENTROPY
    logits_ptr,  # (outer, inner, vocab_size)
    targets_ptr,  # (outer * inner,) int64
    weight_ptr,  # (vocab_size,) ACC, read if HAS_WEIGHT
    weight_sum_ptr,  # (1,) ACC, read if HAS_WEIGHT and SMOOTHED
    maximum_ptr,  # (outer * inner,) ACC
    log_sum_ptr,  # (outer * inner,) ACC
    entropy_ptr,  # (outer * inner,) ACC, read if HAS_DENTROPY
    dlogits_ptr,  # (outer * inner, vocab_size), dtype of logits
    inner,
    stride_outer,
    stride_inner,
    stride_vocab,
    vocab_size,
    ignore_index,
    blocks_per_row,
    label_smoothing: tl.float64,
    softcap: tl.float64,
    logit_scale: tl.float64,
    HAS_WEIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SMOOTHED: tl.constexpr,
    HAS_DSTATS: tl.constexpr,
    HAS_DENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
):
    # one grid dimension: y and z end at 65,535
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks_per_row
    cols = (program % blocks_per_row) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_row = cols < vocab_size
    logits_ptr += (row // inner) * stride_outer + (row % inner) * stride_inner

    target = tl.load(targets_ptr + row)
    ignored = target == ignore_index
    valid = (target >= 0) & (target < vocab_size)
    maximum, log_sum = tl.load(maximum_ptr + row), tl.load(log_sum_ptr + row)
    dloss = tl.load(dlosses_ptr + row).to(ACC)
    w_target, weight, entropy, dentropy = 1.0, 1.0, 0.0, 0.0
    if HAS_WEIGHT:
        w_target = tl.load(weight_ptr + target, mask=valid & (target != ignore_index), other=0.0)
        if SMOOTHED:
            weight = tl.load(weight_ptr + cols, mask=in_row, other=0.0)
    of_target, of_all, of_weight = loss_factors(
        dloss, w_target, weight_sum_ptr, vocab_size, label_smoothing, HAS_WEIGHT, SMOOTHED, ACC
    )
    if HAS_DSTATS:
        of_target -= tl.load(dlogprobs_ptr + row).to(ACC)
        of_all += tl.load(dlse_ptr + row).to(ACC)
    if HAS_DENTROPY:
        entropy = tl.load(entropy_ptr + row)
        dentropy = tl.load(dentropy_ptr + row).to(ACC)

    x = load_block(
        logits_ptr, logits_ptr, stride_vocab, cols, vocab_size, logit_scale, softcap,
        False, HAS_SOFTCAP, ACC,
    )  # fmt: skip
    dx = gradient(
        x, x - maximum - log_sum, cols == target, weight, of_target, of_all, of_weight,
        entropy, dentropy, logit_scale, softcap,
        HAS_SOFTCAP, SMOOTHED, HAS_DSTATS, HAS_DENTROPY, ACC,
    )  # fmt: skip
    dx = tl.where(ignored, 0.0, tl.where(valid, dx, float("nan")))
    dlogits_ptr += row * vocab_size + cols
    tl.store(dlogits_ptr, dx.to(dlogits_ptr.dtype.element_ty), mask=in_row)
