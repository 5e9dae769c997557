"""Allocate, multiply and launch, a chunk of rows at a time.  Arguments are already checked."""

from __future__ import annotations

import torch
from torch import Tensor

from .._chunks import matmul, rows_per_chunk, wide_dtype
from .._launch import accumulator, launch
from .._runtime import refuses_device
from . import tuning
from .kernel import top_k_kernel

# The kernel counts columns in 32 bits, and up to a block beyond the last.
_MOST_CLASSES = 1 << 30


def forward_refuses(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    k: int,
    softcap: float | None,
    logit_scale: float,
) -> str | None:
    if k > tuning.MOST_ASKED:
        return f"k must be at most {tuning.MOST_ASKED}, got {k}"
    vocab_size = linear_weight.shape[0]
    if vocab_size > _MOST_CLASSES:
        return f"linear_weight must have at most {_MOST_CLASSES} classes, got {vocab_size}"
    return refuses_device(input, "input")


def forward(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    k: int,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:
    inputs, wide = input.reshape(-1, input.shape[-1]), wide_dtype(input)
    num_rows, vocab_size = inputs.shape[0], linear_weight.shape[0]
    bias = None if linear_bias is None else linear_bias.contiguous()
    logprobs = input.new_empty(num_rows, k, dtype=wide)
    indices = torch.empty_like(logprobs, dtype=torch.int64)
    step = rows_per_chunk(num_rows, vocab_size, input.device.type)
    workspace = input.new_empty(step, vocab_size, dtype=wide)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        logits = workspace[: rows.stop - start]
        matmul(logits, inputs[rows], linear_weight.t())
        launch_top_k(logits, bias, softcap, logit_scale, logprobs[rows], indices[rows])
    shape = (*input.shape[:-1], k)
    return logprobs.view(shape), indices.view(shape)


def launch_top_k(
    logits: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    logprobs: Tensor,
    indices: Tensor,
) -> None:
    """Write ``logprobs`` and ``indices``, ``(rows, k)``, from the logits of a chunk."""
    num_rows, vocab_size = logits.shape
    plan = tuning.plan(vocab_size)
    launch(
        top_k_kernel, (num_rows,),
        logits, logits if bias is None else bias, logprobs, indices,
        vocab_size, indices.shape[1], softcap or 0.0, logit_scale,
        HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None,
        SCALE_IS_NEGATIVE=logit_scale < 0, BLOCK_V=plan.block_v, BLOCK_LANE=plan.block_lane,
        ACC=accumulator(logits.dtype), num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
