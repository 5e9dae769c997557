"""Cross-entropy by torch's own operators."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels._chunks import Upstream
from fastlm.ops.eager._losses import (
    LossOptions,
    all_are_classes,
    row_factors,
    row_losses,
    write_gradient,
)
from fastlm.ops.reference.cross_entropy import check_targets, classify


def forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    need_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    vocab_size = input.shape[-1]
    usual, safe = all_are_classes(target, vocab_size, ignore_index), target
    if not usual:
        check_targets("cross_entropy", target, vocab_size, ignore_index)
        ignored, invalid, safe = classify(target, vocab_size, ignore_index)
    known = row_losses(
        input.reshape(-1, vocab_size), _column(safe),
        LossOptions(weight, label_smoothing, softcap, logit_scale), need_stats=need_stats,
    )  # fmt: skip
    if not usual:
        known.mask(_column(ignored), _column(invalid))
    losses, maximum, log_sum, *stats = vars(known).values()
    losses, maximum, log_sum = (x.view(target.shape) for x in (losses, maximum, log_sum))
    logprobs, entropy, predictions = (
        x.view(target.shape) if need_stats else x[:, 0] for x in stats
    )
    return losses, maximum, log_sum, logprobs, entropy, predictions


def backward(
    dlosses: Tensor,
    dlogprobs: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    maximum: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    vocab_size = input.shape[-1]
    ignored, safe = None, target
    if not all_are_classes(target, vocab_size, ignore_index):
        ignored, invalid, safe = classify(target, vocab_size, ignore_index)
        dlosses = dlosses.masked_fill(ignored, 0.0).masked_fill_(invalid, torch.nan)
        ignored = _column(ignored)
    upstream = Upstream(dlosses, dlogprobs, dlse, dentropy).each_row(_column)
    logits, targets = input.reshape(-1, vocab_size), _column(safe)
    options = LossOptions(weight, label_smoothing, softcap, logit_scale)
    maximum, log_sum, entropy = _column(maximum), _column(log_sum), _column(entropy)
    factors = row_factors(upstream, maximum, entropy, targets, options, vocab_size)
    dinput = input.new_empty(logits.shape)
    parts = (maximum, log_sum)
    write_gradient(dinput, logits, parts, targets, factors, ignored, options)
    return dinput.view(input.shape)


def _column(x: Tensor) -> Tensor:
    return x.reshape(-1, 1)


def forward_refuses(*args: object) -> None:
    return None


backward_refuses = forward_refuses
