"""What the loss kernels compute from the logits of a row.

The definition is in the kernels' heads.  Scale and softcap belong to the logits: they are applied
where logits are read, and their slope where the gradient is written.
"""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """To 2 ulp in float32, and to 1 ulp of 1 in float64.

    The exponential alone would cancel near zero; there the continued fraction of Lambert, cut at
    its fifth term, is off by 1e-9 of the value.
    """
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    far = tl.where(x < 0, -far, far)
    if x.dtype == tl.float64:
        return far
    z = x * x
    near = x * ((z + 105.0) * z + 945.0) / ((15.0 * z + 420.0) * z + 945.0)
    return tl.where(size < 0.625, near, far)


@triton.jit
def transform(logits, scale, softcap, HAS_SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    """What the softmax is taken of."""
    x = logits * tl.full((), scale, ACC)
    if HAS_SOFTCAP:
        cap = tl.full((), softcap, ACC)
        x = cap * tanh(x / cap)
    return x


@triton.jit
def load_block(
    logits_ptr,  # of a row
    bias_ptr,  # read if HAS_BIAS
    stride,
    cols,
    vocab_size,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
):
    """Transformed logits, -inf beyond the row."""
    in_row = cols < vocab_size
    logits = tl.load(logits_ptr + cols * stride, mask=in_row, other=0.0).to(ACC)
    if HAS_BIAS:
        logits += tl.load(bias_ptr + cols, mask=in_row, other=0.0).to(ACC)
    return tl.where(in_row, transform(logits, scale, softcap, HAS_SOFTCAP, ACC), float("-inf"))


@triton.jit
def load_target(
    logits_ptr,  # of a row
    bias_ptr,  # read if HAS_BIAS
    weight_ptr,  # of the classes, read if HAS_WEIGHT
    stride,
    target,
    ignore_index,
    vocab_size,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
):
    """x[target] and w[target]; NaN and 0 for an ignored target and for one out of range."""
    valid = (target >= 0) & (target < vocab_size) & (target != ignore_index)
    logit = tl.load(logits_ptr + target * stride, mask=valid, other=float("nan")).to(ACC)
    if HAS_BIAS:
        logit += tl.load(bias_ptr + target, mask=valid, other=0.0).to(ACC)
    x_target = transform(logit, scale, softcap, HAS_SOFTCAP, ACC)
    w_target = tl.full((), 1.0, ACC)
    if HAS_WEIGHT:
        w_target = tl.load(weight_ptr + target, mask=valid, other=0.0)
    return x_target, w_target


@triton.jit
def origin_of(x_target):
    """What x is taken relative to in a sum over the row: the loss is a difference to x[target].

    Of a target that is masked, or huge, zero: it would swallow the others.
    """
    return tl.where(tl.abs(x_target) < 1e3, x_target, 0.0)


@triton.jit
def _weighted(x, origin, weight_ptr, cols, vocab_size, HAS_WEIGHT: tl.constexpr):
    """w (x - origin), zero beyond the row."""
    in_row = cols < vocab_size
    difference = tl.where(in_row, x - origin, 0.0)
    if HAS_WEIGHT:
        difference *= tl.load(weight_ptr + cols, mask=in_row, other=0.0)
    return difference


@triton.jit
def sums_of_block(
    x,  # transformed logits of a whole row, -inf beyond it
    weight_ptr,
    origin,
    cols,
    vocab_size,
    HAS_WEIGHT: tl.constexpr,
    SMOOTHED: tl.constexpr,
    NEED_STATS: tl.constexpr,
):
    """:func:`sums_of_row` of a row that is in registers."""
    maximum = tl.max(x, 0)
    e = tl.exp(x - maximum)
    total = tl.sum(e, 0)
    mean, first, weighted = total, tl.full((), 0, tl.int64), total
    if NEED_STATS:
        mean = tl.sum(e * tl.where(x == float("-inf"), 0.0, x - maximum), 0) / total
        first = tl.min(tl.where(x == maximum, cols, vocab_size - 1), 0).to(tl.int64)
    if SMOOTHED:
        weighted = tl.sum(_weighted(x, origin, weight_ptr, cols, vocab_size, HAS_WEIGHT), 0)
    return maximum, total, mean, first, weighted


@triton.jit
def sums_of_row(
    logits_ptr,  # of a row
    bias_ptr,
    weight_ptr,
    stride,
    origin,
    vocab_size,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SMOOTHED: tl.constexpr,
    NEED_STATS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
):
    """In one read: the maximum of x, the sum of exp(x - maximum), the mean of x - maximum under the
    softmax, the first place of the maximum, and the sum of w (x - origin).

    One running maximum and sum per lane, combined after the last block.  When a maximum rises by d,
    the mean falls by d.
    """
    lanes = tl.arange(0, BLOCK_V).to(tl.int64)
    running_max = tl.full((BLOCK_V,), float("-inf"), ACC)
    running_sum = tl.zeros((BLOCK_V,), ACC)
    moment = tl.zeros((BLOCK_V,), ACC)  # sum of exp(x - max) (x - max)
    weighted = tl.zeros((BLOCK_V,), ACC)
    best = tl.zeros((BLOCK_V,), tl.int32)  # the block that running_max was first seen in
    for start in range(0, vocab_size, BLOCK_V):
        cols = start + lanes
        x = load_block(
            logits_ptr, bias_ptr, stride, cols, vocab_size, scale, softcap,
            HAS_BIAS, HAS_SOFTCAP, ACC,
        )  # fmt: skip
        new_max = tl.maximum(running_max, x)
        # exp(-inf - -inf) is NaN; a lane that has seen only -inf keeps a sum of zero
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay, e = tl.exp(running_max - pivot), tl.exp(x - pivot)
        if NEED_STATS:
            rise = tl.where(running_max == float("-inf"), 0.0, pivot - running_max)
            moment = decay * (moment - rise * running_sum)
            moment += e * tl.where(x == float("-inf"), 0.0, x - pivot)
            best = tl.where(x > running_max, start // BLOCK_V, best)
        if SMOOTHED:
            weighted += _weighted(x, origin, weight_ptr, cols, vocab_size, HAS_WEIGHT)
        running_sum = running_sum * decay + e
        running_max = new_max
    maximum = tl.max(running_max, 0)
    shares = tl.exp(running_max - maximum)
    total = tl.sum(running_sum * shares, 0)
    mean, first = total, tl.full((), 0, tl.int64)
    if NEED_STATS:
        fall = tl.where(running_max == float("-inf"), 0.0, running_max - maximum)
        mean = tl.sum(shares * (moment + fall * running_sum), 0) / total
        places = best.to(tl.int64) * BLOCK_V + lanes
        # in the row even where all is NaN or -inf, and the places are of lanes beyond it
        first = tl.min(tl.where(running_max == maximum, places, vocab_size - 1), 0)
    return maximum, total, mean, first, tl.sum(weighted, 0)


@triton.jit
def smoothed_loss(
    surprisal,
    lse_above_origin,
    w_target,
    weighted,
    weight_sum_ptr,  # read if HAS_WEIGHT and SMOOTHED
    vocab_size,
    label_smoothing,
    HAS_WEIGHT: tl.constexpr,
    SMOOTHED: tl.constexpr,
    ACC: tl.constexpr,
):
    """(1 - s) w[target] surprisal + s / V sum_v w[v] (lse - x[v])"""
    loss = w_target * surprisal if HAS_WEIGHT else surprisal
    if SMOOTHED:
        smoothing = tl.full((), label_smoothing, ACC)
        weight_sum = tl.load(weight_sum_ptr) if HAS_WEIGHT else tl.full((), vocab_size, ACC)
        uniform = weight_sum * lse_above_origin - weighted
        loss = (1.0 - smoothing) * loss + smoothing / vocab_size * uniform
    return loss


@triton.jit
def loss_factors(
    dloss,
    w_target,
    weight_sum_ptr,  # read if HAS_WEIGHT and SMOOTHED
    vocab_size,
    label_smoothing,
    HAS_WEIGHT: tl.constexpr,
    SMOOTHED: tl.constexpr,
    ACC: tl.constexpr,
):
    """of_target, of_all and of_weight of :func:`gradient`, for a loss alone."""
    of_target = dloss * w_target if HAS_WEIGHT else dloss
    of_all, of_weight = dloss * 0.0, dloss * 0.0
    if SMOOTHED:
        smoothing = tl.full((), label_smoothing, ACC)
        of_target *= 1.0 - smoothing
        of_weight = smoothing / vocab_size * dloss
        of_all = of_weight * tl.load(weight_sum_ptr) if HAS_WEIGHT else smoothing * dloss
    return of_target, of_all, of_weight


@triton.jit
def gradient(
    x,  # transformed logits, ACC
    log_p,
    is_target,
    weight,  # of the classes, read with SMOOTHED
    of_target,  # (1 - s) w[target] dloss - dlogprob
    of_all,  # s mean(w) dloss + dlse, read with SMOOTHED or HAS_DSTATS
    of_weight,  # s / V dloss, read with SMOOTHED
    entropy,  # read with HAS_DENTROPY, as the next
    dentropy,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    SMOOTHED: tl.constexpr,
    HAS_DSTATS: tl.constexpr,
    HAS_DENTROPY: tl.constexpr,
    ACC: tl.constexpr,
):
    """dlogits of one row, before its mask."""
    p = tl.exp(log_p)
    # (p - 1) before the weight: the other order loses p when the target is nearly certain
    dx = (p - tl.where(is_target, 1.0, 0.0)) * of_target
    if SMOOTHED or HAS_DSTATS:
        dx += p * of_all
    if SMOOTHED:
        dx -= of_weight * weight
    if HAS_DENTROPY:
        # 0 * -inf: a class of probability zero has no part in the entropy
        dx -= p * tl.where(p == 0, 0.0, log_p + entropy) * dentropy
    if HAS_SOFTCAP:
        ratio = x / tl.full((), softcap, ACC)
        dx *= 1.0 - ratio * ratio
    return dx * tl.full((), scale, ACC)
