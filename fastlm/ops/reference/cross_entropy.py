"""Cross-entropy per row: loss = lse - input[target], lse = log sum_v exp(input[v]).

As in torch, a NaN or +inf among the logits of a row, or only -inf, makes its loss and gradient NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS_AT_ONCE = 256


def forward(input: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """``(..., V)`` logits to ``(...)`` losses and lse, float32 or float64.

    Raises:
        IndexError: On CPU, a target is neither ``ignore_index`` nor in ``[0, V)``; elsewhere its
            loss is NaN.
    """
    check_targets("cross_entropy", target, input.shape[-1], ignore_index)
    logits = input.to(torch.promote_types(input.dtype, torch.float32))
    lse = log_sum_exp(logits)
    ignored = target == ignore_index
    invalid = ~ignored & ((target < 0) | (target >= input.shape[-1]))
    safe = target.masked_fill(ignored | invalid, 0)
    losses = lse - logits.gather(-1, safe[..., None])[..., 0]
    return losses.masked_fill(ignored, 0.0).masked_fill(invalid, torch.nan), lse


def backward(
    dlosses: Tensor, input: Tensor, target: Tensor, lse: Tensor, ignore_index: int
) -> Tensor:
    """dinput[v] = (exp(input[v] - lse) - [v == target]) dloss, zero at ignored targets."""
    ignored = target == ignore_index
    invalid = ~ignored & ((target < 0) | (target >= input.shape[-1]))
    probabilities = (input.to(lse.dtype) - lse[..., None]).exp()
    safe = target.masked_fill(ignored | invalid, 0)
    one_hot = torch.zeros_like(probabilities).scatter(-1, safe[..., None], 1.0)
    dinput = (probabilities - one_hot) * dlosses[..., None]
    dinput = dinput.masked_fill(ignored[..., None], 0.0)
    return dinput.masked_fill(invalid[..., None], torch.nan).to(input.dtype)


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


def truth_forward(input: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """:func:`forward` in float64; a target out of range raises IndexError on every device."""
    check_targets("cross_entropy", target, input.shape[-1], ignore_index, may_wait=True)
    rows, targets = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    parts = [
        forward(x.double(), y, ignore_index)
        for x, y in zip(rows.split(_ROWS_AT_ONCE), targets.split(_ROWS_AT_ONCE), strict=True)
    ]
    losses, lse = (torch.cat(part).view(target.shape) for part in zip(*parts, strict=True))
    return losses, lse


def truth_backward(
    dlosses: Tensor, input: Tensor, target: Tensor, lse: Tensor, ignore_index: int
) -> Tensor:
    rows = input.reshape(-1, input.shape[-1])
    per_row = (x.reshape(-1).split(_ROWS_AT_ONCE) for x in (dlosses, target))
    parts = []
    for x, dloss, y in zip(rows.split(_ROWS_AT_ONCE), *per_row, strict=True):
        exact = x.double()
        parts.append(backward(dloss.double(), exact, y, log_sum_exp(exact), ignore_index))
    return torch.cat(parts).view(input.shape)


plain_forward = forward
plain_backward = backward


def forward_refuses(*args: object) -> None:
    return None


backward_refuses = forward_refuses
