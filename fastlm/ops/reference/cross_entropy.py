"""Cross-entropy per row: loss = log_sum - (input[target] - maximum), the maximum over the row and

    log_sum = log sum_v exp(input[v] - maximum)

As in torch, a NaN or +inf among the logits of a row, or only -inf, makes its loss and gradient NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS_AT_ONCE = 256


def forward(input: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(..., V)`` logits to ``(...)`` losses, maximum and log_sum, float32 or float64.

    The two parts of lse stay apart because their sum, rounded, has lost what the loss of a likely
    target consists of.

    Raises:
        IndexError: On CPU, a target is neither ``ignore_index`` nor in ``[0, V)``; elsewhere its
            loss is NaN.
    """
    check_targets("cross_entropy", target, input.shape[-1], ignore_index)
    logits = input.to(torch.promote_types(input.dtype, torch.float32))
    maximum = logits.amax(dim=-1)
    shifted = logits - maximum[..., None]
    log_sum = shifted.exp().sum(dim=-1).log()
    maximum = maximum.masked_fill(log_sum.isnan(), torch.nan)
    ignored, invalid, safe = classify(target, input.shape[-1], ignore_index)
    losses = log_sum - shifted.gather(-1, safe[..., None])[..., 0]
    losses = losses.masked_fill(ignored, 0.0).masked_fill(invalid, torch.nan)
    return losses, maximum, log_sum


def backward(
    dlosses: Tensor,
    input: Tensor,
    target: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    ignore_index: int,
) -> Tensor:
    """dinput[v] = (exp(input[v] - lse) - [v == target]) dloss, zero at ignored targets."""
    ignored, invalid, safe = classify(target, input.shape[-1], ignore_index)
    shifted = input.to(maximum.dtype) - maximum[..., None]
    probabilities = (shifted - log_sum[..., None]).exp()
    one_hot = torch.zeros_like(probabilities).scatter(-1, safe[..., None], 1.0)
    dinput = (probabilities - one_hot) * dlosses[..., None]
    dinput = dinput.masked_fill(ignored[..., None], 0.0)
    return dinput.masked_fill(invalid[..., None], torch.nan).to(input.dtype)


def classify(target: Tensor, vocab_size: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which targets are ignored, which are out of range, and targets with 0 in place of both."""
    ignored = target == ignore_index
    invalid = ~ignored & ((target < 0) | (target >= vocab_size))
    return ignored, invalid, target.masked_fill(ignored | invalid, 0)


def log_sum_exp(logits: Tensor) -> Tensor:
    """Over the last dimension; NaN where a logit is +inf, as the softmax is."""
    lse = logits.logsumexp(dim=-1)
    return lse.masked_fill(lse == torch.inf, torch.nan)


def check_targets(
    op: str, target: Tensor, vocab_size: int, ignore_index: int, *, may_wait: bool = False
) -> None:
    """Raise IndexError for the first target out of range, where looking costs no device sync.

    With ``may_wait``, look on every device.
    """
    if target.device.type != "cpu" and not may_wait:
        return
    bad = (target != ignore_index) & ((target < 0) | (target >= vocab_size))
    if bad.any():
        position = bad.nonzero()[0].tolist()
        raise IndexError(
            f"{op}: target must be in [0, {vocab_size}) or ignore_index ({ignore_index}), "
            f"got {target[tuple(position)].item()} at position {position}"
        )


def truth_forward(
    input: Tensor, target: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`forward` in float64; a target out of range raises IndexError on every device."""
    check_targets("cross_entropy", target, input.shape[-1], ignore_index, may_wait=True)
    rows, targets = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    parts = [
        forward(x.double(), y, ignore_index)
        for x, y in zip(rows.split(_ROWS_AT_ONCE), targets.split(_ROWS_AT_ONCE), strict=True)
    ]
    losses, maximum, log_sum = (torch.cat(x).view(target.shape) for x in zip(*parts, strict=True))
    return losses, maximum, log_sum


def truth_backward(
    dlosses: Tensor,
    input: Tensor,
    target: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    ignore_index: int,
) -> Tensor:
    """:func:`backward` in float64, maximum and log_sum too."""
    rows = input.reshape(-1, input.shape[-1])
    per_row = (x.reshape(-1).split(_ROWS_AT_ONCE) for x in (dlosses, target))
    parts = []
    for x, dloss, y in zip(rows.split(_ROWS_AT_ONCE), *per_row, strict=True):
        exact = x.double()
        _, maximum, log_sum = forward(exact, y, ignore_index)
        parts.append(backward(dloss.double(), exact, y, maximum, log_sum, ignore_index))
    return torch.cat(parts).view(input.shape)


plain_forward = forward
plain_backward = backward


def forward_refuses(*args: object) -> None:
    return None


backward_refuses = forward_refuses
