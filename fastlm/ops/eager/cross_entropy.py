"""Cross-entropy by torch's own operators."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops.reference.cross_entropy import check_targets, log_sum_exp


def forward(input: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    check_targets("cross_entropy", target, input.shape[-1], ignore_index)
    logits = input.to(torch.promote_types(input.dtype, torch.float32))
    lse = log_sum_exp(logits)
    ignored, invalid, safe = _classify(target, input.shape[-1], ignore_index)
    losses = lse - logits.gather(-1, safe[..., None])[..., 0]
    return losses.masked_fill_(ignored, 0.0).masked_fill_(invalid, torch.nan), lse


def backward(
    dlosses: Tensor, input: Tensor, target: Tensor, lse: Tensor, ignore_index: int
) -> Tensor:
    ignored, invalid, safe = _classify(target, input.shape[-1], ignore_index)
    weights = dlosses.masked_fill(ignored, 0.0).masked_fill_(invalid, torch.nan)[..., None]
    dinput = (input.to(lse.dtype) - lse[..., None]).exp_()
    # (p - 1) before the weight: the other order loses p when the target is nearly certain
    dinput.scatter_add_(-1, safe[..., None], torch.full_like(weights, -1.0))
    dinput.mul_(weights)
    # 0 * inf: an ignored row has gradient zero whatever its logits
    dinput.masked_fill_(ignored[..., None], 0.0)
    return dinput.to(input.dtype)


def _classify(target: Tensor, vocab_size: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    ignored = target == ignore_index
    invalid = ~ignored & ((target < 0) | (target >= vocab_size))
    return ignored, invalid, target.masked_fill(ignored | invalid, 0)


def forward_refuses(*args: object) -> None:
    return None


backward_refuses = forward_refuses
