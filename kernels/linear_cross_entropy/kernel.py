"""Cross-entropy of a chunk of logits, and their gradient in place of them.

    x       = logits + bias                                in ACC
    lse     = log sum_v exp(x[v])
    loss    = lse - x[target]
    dlogits = (exp(x - lse) - [v == target]) weight        written over the logits

Milakov and Gimelshein, 2018, https://arxiv.org/abs/1805.02867, algorithm 3, with one running
maximum and sum per lane; and the gradient beside the loss, as in Hsu et al., 2024,
https://arxiv.org/abs/2410.10989.  One program per row, but for the bias.

dlogits may be narrower than the logits it overwrites.  Rows keep their place, so element v then
lies in the bytes of logits v / 2: never ahead of what has been read.

A row with an ignored target has loss, lse and gradient zero; one with a target out of range, NaN.
"""

import triton
import triton.language as tl


@triton.jit
def _load_logits(
    logits_ptr, bias_ptr, cols, mask, HAS_BIAS: tl.constexpr, ACC: tl.constexpr
):  # -> (..., BLOCK_V) ACC, -inf outside
    x = tl.load(logits_ptr + cols, mask=mask, other=float("-inf")).to(ACC)
    if HAS_BIAS:
        x += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(ACC)
    return x


@triton.jit
def _pivot(x):
    # exp(-inf - -inf) is NaN; where all is -inf the sum is zero
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _row_lse(
    logits_ptr,  # one row
    bias_ptr,
    vocab_size,
    HAS_BIAS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
):
    running_max = tl.full((BLOCK_V,), float("-inf"), ACC)
    running_sum = tl.zeros((BLOCK_V,), ACC)
    for start in range(0, vocab_size, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        x = _load_logits(logits_ptr, bias_ptr, cols, cols < vocab_size, HAS_BIAS, ACC)
        new_max = tl.maximum(running_max, x)
        pivot = _pivot(new_max)
        running_sum = running_sum * tl.exp(running_max - pivot) + tl.exp(x - pivot)
        running_max = new_max
    pivot = _pivot(tl.max(running_max, 0))
    return pivot + tl.log(tl.sum(running_sum * tl.exp(running_max - pivot), 0))


@triton.jit
def _target_logit(
    logits_ptr, bias_ptr, target, ignored, vocab_size, HAS_BIAS: tl.constexpr, ACC: tl.constexpr
):  # NaN for a target out of range
    valid = (target >= 0) & (target < vocab_size) & (ignored == 0)
    x = tl.load(logits_ptr + target, mask=valid, other=float("nan")).to(ACC)
    if HAS_BIAS:
        x += tl.load(bias_ptr + target, mask=valid, other=0.0).to(ACC)
    return x


@triton.jit
def loss_kernel(
    logits_ptr,  # (rows, vocab_size) ACC
    bias_ptr,  # (vocab_size,), read if HAS_BIAS
    targets_ptr,  # (rows,) int64
    losses_ptr,  # (rows,) ACC
    lse_ptr,  # (rows,) ACC
    vocab_size,
    ignore_index,
    HAS_BIAS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
):
    # int64: a vocabulary of 262,144 passes 2**31 elements at row 8,192
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocab_size
    target = tl.load(targets_ptr + row)
    ignored = target == ignore_index
    lse = _row_lse(logits_ptr, bias_ptr, vocab_size, HAS_BIAS, BLOCK_V, ACC)
    x_target = _target_logit(logits_ptr, bias_ptr, target, ignored, vocab_size, HAS_BIAS, ACC)
    tl.store(losses_ptr + row, tl.where(ignored, 0.0, lse - x_target))
    tl.store(lse_ptr + row, tl.where(ignored, 0.0, lse))


@triton.jit
def gradient_kernel(
    logits_ptr,  # (rows, vocab_size) ACC
    dlogits_ptr,  # (rows, vocab_size), the same memory, perhaps a narrower dtype
    bias_ptr,  # (vocab_size,), read if HAS_BIAS
    targets_ptr,  # (rows,) int64
    weights_ptr,  # (rows,) ACC, read if HAS_WEIGHTS
    losses_ptr,  # (rows,) ACC, written unless LSE_IS_KNOWN
    lse_ptr,  # (rows,) ACC, read if LSE_IS_KNOWN, else written
    residuals_ptr,  # (rows,) ACC: what the cast of dlogits took from its target element
    stride_dlogits,
    vocab_size,
    ignore_index,
    SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    LSE_IS_KNOWN: tl.constexpr,
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
    x_target = _target_logit(logits_ptr, bias_ptr, target, ignored, vocab_size, HAS_BIAS, ACC)

    lanes = tl.arange(0, BLOCK_V)
    x = tl.zeros((BLOCK_V,), ACC)
    if ONE_BLOCK:
        x = _load_logits(logits_ptr, bias_ptr, lanes, lanes < vocab_size, HAS_BIAS, ACC)
    if LSE_IS_KNOWN:
        lse = tl.load(lse_ptr + row)
    else:
        if ONE_BLOCK:
            pivot = _pivot(tl.max(x, 0))
            lse = pivot + tl.log(tl.sum(tl.exp(x - pivot), 0))
        else:
            lse = _row_lse(logits_ptr, bias_ptr, vocab_size, HAS_BIAS, BLOCK_V, ACC)
        tl.store(losses_ptr + row, tl.where(ignored, 0.0, lse - x_target))
        tl.store(lse_ptr + row, tl.where(ignored, 0.0, lse))

    weight = tl.full((), SCALE, ACC)
    if HAS_WEIGHTS:
        weight *= tl.load(weights_ptr + row)
    # (p - 1) before the weight: the other order loses p when the target is nearly certain.
    # One value for the store and for the residual, so that they agree to the last bit.
    dx_target = tl.where(ignored, 0.0, (tl.exp(x_target - lse) - 1.0) * weight)
    stored = dx_target.to(dlogits_ptr.dtype.element_ty).to(ACC)
    tl.store(residuals_ptr + row, dx_target - stored)
    # NaN in x_target marks a target out of range: the whole row becomes NaN
    weight = tl.where(x_target != x_target, x_target, weight)
    for start in range(0, vocab_size, BLOCK_V):
        cols = start + lanes
        if not ONE_BLOCK:
            x = _load_logits(logits_ptr, bias_ptr, cols, cols < vocab_size, HAS_BIAS, ACC)
        dx = tl.where(ignored, 0.0, tl.exp(x - lse) * weight)
        dx = tl.where(cols == target, dx_target, dx)
        # all warps have loaded this block before any of them overwrites it
        tl.debug_barrier()
        tl.store(dlogits_ptr + cols, dx.to(dlogits_ptr.dtype.element_ty), mask=cols < vocab_size)


@triton.jit
def bias_gradient_kernel(
    logits_ptr,  # (rows, vocab_size) ACC
    bias_ptr,  # (vocab_size,)
    targets_ptr,  # (rows,) int64
    weights_ptr,  # (rows,) ACC, read if HAS_WEIGHTS
    lse_ptr,  # (rows,) ACC
    dbias_ptr,  # (vocab_size,) ACC, added to
    rows,
    vocab_size,
    ignore_index,
    HAS_WEIGHTS: tl.constexpr,
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
    total = tl.zeros((BLOCK_R, BLOCK_V), ACC)
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R).to(tl.int64)
        target = tl.load(targets_ptr + row, mask=row < rows, other=0)
        counted = (row < rows) & (target != ignore_index)
        valid = (target >= 0) & (target < vocab_size)
        weight = tl.where(valid, 1.0, float("nan")).to(ACC)
        if HAS_WEIGHTS:
            weight *= tl.load(weights_ptr + row, mask=row < rows, other=0.0)
        lse = tl.load(lse_ptr + row, mask=row < rows, other=0.0)
        x = tl.load(
            logits_ptr + row[:, None] * vocab_size + cols[None, :],
            mask=(row < rows)[:, None] & in_row[None, :],
            other=float("-inf"),
        )
        x = x.to(ACC) + bias[None, :]
        one_hot = tl.where(cols[None, :] == target[:, None], 1.0, 0.0)
        dx = (tl.exp(x - lse[:, None]) - one_hot) * weight[:, None]
        total += tl.where(counted[:, None], dx, 0.0)
    before = tl.load(dbias_ptr + cols, mask=in_row, other=0.0)
    tl.store(dbias_ptr + cols, before + tl.sum(total, 0), mask=in_row)
