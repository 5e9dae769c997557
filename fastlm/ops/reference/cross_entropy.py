"""Cross-entropy per row.  With x the logits after scale and cap, the maximum over a row and

    x        = logit_scale input,  or  softcap tanh(logit_scale input / softcap)
    log_sum  = log sum_v exp(x[v] - maximum)          lse = maximum + log_sum
    logprob  = x[target] - lse
    entropy  = log_sum - sum_v p[v] (x[v] - maximum)  p = exp(x - lse)
    loss     = -(1 - s) w[target] logprob + s / V sum_v w[v] (lse - x[v])

w are the weights of the classes, s is the label smoothing.  As in torch, a NaN or +inf among the x
of a row, or only -inf, makes its loss and gradient NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS_AT_ONCE = 256


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
    """``(..., V)`` logits to ``(...)`` losses, maximum, log_sum, and statistics if asked for.

    The two parts of lse stay apart because their sum, rounded, has lost what the loss of a likely
    target consists of.  Maximum and log_sum are those of every row; the others are zero at ignored
    targets, and the predictions, int64, are -1.

    Returns:
        losses, maximum, log_sum, logprobs, entropy: float32 or float64; predictions: int64.  The
        last three are empty unless ``need_stats``.

    Raises:
        IndexError: On CPU, a target is neither ``ignore_index`` nor in ``[0, V)``; elsewhere its
            loss and log-probability are NaN.
    """
    vocab_size = input.shape[-1]
    check_targets("cross_entropy", target, vocab_size, ignore_index)
    x = transform(input.to(torch.promote_types(input.dtype, torch.float32)), softcap, logit_scale)
    maximum = x.amax(dim=-1)
    shifted = x - maximum[..., None]
    log_sum = shifted.exp().sum(dim=-1).log()
    maximum = maximum.masked_fill(log_sum.isnan(), torch.nan)
    ignored, invalid, safe = classify(target, vocab_size, ignore_index)
    surprisal = log_sum - shifted.gather(-1, safe[..., None])[..., 0]
    weights = class_weights(weight, x)
    losses = (1 - label_smoothing) * weights[safe] * surprisal
    if label_smoothing > 0:
        losses = losses + label_smoothing * (weights * (log_sum[..., None] - shifted)).mean(-1)
    losses = losses.masked_fill(ignored, 0.0).masked_fill(invalid, torch.nan)
    if not need_stats:
        return losses, maximum, log_sum, x.new_empty(0), x.new_empty(0), target.new_empty(0)
    logprobs = (-surprisal).masked_fill(ignored, 0.0).masked_fill(invalid, torch.nan)
    # a class of probability zero has x = -inf, and 0 * -inf is not its part
    moment = (shifted - log_sum[..., None]).exp() * shifted.masked_fill(shifted == -torch.inf, 0.0)
    entropy = (log_sum - moment.sum(-1)).masked_fill(ignored, 0.0)
    predictions = x.argmax(-1).masked_fill(ignored, -1)
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
    """The gradient of the input, zero at ignored targets; upstream ones of statistics may be None.

    Of x:  (p - [v == target]) ((1 - s) w[target] dloss - dlogprob) + p (dlse + s mean(w) dloss)
           - s / V w[v] dloss - p (log p + entropy) dentropy

    ``entropy`` is read only with ``dentropy``.
    """
    vocab_size = input.shape[-1]
    ignored, invalid, safe = classify(target, vocab_size, ignore_index)
    dlogprobs = torch.zeros_like(dlosses) if dlogprobs is None else dlogprobs
    dlse = torch.zeros_like(dlosses) if dlse is None else dlse
    x = transform(input.to(maximum.dtype), softcap, logit_scale)
    log_p = x - maximum[..., None] - log_sum[..., None]
    p = log_p.exp()
    weights = class_weights(weight, x)
    of_target = (1 - label_smoothing) * weights[safe] * dlosses - dlogprobs
    of_all = label_smoothing * weights.mean() * dlosses + dlse
    one_hot = torch.zeros_like(p).scatter(-1, safe[..., None], 1.0)
    dx = (p - one_hot) * of_target[..., None] + p * of_all[..., None]
    if label_smoothing > 0:
        dx = dx - label_smoothing / vocab_size * weights * dlosses[..., None]
    if dentropy is not None:
        informative = (log_p + entropy[..., None]).masked_fill(p == 0, 0.0)
        dx = dx - p * informative * dentropy[..., None]
    if softcap is not None:
        dx = dx * (1 - (x / softcap).square())
    dinput = (dx * logit_scale).masked_fill(ignored[..., None], 0.0)
    return dinput.masked_fill(invalid[..., None], torch.nan).to(input.dtype)


def transform(logits: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    """What the softmax is taken of."""
    x = logits if logit_scale == 1.0 else logits * logit_scale
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def class_weights(weight: Tensor | None, logits: Tensor) -> Tensor:
    """One per class, in the dtype of the logits."""
    return logits.new_ones(logits.shape[-1]) if weight is None else weight.to(logits.dtype)


def classify(target: Tensor, vocab_size: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which targets are ignored, which are out of range, and targets with 0 in place of both."""
    ignored = target == ignore_index
    invalid = ~ignored & ((target < 0) | (target >= vocab_size))
    return ignored, invalid, target.masked_fill(ignored | invalid, 0)


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
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    need_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`forward` in float64; a target out of range raises IndexError on every device."""
    vocab_size = input.shape[-1]
    check_targets("cross_entropy", target, vocab_size, ignore_index, may_wait=True)
    options = (ignore_index, label_smoothing, softcap, logit_scale, need_stats)
    weight = None if weight is None else weight.double()
    rows, targets = input.reshape(-1, vocab_size), target.reshape(-1)
    parts = [
        forward(x.double(), y, weight, *options)
        for x, y in zip(rows.split(_ROWS_AT_ONCE), targets.split(_ROWS_AT_ONCE), strict=True)
    ]
    losses, maximum, log_sum, *stats = (torch.cat(x) for x in zip(*parts, strict=True))
    per_row = [losses, maximum, log_sum, *(stats if need_stats else ())]
    per_row = [x.view(target.shape) for x in per_row]
    losses, maximum, log_sum, logprobs, entropy, predictions = (*per_row, *stats)[:6]
    return losses, maximum, log_sum, logprobs, entropy, predictions


def truth_backward(
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
    """:func:`backward` in float64, maximum, log_sum and entropy too."""
    weight = None if weight is None else weight.double()
    options = (ignore_index, label_smoothing, softcap, logit_scale)
    flat = dlosses.double().reshape(-1)
    stats = [None if x is None else x.double().reshape(-1) for x in (dlogprobs, dlse, dentropy)]
    rows, targets = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    parts = []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        x, y = rows[part].double(), targets[part]
        _, maximum, log_sum, _, entropy, _ = forward(x, y, weight, *options, dentropy is not None)
        dlogprobs, dlse, dentropy_part = (None if d is None else d[part] for d in stats)
        upstream = (flat[part], dlogprobs, dlse, dentropy_part)
        parts.append(backward(*upstream, x, y, weight, maximum, log_sum, entropy, *options))
    return torch.cat(parts).view(input.shape) if parts else input.double()


plain_forward = forward
plain_backward = backward


def forward_refuses(*args: object) -> None:
    return None


backward_refuses = forward_refuses
