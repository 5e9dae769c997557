"""Allocate, multiply and launch, a chunk of rows at a time.  Arguments are already checked.

Per chunk: logits by a matrix product in float32 (a logit rounded to bfloat16 moves the loss by
1e-3), one kernel that turns them into their gradient in place, and two products that use it, the
gradient rounded to the dtype of the inputs because tensor cores need both operands alike.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from .._chunks import (
    LinearGradients,
    Operand,
    matmul,
    rows_per_chunk,
    tensor_core_operand,
    wide_dtype,
    within_float16,
)
from .._launch import accumulator, launch
from .._runtime import refuses_device
from . import tuning
from .kernel import bias_gradient_kernel, gradient_kernel, loss_kernel


def forward_refuses(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
) -> str | None:
    return refuses_device(input, "input")


def gradients_refuses(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> str | None:
    return refuses_device(input, "input")


def backward_refuses(
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
) -> str | None:
    return refuses_device(input, "input")


def forward(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    losses = input.new_empty(target.shape, dtype=wide_dtype(input))
    lse = torch.empty_like(losses)
    flat_losses, flat_lse, flat_target = losses.view(-1), lse.view(-1), target.reshape(-1)
    for rows, logits in _chunks(input.reshape(-1, input.shape[-1]), linear_weight):
        _launch_loss(
            logits, linear_bias, flat_losses[rows], flat_lse[rows], flat_target[rows], ignore_index
        )
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
    losses = input.new_empty(target.shape, dtype=wide_dtype(input))
    lse = torch.empty_like(losses)
    operand = tensor_core_operand(input, linear_weight.shape[0])
    gradients = _sweep(
        None, input, linear_weight, linear_bias, target, losses, lse, ignore_index, operand,
        need_input, need_weight, need_bias,
    )  # fmt: skip
    return losses, *gradients


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
    operand = tensor_core_operand(input, linear_weight.shape[0])
    dlosses, factor = within_float16(dlosses, target == ignore_index, operand)
    gradients = _sweep(
        dlosses, input, linear_weight, linear_bias, target, None, lse, ignore_index, operand,
        need_input, need_weight, need_bias,
    )  # fmt: skip
    if factor is not None:
        for gradient in gradients:
            gradient.mul_(factor)
    return gradients


def _sweep(
    dlosses: Tensor | None,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    losses: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    operand: Operand,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``(losses * dlosses).sum()``, or of ``losses.sum()`` without ``dlosses``.

    Writes ``losses`` and ``lse``; without ``losses``, reads ``lse``.
    """
    inputs = input.reshape(-1, input.shape[-1])
    targets, lse = target.flatten().contiguous(), lse.flatten().contiguous()
    losses = None if losses is None else losses.view(-1)
    dlosses = None if dlosses is None else dlosses.flatten().contiguous()
    vocab_size, bias = linear_weight.shape[0], _contiguous(linear_bias)
    linear = LinearGradients(inputs, linear_weight, operand, need_input, need_weight)
    dbias = lse.new_zeros(vocab_size if need_bias else 0)
    for rows, logits in _chunks(inputs, linear_weight):
        y, chunk_lse = targets[rows], lse[rows]
        chunk_losses = None if losses is None else losses[rows]
        weights = None if dlosses is None else dlosses[rows]
        if need_bias:
            assert bias is not None, "a gradient of no bias"
            if chunk_losses is not None:
                _launch_loss(logits, bias, chunk_losses, chunk_lse, y, ignore_index)
                chunk_losses = None
            _launch_bias_gradient(logits, bias, y, weights, chunk_lse, dbias, ignore_index)
        dlogits, residuals = _launch_gradient(
            logits, operand, bias, y, weights, chunk_losses, chunk_lse, ignore_index
        )
        # the residual is zero where the target is ignored, NaN where it is out of range
        linear.add(rows, dlogits, y.clamp(0, vocab_size - 1), residuals)
    return linear.dinput.view(input.shape if need_input else 0), linear.dweight, dbias


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _chunks(inputs: Tensor, linear_weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows, and their logits without bias, in memory that the next step reuses."""
    num_rows, vocab_size = inputs.shape[0], linear_weight.shape[0]
    step = rows_per_chunk(num_rows, vocab_size, inputs.device.type)
    workspace = inputs.new_empty(step, vocab_size, dtype=wide_dtype(inputs))
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        logits = workspace[: rows.stop - start]
        matmul(logits, inputs[rows], linear_weight.t())
        yield rows, logits


def _launch_loss(
    logits: Tensor,
    bias: Tensor | None,
    losses: Tensor,
    lse: Tensor,
    targets: Tensor,
    ignore_index: int,
) -> None:
    rows, vocab_size = logits.shape
    plan = tuning.plan("loss", vocab_size)
    launch(
        loss_kernel, (rows,),
        logits, logits if bias is None else bias, targets, losses, lse, vocab_size, ignore_index,
        HAS_BIAS=bias is not None, BLOCK_V=plan.block_v, ACC=accumulator(logits.dtype),
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip


def _launch_gradient(
    logits: Tensor,
    operand: Operand,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor | None,
    losses: Tensor | None,
    lse: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """The gradient over the memory of ``logits``, and what rounding took from it at the target."""
    rows, vocab_size = logits.shape
    dlogits = logits.view(operand.dtype)[:, :vocab_size]
    residuals = torch.empty_like(lse)
    plan = tuning.plan("gradient", vocab_size)
    launch(
        gradient_kernel, (rows,),
        logits, dlogits, logits if bias is None else bias, targets,
        lse if weights is None else weights, lse if losses is None else losses, lse, residuals,
        dlogits.stride(0), vocab_size, ignore_index,
        SCALE=operand.scale, HAS_BIAS=bias is not None, HAS_WEIGHTS=weights is not None,
        LSE_IS_KNOWN=losses is None, ONE_BLOCK=vocab_size <= plan.block_v,
        BLOCK_V=plan.block_v, ACC=accumulator(logits.dtype),
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    return dlogits, residuals


def _launch_bias_gradient(
    logits: Tensor,
    bias: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    lse: Tensor,
    dbias: Tensor,
    ignore_index: int,
) -> None:
    """Add to ``dbias``."""
    rows, vocab_size = logits.shape
    plan = tuning.BIAS
    launch(
        bias_gradient_kernel, (triton.cdiv(vocab_size, plan.block_v),),
        logits, bias, targets, lse if weights is None else weights, lse, dbias,
        rows, vocab_size, ignore_index,
        HAS_WEIGHTS=weights is not None, BLOCK_R=plan.block_r, BLOCK_V=plan.block_v,
        ACC=accumulator(logits.dtype),
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
