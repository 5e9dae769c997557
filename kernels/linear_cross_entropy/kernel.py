"""Cross-entropy of a chunk of logits, and their gradient in place of them.

    u       = logit_scale (logits + bias)
    x       = u, or softcap tanh(u / softcap)              in ACC
    lse     = log sum_v exp(x[v])
    logprob = x[target] - lse
    entropy = lse - sum_v p[v] x[v]                        p = exp(x - lse)
    loss    = -(1 - s) w[target] logprob + s / V sum_v w[v] (lse - x[v])

w are class weights and s is the label smoothing.  The gradient, in ``_losses.py``, is written over
the logits: of the sum over rows of loss + z_weight lse**2, or of what comes in.

Milakov and Gimelshein, 2018, https://arxiv.org/abs/1805.02867, algorithm 3, with one running
maximum and sum per lane; and the gradient beside the loss, as in Hsu et al., 2024,
https://arxiv.org/abs/2410.10989.  One program per row, but for the bias.

dlogits may be narrower than the logits it overwrites.  Rows keep their place, so element v then
lies in the bytes of logits v / 2: never ahead of what has been read.  What the cast took from the
target's element of a row, and from the one of the others that lost most, is kept wide.

A row with an ignored target has loss, statistics and gradient zero; one with a target out of range,
NaN, but for its lse and entropy.
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
    sums_of_block,
    sums_of_row,
    transform,
)

# Triton would compile anew for 1, for multiples of 16 and, as chunks begin at any row, for pointers
# that are no multiples of 16 bytes.  Of these a program reads one element.
ROWS = ["rows"]
PER_ROW = ["targets_ptr", "losses_ptr", "lse_ptr", "logprobs_ptr", "entropy_ptr", "predictions_ptr"]
PER_ROW += ["columns_ptr", "residuals_ptr", "dlosses_ptr", "dlogprobs_ptr", "dlse_ptr"]
# one of the others takes the last one's place where it is not read
PER_ROW += ["dentropy_ptr", "z_weight_ptr"]


@triton.jit(do_not_specialize=ROWS, do_not_specialize_on_alignment=PER_ROW)
def loss_kernel(
    logits_ptr,  # (rows, vocab_size) ACC
    bias_ptr,  # (vocab_size,), read if HAS_BIAS
    weight_ptr,  # (vocab_size,) ACC, read if HAS_WEIGHT
    weight_sum_ptr,  # (1,) ACC, read if HAS_WEIGHT and SMOOTHED
    targets_ptr,  # (rows,) int64
    losses_ptr,  # (rows,) ACC
    lse_ptr,  # (rows,) ACC
    logprobs_ptr,  # (rows,) ACC, written if NEED_STATS, as the next two
    entropy_ptr,  # (rows,) ACC
    predictions_ptr,  # (rows,) int64
    vocab_size,
    ignore_index,
    label_smoothing: tl.float64,
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
    # int64: a vocabulary of 262,144 passes 2**31 elements at row 8,192
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocab_size
    target = tl.load(targets_ptr + row)
    x_target, w_target = load_target(
        logits_ptr, bias_ptr, weight_ptr, 1, target, ignore_index, vocab_size,
        logit_scale, softcap, HAS_BIAS, HAS_WEIGHT, HAS_SOFTCAP, ACC,
    )  # fmt: skip
    origin = origin_of(x_target)
    maximum, total, mean, first, weighted = sums_of_row(
        logits_ptr, bias_ptr, weight_ptr, 1, origin, vocab_size, logit_scale, softcap,
        HAS_BIAS, HAS_WEIGHT, HAS_SOFTCAP, SMOOTHED, NEED_STATS, BLOCK_V, ACC,
    )  # fmt: skip
    _store_row(
        row, target == ignore_index, x_target, origin, w_target,
        maximum, total, mean, first, weighted,
        losses_ptr, lse_ptr, logprobs_ptr, entropy_ptr, predictions_ptr, weight_sum_ptr,
        vocab_size, label_smoothing, HAS_WEIGHT, SMOOTHED, NEED_STATS, ACC,
    )  # fmt: skip


@triton.jit
def _store_row(
    row, ignored, x_target, origin, w_target, maximum, total, mean, first, weighted,
    losses_ptr, lse_ptr, logprobs_ptr, entropy_ptr, predictions_ptr, weight_sum_ptr,
    vocab_size, label_smoothing,
    HAS_WEIGHT: tl.constexpr, SMOOTHED: tl.constexpr, NEED_STATS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Store what is known of a row, and return its lse and entropy."""
    log_sum = tl.log(total)
    lse = maximum + log_sum
    # not from lse: rounded, it has lost what the loss of a likely target consists of
    surprisal = log_sum - (x_target - maximum)
    loss = smoothed_loss(
        surprisal, log_sum - (origin - maximum), w_target, weighted, weight_sum_ptr,
        vocab_size, label_smoothing, HAS_WEIGHT, SMOOTHED, ACC,
    )  # fmt: skip
    entropy = log_sum - mean
    tl.store(losses_ptr + row, tl.where(ignored, 0.0, loss))
    tl.store(lse_ptr + row, tl.where(ignored, 0.0, lse))
    if NEED_STATS:
        tl.store(logprobs_ptr + row, tl.where(ignored, 0.0, -surprisal))
        tl.store(entropy_ptr + row, tl.where(ignored, 0.0, entropy))
        tl.store(predictions_ptr + row, tl.where(ignored, -1, first))
    return lse, entropy


@triton.jit
def _target_of_shard(
    x_target, w_target, weight_ptr, target, column, ignore_index, vocab_size, num_classes,
    HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """x_target and w_target where other processes hold classes too.

    Of a class that is another's x_target is finite: NaN marks a target that is no class.
    """
    known = (target >= 0) & (target < num_classes) & (target != ignore_index)
    here = (column >= 0) & (column < vocab_size)
    if HAS_WEIGHT:
        w_target = tl.load(weight_ptr + target, mask=known, other=0.0)
    return tl.where(known & ~here, 0.0, x_target), w_target, here


@triton.jit(do_not_specialize=ROWS, do_not_specialize_on_alignment=PER_ROW)
def gradient_kernel(
    logits_ptr,  # (rows, vocab_size) ACC
    dlogits_ptr,  # (rows, vocab_size), the same memory, perhaps a narrower dtype
    bias_ptr,  # (vocab_size,), read if HAS_BIAS
    weight_ptr,  # (num_classes,) ACC, read if HAS_WEIGHT
    weight_sum_ptr,  # (1,) ACC, read if HAS_WEIGHT and SMOOTHED
    targets_ptr,  # (rows,) int64
    dlosses_ptr,  # (rows,) ACC, read if HAS_DLOSSES, else 1
    dlogprobs_ptr,  # (rows,) ACC, read if HAS_DSTATS, as the next
    dlse_ptr,  # (rows,) ACC
    dentropy_ptr,  # (rows,) ACC, read if HAS_DENTROPY
    z_weight_ptr,  # (1,) ACC, read if HAS_Z
    losses_ptr,  # (rows,) ACC, written unless LSE_IS_KNOWN
    lse_ptr,  # (rows,) ACC, read if LSE_IS_KNOWN, else written
    logprobs_ptr,  # (rows,) ACC, written if NEED_STATS, as the next two
    entropy_ptr,  # (rows,) ACC, read if HAS_DENTROPY
    predictions_ptr,  # (rows,) int64
    columns_ptr,  # (rows, 2) int64: target, and another; written if dlogits is narrow, as the next
    residuals_ptr,  # (rows, 2) ACC: what the cast of dlogits took from these elements
    stride_dlogits,
    vocab_size,  # of the logits here
    first_class,  # the class of the first of them
    num_classes,  # vocab_size, unless IS_SHARD
    ignore_index,
    label_smoothing: tl.float64,
    softcap: tl.float64,
    logit_scale: tl.float64,
    SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SMOOTHED: tl.constexpr,
    HAS_DLOSSES: tl.constexpr,
    HAS_DSTATS: tl.constexpr,
    HAS_DENTROPY: tl.constexpr,
    HAS_Z: tl.constexpr,
    LSE_IS_KNOWN: tl.constexpr,
    NEED_STATS: tl.constexpr,
    IS_SHARD: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocab_size
    dlogits_ptr += row * stride_dlogits
    target = tl.load(targets_ptr + row)
    ignored = target == ignore_index
    # before any element of the row is overwritten
    column = target - first_class
    x_target, w_target = load_target(
        logits_ptr, bias_ptr, weight_ptr + first_class, 1, column, ignore_index - first_class,
        vocab_size, logit_scale, softcap, HAS_BIAS, HAS_WEIGHT, HAS_SOFTCAP, ACC,
    )  # fmt: skip
    is_here = True
    if IS_SHARD:
        x_target, w_target, is_here = _target_of_shard(
            x_target, w_target, weight_ptr, target, column, ignore_index, vocab_size, num_classes,
            HAS_WEIGHT,
        )  # fmt: skip
    lanes = tl.arange(0, BLOCK_V)
    x = tl.zeros((BLOCK_V,), ACC)
    if ONE_BLOCK:
        x = load_block(
            logits_ptr, bias_ptr, 1, lanes, vocab_size, logit_scale, softcap,
            HAS_BIAS, HAS_SOFTCAP, ACC,
        )  # fmt: skip
    entropy = tl.zeros((), ACC)
    if LSE_IS_KNOWN:
        lse = tl.load(lse_ptr + row)
        if HAS_DENTROPY:
            entropy = tl.load(entropy_ptr + row)
    else:
        origin = origin_of(x_target)
        if ONE_BLOCK:
            maximum, total, mean, first, weighted = sums_of_block(
                x, weight_ptr, origin, lanes, vocab_size, HAS_WEIGHT, SMOOTHED, NEED_STATS
            )
        else:
            maximum, total, mean, first, weighted = sums_of_row(
                logits_ptr, bias_ptr, weight_ptr, 1, origin, vocab_size, logit_scale, softcap,
                HAS_BIAS, HAS_WEIGHT, HAS_SOFTCAP, SMOOTHED, NEED_STATS, BLOCK_V, ACC,
            )  # fmt: skip
        lse, entropy = _store_row(
            row, ignored, x_target, origin, w_target, maximum, total, mean, first, weighted,
            losses_ptr, lse_ptr, logprobs_ptr, entropy_ptr, predictions_ptr, weight_sum_ptr,
            vocab_size, label_smoothing, HAS_WEIGHT, SMOOTHED, NEED_STATS, ACC,
        )  # fmt: skip

    dloss, dentropy = tl.full((), 1.0, ACC), tl.zeros((), ACC)
    if HAS_DLOSSES:
        dloss = tl.load(dlosses_ptr + row)
    of_target, of_all, of_weight = loss_factors(
        dloss, w_target, weight_sum_ptr, num_classes, label_smoothing, HAS_WEIGHT, SMOOTHED, ACC
    )
    if HAS_DSTATS:
        of_target -= tl.load(dlogprobs_ptr + row)
        of_all += tl.load(dlse_ptr + row)
    if HAS_DENTROPY:
        dentropy = tl.load(dentropy_ptr + row)
    if HAS_Z:
        of_all += 2.0 * tl.load(z_weight_ptr) * lse
    # one value for the store and for the residual, so that they agree to the last bit
    scale = tl.full((), logit_scale, ACC) * SCALE
    dx_target = gradient(
        x_target, x_target - lse, True, w_target, of_target, of_all, of_weight,
        entropy, dentropy, scale, softcap,
        HAS_SOFTCAP, SMOOTHED, HAS_DSTATS or HAS_Z, HAS_DENTROPY, ACC,
    )  # fmt: skip
    dx_target = tl.where(ignored, 0.0, dx_target)
    IS_NARROW: tl.constexpr = dlogits_ptr.dtype.element_ty != ACC
    other, taken = tl.zeros((), tl.int64), tl.zeros((), ACC)
    # known to be one step, the block need not stay in registers for another
    for start in range(0, BLOCK_V if ONE_BLOCK else vocab_size, BLOCK_V):
        cols = start + lanes
        in_row = cols < vocab_size
        if not ONE_BLOCK:
            x = load_block(
                logits_ptr, bias_ptr, 1, cols, vocab_size, logit_scale, softcap,
                HAS_BIAS, HAS_SOFTCAP, ACC,
            )  # fmt: skip
        weight = 1.0
        if HAS_WEIGHT and SMOOTHED:
            weight = tl.load(weight_ptr + first_class + cols, mask=in_row, other=0.0)
        dx = gradient(
            x, x - lse, False, weight, of_target, of_all, of_weight,
            entropy, dentropy, scale, softcap,
            HAS_SOFTCAP, SMOOTHED, HAS_DSTATS or HAS_Z, HAS_DENTROPY, ACC,
        )  # fmt: skip
        # NaN in x_target marks a target out of range: the whole row becomes NaN
        dx = tl.where(ignored, 0.0, tl.where(x_target == x_target, dx, x_target))
        dx = tl.where(cols == column, dx_target, dx)
        # all warps have loaded this block before any of them overwrites it
        tl.debug_barrier()
        stored = dx.to(dlogits_ptr.dtype.element_ty)
        tl.store(dlogits_ptr + cols, stored, mask=in_row)
        if IS_NARROW:
            lost = dx - stored.to(ACC)
            # the row of a NaN is NaN anyway, and a NaN here would hide where the largest is
            lost = tl.where(in_row & (cols != column) & (lost == lost), lost, 0.0)
            most, lane = tl.max(tl.abs(lost), 0, return_indices=True)
            is_more = most > tl.abs(taken)
            taken = tl.where(is_more, tl.sum(tl.where(lanes == lane, lost, 0.0), 0), taken)
            other = tl.where(is_more, start + lane, other)
    if IS_NARROW:
        residual = dx_target - dx_target.to(dlogits_ptr.dtype.element_ty).to(ACC)
        if IS_SHARD:
            residual = tl.where(is_here | (x_target != x_target), residual, 0.0)
        tl.store(columns_ptr + 2 * row, tl.minimum(tl.maximum(column, 0), vocab_size - 1))
        tl.store(columns_ptr + 2 * row + 1, other)
        tl.store(residuals_ptr + 2 * row, residual)
        tl.store(residuals_ptr + 2 * row + 1, taken)


@triton.jit(do_not_specialize=ROWS, do_not_specialize_on_alignment=PER_ROW)
def bias_gradient_kernel(
    logits_ptr,  # (rows, vocab_size) ACC
    bias_ptr,  # (vocab_size,)
    weight_ptr,  # (num_classes,) ACC, read if HAS_WEIGHT
    weight_sum_ptr,  # (1,) ACC, read if HAS_WEIGHT and SMOOTHED
    targets_ptr,  # (rows,) int64
    dlosses_ptr,  # (rows,) ACC, read if HAS_DLOSSES, else 1
    dlogprobs_ptr,  # (rows,) ACC, read if HAS_DSTATS, as the next
    dlse_ptr,  # (rows,) ACC
    dentropy_ptr,  # (rows,) ACC, read if HAS_DENTROPY
    z_weight_ptr,  # (1,) ACC, read if HAS_Z
    lse_ptr,  # (rows,) ACC
    entropy_ptr,  # (rows,) ACC, read if HAS_DENTROPY
    dbias_ptr,  # (vocab_size,) ACC, added to
    rows,
    vocab_size,  # of the logits here
    first_class,  # the class of the first of them
    num_classes,
    ignore_index,
    label_smoothing: tl.float64,
    softcap: tl.float64,
    logit_scale: tl.float64,
    HAS_WEIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SMOOTHED: tl.constexpr,
    HAS_DLOSSES: tl.constexpr,
    HAS_DSTATS: tl.constexpr,
    HAS_DENTROPY: tl.constexpr,
    HAS_Z: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
):
    """dbias[v] += sum over rows of dlogits[row, v]; one program per block of v, rows in order.

    From the logits, since a column may cancel to far less than the rounding of a narrow dlogits.
    """
    cols = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_row = cols < vocab_size
    bias = tl.load(bias_ptr + cols, mask=in_row, other=0.0).to(ACC)
    weight = tl.full((BLOCK_V,), 1.0, ACC)
    if HAS_WEIGHT and SMOOTHED:
        weight = tl.load(weight_ptr + first_class + cols, mask=in_row, other=0.0)
    total = tl.zeros((BLOCK_R, BLOCK_V), ACC)
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R).to(tl.int64)
        in_chunk = row < rows
        target = tl.load(targets_ptr + row, mask=in_chunk, other=0)
        column = target - first_class
        counted = in_chunk & (target != ignore_index)
        valid = (target >= 0) & (target < num_classes)
        lse = tl.load(lse_ptr + row, mask=in_chunk, other=0.0)
        dloss = tl.full((BLOCK_R,), 1.0, ACC)
        w_target, entropy, dentropy = dloss, dloss, dloss
        if HAS_DLOSSES:
            dloss = tl.load(dlosses_ptr + row, mask=in_chunk, other=0.0)
        if HAS_WEIGHT:
            w_target = tl.load(weight_ptr + target, mask=valid & counted, other=0.0)
        of_target, of_all, of_weight = loss_factors(
            dloss, w_target, weight_sum_ptr, num_classes, label_smoothing, HAS_WEIGHT, SMOOTHED, ACC
        )
        if HAS_DSTATS:
            of_target -= tl.load(dlogprobs_ptr + row, mask=in_chunk, other=0.0)
            of_all += tl.load(dlse_ptr + row, mask=in_chunk, other=0.0)
        if HAS_DENTROPY:
            entropy = tl.load(entropy_ptr + row, mask=in_chunk, other=0.0)
            dentropy = tl.load(dentropy_ptr + row, mask=in_chunk, other=0.0)
        if HAS_Z:
            of_all += 2.0 * tl.load(z_weight_ptr) * lse
        logits = tl.load(
            logits_ptr + row[:, None] * vocab_size + cols[None, :],
            mask=in_chunk[:, None] & in_row[None, :],
            other=0.0,
        )
        x = transform(logits.to(ACC) + bias[None, :], logit_scale, softcap, HAS_SOFTCAP, ACC)
        dx = gradient(
            x, x - lse[:, None], cols[None, :] == column[:, None], weight[None, :],
            of_target[:, None], of_all[:, None], of_weight[:, None],
            entropy[:, None], dentropy[:, None], logit_scale, softcap,
            HAS_SOFTCAP, SMOOTHED, HAS_DSTATS or HAS_Z, HAS_DENTROPY, ACC,
        )  # fmt: skip
        dx = tl.where(valid[:, None], dx, float("nan"))
        total += tl.where(counted[:, None], dx, 0.0)
    before = tl.load(dbias_ptr + cols, mask=in_row, other=0.0)
    tl.store(dbias_ptr + cols, before + tl.sum(total, 0), mask=in_row)
