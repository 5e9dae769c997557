"""Cross-entropy kernels.

    log_sum = log sum_v exp(logits[v] - maximum)       forward: one program per row, one read
    loss = log_sum - (logits[target] - maximum)
    dlogits[v] = (exp(logits[v] - maximum - log_sum) - [v == target]) dloss
                                                       backward: one program per block of a row

Never maximum + log_sum: rounded, it has lost what the loss of a likely target consists of.
Milakov and Gimelshein, 2018, https://arxiv.org/abs/1805.02867, algorithm 3, with one running
maximum and sum per lane, combined after the last block.

Row r of the logits is at (r // inner) * stride_outer + (r % inner) * stride_inner, so that a
shifted view like logits[:, :-1] is read in place.

A NaN or +inf in a row, or nothing but -inf, makes its loss and gradient NaN, as does a target
outside the vocabulary; no other row changes and nothing outside the tensors is read.
"""

import triton
import triton.language as tl


@triton.jit
def forward_kernel(
    logits_ptr,  # (outer, inner, vocab_size)
    targets_ptr,  # (outer * inner,) int64
    losses_ptr,  # (outer * inner,) ACC
    maximum_ptr,  # (outer * inner,) ACC
    log_sum_ptr,  # (outer * inner,) ACC
    inner,
    stride_outer,
    stride_inner,
    stride_vocab,
    vocab_size,
    ignore_index,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
):
    # int64: a vocabulary of 128,256 passes 2**31 elements at row 16,744
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += (row // inner) * stride_outer + (row % inner) * stride_inner

    lanes = tl.arange(0, BLOCK_V).to(tl.int64)
    running_max = tl.full((BLOCK_V,), float("-inf"), ACC)
    running_sum = tl.zeros((BLOCK_V,), ACC)
    for start in range(0, vocab_size, BLOCK_V):
        cols = start + lanes
        x = tl.load(
            logits_ptr + cols * stride_vocab, mask=cols < vocab_size, other=float("-inf")
        ).to(ACC)
        new_max = tl.maximum(running_max, x)
        # exp(-inf - -inf) is NaN; a lane that has seen only -inf keeps a sum of zero
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        running_sum = running_sum * tl.exp(running_max - pivot) + tl.exp(x - pivot)
        running_max = new_max
    maximum = tl.max(running_max, 0)
    # inf - inf: NaN for a row with +inf, or of -inf alone; maxima drop NaN, sums keep it
    log_sum = tl.log(tl.sum(running_sum * tl.exp(running_max - maximum), 0))
    maximum = tl.where(log_sum != log_sum, float("nan"), maximum)
    tl.store(maximum_ptr + row, maximum)
    tl.store(log_sum_ptr + row, log_sum)

    target = tl.load(targets_ptr + row)
    ignored = target == ignore_index
    valid = (target >= 0) & (target < vocab_size) & (target != ignore_index)
    target_logit = tl.load(logits_ptr + target * stride_vocab, mask=valid, other=float("nan"))
    loss = tl.where(ignored, 0.0, log_sum - (target_logit.to(ACC) - maximum))
    tl.store(losses_ptr + row, loss)


@triton.jit
def backward_kernel(
    dlosses_ptr,  # (outer * inner,)
    logits_ptr,  # (outer, inner, vocab_size)
    targets_ptr,  # (outer * inner,) int64
    maximum_ptr,  # (outer * inner,) ACC
    log_sum_ptr,  # (outer * inner,) ACC
    dlogits_ptr,  # (outer * inner, vocab_size), dtype of logits
    inner,
    stride_outer,
    stride_inner,
    stride_vocab,
    vocab_size,
    ignore_index,
    blocks_per_row,
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
    x = tl.load(logits_ptr + cols * stride_vocab, mask=in_row, other=float("-inf")).to(ACC)
    # (p - 1) before dloss: the other order loses p when the target is nearly certain
    dx = (tl.exp(x - maximum - log_sum) - tl.where(cols == target, 1.0, 0.0)) * dloss
    dx = tl.where(ignored, 0.0, tl.where(valid, dx, float("nan")))
    dlogits_ptr += row * vocab_size + cols
    tl.store(dlogits_ptr, dx.to(dlogits_ptr.dtype.element_ty), mask=in_row)
