"""The options of the losses, and what they mean by torch's own operators."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm
from fastlm import testing


def weights(vocab_size: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return (0.1 + torch.rand(vocab_size, generator=generator)).to(device)


# name -> value; "weight" and "statistics" are told apart below
OPTIONS: dict[str, Any] = {
    "weight": True,
    "label_smoothing": 0.1,
    "softcap": 4.0,
    "logit_scale": -0.6,
    "z_loss": 0.02,
    "return_stats": True,
    "reduction": "none",
}


def transformed(logits: Tensor, options: dict[str, Any]) -> Tensor:
    x = logits * options.get("logit_scale", 1.0)
    cap = options.get("softcap")
    return x if cap is None else cap * torch.tanh(x / cap)


def definition(logits: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """The loss, and with ``return_stats`` log-probability, lse and entropy, by torch."""
    x = transformed(logits, options)
    reduction = options.get("reduction", "mean")
    weight = weights(x.shape[-1], str(x.device)).to(x.dtype) if "weight" in options else None
    smoothing = options.get("label_smoothing", 0.0)
    loss = F.cross_entropy(x, targets, weight, label_smoothing=smoothing, reduction=reduction)
    kept = targets != -100
    lse = x.logsumexp(-1).masked_fill(~kept, 0.0)
    squares = options.get("z_loss", 0.0) * lse.square()
    total = {"none": squares, "sum": squares.sum(), "mean": squares.sum() / kept.sum()}
    if "z_loss" in options:
        loss = loss + total[reduction]
    if "return_stats" not in options:
        return (loss,)
    logprobs = x.log_softmax(-1)
    of_target = logprobs.gather(-1, targets.clamp(min=0)[:, None])[:, 0].masked_fill(~kept, 0.0)
    entropy = -(logprobs.exp() * logprobs).sum(-1).masked_fill(~kept, 0.0)
    return loss, of_target, lse, entropy


def flattened(result: Any) -> tuple[Tensor, ...]:
    """The differentiable outputs of ours."""
    if isinstance(result, Tensor):
        return (result,)
    loss, stats = result
    return loss, stats.logprobs, stats.lse, stats.entropy


def ours(logits: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, ...]:
    if "weight" in options:
        options["weight"] = weights(logits.shape[-1], str(logits.device))
    return flattened(fastlm.cross_entropy(logits, targets, **options))


def linear(
    x: Tensor, matrix: Tensor, bias: Tensor | None, targets: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    if "weight" in options:
        options["weight"] = weights(matrix.shape[0], str(x.device))
    return flattened(fastlm.linear_cross_entropy(x, matrix, targets, linear_bias=bias, **options))


def linear_definition(
    x: Tensor, matrix: Tensor, bias: Tensor | None, targets: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    return definition(F.linear(x, matrix, bias), targets, **options)


def judge(function: Any, by_torch: Any, arguments: Any, backend: str, options: Any) -> None:
    dtype = arguments[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    actual = testing.run(function, *arguments, backend=backend, **options)
    plain = testing.run(by_torch, *arguments, dtype=wide, **options)
    truth = testing.run(by_torch, *arguments, dtype=torch.float64, **options)
    testing.assert_all_as_accurate(backend, actual, plain=plain, truth=truth)
