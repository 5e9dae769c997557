"""Allocate, multiply and launch, a chunk of rows at a time.  Arguments are already checked."""

from __future__ import annotations

import torch
from torch import Tensor

from .._chunks import matmul, rows_per_chunk, wide_dtype
from .._launch import accumulator, launch
from .._runtime import refuses_device
from .._shards import CLASSES_OF_CHUNKS, Shard, best_of_all
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
    group: str,
    num_classes: int,
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
    group: str,
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    inputs, wide = input.reshape(-1, input.shape[-1]), wide_dtype(input)
    num_rows, vocab_size = inputs.shape[0], linear_weight.shape[0]
    bias = None if linear_bias is None else linear_bias.contiguous()
    shard = Shard.of(group, num_classes, vocab_size)
    logprobs = input.new_empty(num_rows, k, dtype=wide)
    indices = torch.empty_like(logprobs, dtype=torch.int64)
    classes = vocab_size if shard is None else CLASSES_OF_CHUNKS
    step = rows_per_chunk(num_rows, classes, input.device.type)
    workspace = input.new_empty(step, vocab_size, dtype=wide)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        logits = workspace[: rows.stop - start]
        if vocab_size:
            matmul(logits, inputs[rows], linear_weight.t())
        if shard is None:
            launch_top_k(logits, bias, softcap, logit_scale, logprobs[rows], indices[rows])
        else:
            best = _best_here(shard, logits, bias, k, softcap, logit_scale)
            logprobs[rows], indices[rows] = best_of_all(shard, shard.gather(best), k)
    shape = (*input.shape[:-1], k)
    return logprobs.view(shape), indices.view(shape)


def _best_here(
    shard: Shard,
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """What this rank sends of a chunk."""
    num_rows, most = len(logits), min(k, shard.largest)
    best = shard.new_best(logits, num_rows, k, has_values=True)
    found = min(k, shard.size)
    if found == 0:
        return best
    values = logits.new_empty(num_rows, found)
    keys, columns = torch.empty_like(values), torch.empty_like(values, dtype=torch.int64)
    sums = logits.new_empty(num_rows, 2)
    launch_top_k(logits, bias, softcap, logit_scale, values, columns, keys, sums)
    best[:2] = sums.t()
    for place, part in enumerate((keys, columns, values)):
        first = 2 + place * most
        best[first : first + found] = part.t()
    return best


def launch_top_k(
    logits: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    logprobs: Tensor,
    indices: Tensor,
    keys: Tensor | None = None,
    sums: Tensor | None = None,
) -> None:
    """Write ``logprobs`` and ``indices``, ``(rows, k)``, from the logits of a chunk.

    With ``keys``, ``(rows, k)``, and ``sums``, ``(rows, 2)``, what a shard knows.
    """
    num_rows, vocab_size = logits.shape
    plan = tuning.plan(vocab_size)
    launch(
        top_k_kernel, (num_rows,),
        logits, logits if bias is None else bias, logprobs, indices,
        logprobs if keys is None else keys, logprobs if sums is None else sums,
        vocab_size, indices.shape[1], softcap or 0.0, logit_scale,
        HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None,
        SCALE_IS_NEGATIVE=logit_scale < 0, IS_SHARD=keys is not None,
        BLOCK_V=plan.block_v, BLOCK_LANE=plan.block_lane,
        ACC=accumulator(logits.dtype), num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
