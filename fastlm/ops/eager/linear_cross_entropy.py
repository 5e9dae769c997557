"""Cross-entropy of a linear layer's logits by torch's own operators, a chunk of rows at a time.

One buffer holds the logits of a chunk; they become their gradient in place and feed two matrix
products.  On CPU narrow inputs are widened before every product (without AMX or AVX-512 a bfloat16
product is over a hundred times slower than a float32 one), and rows with an ignored target are left
out of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels._chunks import (
    LinearGradients,
    Operand,
    matmul,
    rows_per_chunk,
    tensor_core_operand,
    wide_dtype,
    within_float16,
)
from fastlm.ops.eager.cross_entropy import all_are_classes
from fastlm.ops.reference.cross_entropy import check_targets

_OP = "linear_cross_entropy"

# A narrow weight up to this many elements is widened once, 1 GB of float32; a larger one again for
# every product, a block at a time.
_WIDENED_ONCE = 1 << 28


def forward(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    losses, lse, *_ = _run(
        None, input, linear_weight, linear_bias, target, None, ignore_index, False, False, False
    )
    assert lse is not None, "no gradients were asked for"
    return losses, lse


def gradients(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    losses, _, dinput, dweight, dbias = _run(
        None, input, linear_weight, linear_bias, target, None, ignore_index,
        need_input, need_weight, need_bias,
    )  # fmt: skip
    return losses, dinput, dweight, dbias


def backward(
    dlosses: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _, _, dinput, dweight, dbias = _run(
        dlosses, input, linear_weight, linear_bias, target, lse, ignore_index,
        need_input, need_weight, need_bias,
    )  # fmt: skip
    return dinput, dweight, dbias


def _run(
    dlosses: Tensor | None,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    lse: Tensor | None,
    ignore_index: int,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Losses and gradients of ``(losses * dlosses).sum()``; lse where no gradient is asked for."""
    vocab_size = linear_weight.shape[0]
    rows, targets = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    dlosses = None if dlosses is None else dlosses.reshape(-1)
    lse = None if lse is None else lse.reshape(-1)
    kept = None
    # on a GPU a look at the targets would wait for it
    if input.is_cpu and not all_are_classes(targets, vocab_size, ignore_index):
        check_targets("linear_cross_entropy", target, vocab_size, ignore_index)
        kept = (targets != ignore_index).nonzero()[:, 0]
        rows, targets = rows[kept], targets[kept]
        dlosses = None if dlosses is None else dlosses[kept]
        lse = None if lse is None else lse[kept]
    losses, lse, dinput, dweight, dbias = _sweep(
        dlosses, rows, linear_weight, linear_bias, targets, lse, ignore_index,
        need_input, need_weight, need_bias,
    )  # fmt: skip
    if kept is not None:
        num_rows = target.numel()
        losses = losses.new_zeros(num_rows).index_copy_(0, kept, losses)
        if lse is not None:
            lse = lse.new_zeros(num_rows).index_copy_(0, kept, lse)
        if need_input:
            dinput = dinput.new_zeros(num_rows, dinput.shape[1]).index_copy_(0, kept, dinput)
    dinput = dinput.view(input.shape if need_input else 0)
    lse = None if lse is None else lse.view(target.shape)
    return losses.view(target.shape), lse, dinput, dweight, dbias


def _sweep(
    dlosses: Tensor | None,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    targets: Tensor,
    known_lse: Tensor | None,
    ignore_index: int,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """The same for ``(N, C)`` rows; on CPU none of them is ignored or out of range."""
    (num_rows, _), vocab_size, wide = input.shape, linear_weight.shape[0], wide_dtype(input)
    on_cpu = input.is_cpu
    operand = Operand(wide) if on_cpu else tensor_core_operand(input, vocab_size)
    if on_cpu and linear_weight.numel() <= _WIDENED_ONCE:
        linear_weight = linear_weight.to(wide)
    bias = None if linear_bias is None else linear_bias.to(wide)
    losses = input.new_empty(num_rows, 1, dtype=wide)
    any_gradient = need_input or need_weight or need_bias
    lse = None if known_lse is None else known_lse[:, None]
    if not any_gradient:
        lse = torch.empty_like(losses)
    linear = LinearGradients(input, linear_weight, operand, need_input, need_weight)
    dbias = losses.new_zeros(vocab_size) if need_bias else losses.new_empty(0)

    targets = targets[:, None]
    weights = factor = ignored = None
    if dlosses is not None:
        weights, factor = within_float16(dlosses[:, None], targets == ignore_index, operand)
    if not on_cpu:
        ignored = targets == ignore_index
        outside = (targets < 0) | (targets >= vocab_size)
        weights = torch.ones_like(losses) if weights is None else weights
        weights = weights.masked_fill(outside, torch.nan)
        targets = targets.masked_fill(outside, 0)

    step = rows_per_chunk(num_rows, vocab_size, input.device.type)
    buffer = input.new_empty(step, vocab_size, dtype=wide)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        y, z = targets[rows], buffer[: rows.stop - start]
        matmul(z, input[rows], linear_weight.t())
        if bias is not None:
            z.add_(bias)
        if not any_gradient:
            total = torch.logsumexp(z, 1, keepdim=True, out=lse[rows])
            # where a logit is +inf, as the softmax is
            total.masked_fill_(total == torch.inf, torch.nan)
            torch.sub(total, z.gather(1, y), out=losses[rows])
            continue
        if lse is not None:
            z.sub_(lse[rows]).exp_()
        else:
            # in one pass over each row, while it is in the cache
            torch.log_softmax(z, 1, out=z)
            torch.neg(z.gather(1, y), out=losses[rows])
            z.exp_()
        # p - 1 before the weight: the other order loses p when the target is nearly certain
        z.scatter_(1, y, -1.0, reduce="add")
        if weights is not None:
            z.mul_(weights[rows])
        if ignored is not None:
            z.masked_fill_(ignored[rows], 0.0)
        if need_bias:
            dbias += z.sum(0)
        dlogits, residuals = _rounded(z, y, operand)
        linear.add(rows, dlogits, y[:, 0], residuals)
    if ignored is not None:
        losses.masked_fill_(outside, torch.nan).masked_fill_(ignored, 0.0)
        lse = None if lse is None else lse.masked_fill(ignored, 0.0)
    if factor is not None:
        for gradient in (linear.dinput, linear.dweight, dbias):
            gradient.mul_(factor)
    lse = None if lse is None else lse[:, 0]
    return losses[:, 0], lse, linear.dinput, linear.dweight, dbias


def _rounded(dlogits: Tensor, targets: Tensor, operand: Operand) -> tuple[Tensor, Tensor | None]:
    """``dlogits`` as the products take it, and what rounding took from it at the targets."""
    if operand.dtype == dlogits.dtype:
        return dlogits, None
    dlogits.mul_(operand.scale)
    rounded = dlogits.to(operand.dtype)
    residuals = dlogits.gather(1, targets) - rounded.gather(1, targets).to(dlogits.dtype)
    return rounded, residuals[:, 0]


def forward_refuses(*args: object) -> None:
    return None


gradients_refuses = forward_refuses
backward_refuses = forward_refuses
