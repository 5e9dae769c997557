"""Cross-entropy by torch's own operators, with no more temporaries than it needs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops.reference.cross_entropy import check_targets, classify


def forward(input: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    check_targets("cross_entropy", target, input.shape[-1], ignore_index)
    logits = input.to(torch.promote_types(input.dtype, torch.float32))
    maximum = logits.amax(dim=-1)
    ignored, invalid, safe = classify(target, input.shape[-1], ignore_index)
    at_target = logits.gather(-1, safe[..., None])[..., 0] - maximum
    log_sum = (logits - maximum[..., None]).exp_().sum(dim=-1).log_()
    losses = log_sum - at_target
    maximum.masked_fill_(log_sum.isnan(), torch.nan)
    return losses.masked_fill_(ignored, 0.0).masked_fill_(invalid, torch.nan), maximum, log_sum


def backward(
    dlosses: Tensor,
    input: Tensor,
    target: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    ignore_index: int,
) -> Tensor:
    ignored, invalid, safe = classify(target, input.shape[-1], ignore_index)
    weights = dlosses.masked_fill(ignored, 0.0).masked_fill_(invalid, torch.nan)[..., None]
    dinput = (input.to(maximum.dtype) - maximum[..., None]).sub_(log_sum[..., None]).exp_()
    # (p - 1) before the weight: the other order loses p when the target is nearly certain
    dinput.scatter_add_(-1, safe[..., None], torch.full_like(weights, -1.0))
    dinput.mul_(weights)
    # 0 * NaN: an ignored row has gradient zero whatever its logits
    dinput.masked_fill_(ignored[..., None], 0.0)
    return dinput.to(input.dtype)


def forward_refuses(*args: object) -> None:
    return None


backward_refuses = forward_refuses
