"""The most likely classes by torch's own operators, a chunk of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels._chunks import matmul, rows_per_chunk, wide_dtype
from fastlm.kernels._shards import CLASSES_OF_CHUNKS, Shard, best_of_all
from fastlm.ops.eager._losses import LossOptions, transform


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
    bias = None if linear_bias is None else linear_bias.to(wide)
    options = LossOptions(None, 0.0, softcap, logit_scale)
    shard = Shard.of(group, num_classes, vocab_size)
    logprobs = input.new_empty(num_rows, k, dtype=wide)
    indices = torch.empty_like(logprobs, dtype=torch.int64)
    classes = vocab_size if shard is None else CLASSES_OF_CHUNKS
    step = rows_per_chunk(num_rows, classes, input.device.type)
    buffer = input.new_empty(step, vocab_size, dtype=wide)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        z = buffer[: rows.stop - start]
        matmul(z, inputs[rows], linear_weight.t())
        if bias is not None:
            z.add_(bias)
        transform(z, options, out=z)
        if shard is not None:
            best = _best_here(shard, z, k)
            logprobs[rows], indices[rows] = best_of_all(shard, shard.gather(best), k)
            continue
        top, indices[rows] = torch.topk(z, k)
        maximum = top[:, :1]
        # in two steps: their sum, rounded, has lost what a likely class is judged by
        log_sum = z.sub_(maximum).exp_().sum(1, keepdim=True).log_()
        logprobs[rows] = (top - maximum).sub_(log_sum)
    shape = (*input.shape[:-1], k)
    return logprobs.view(shape), indices.view(shape)


def _best_here(shard: Shard, x: Tensor, k: int) -> Tensor:
    """What this rank sends of a chunk; written over ``x``."""
    best = shard.new_best(x, len(x), k, has_values=False)
    most, found = min(k, shard.largest), min(k, shard.size)
    if found == 0:
        return best
    top, columns = torch.topk(x, found)
    maximum = top[:, 0]
    pivot = maximum.masked_fill(maximum == -torch.inf, 0.0)
    best[0], best[1] = maximum, x.sub_(pivot[:, None]).exp_().sum(1)
    best[2 : 2 + found], best[2 + most : 2 + most + found] = top.t(), columns.t()
    return best


def forward_refuses(*args: object) -> None:
    return None
