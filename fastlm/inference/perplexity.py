"""How well a model predicts a text."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch

from fastlm._errors import ArgumentError
from fastlm.model.transformer import CausalLM
from fastlm.ops.cross_entropy import cross_entropy

# of logits that are held together
_ROWS = 256


@torch.inference_mode()
def mean_loss(model: CausalLM, ids: Sequence[int], *, window: int | None = None) -> float:
    """The mean negative log probability of each token given those before it, in nats.

    The text is read in windows that follow each other: each token but the first is predicted once,
    from the tokens before it in its window.  Heads are called as they are, so that quantised ones
    count as they decode.

    Args:
        model: Token ids in, logits out.
        ids: At least two tokens.
        window: Tokens of a window; None for the model's context.

    Raises:
        ArgumentError: There is no token to predict, or ``window`` is beyond the context.
        FloatingPointError: The model's logits are not finite.
    """
    context = model.config.max_position_embeddings
    window = context if window is None else window
    if not 0 < window <= context:
        raise ArgumentError(
            f"perplexity: window must be in [1, {context}], the context of the model, got {window}"
        )
    if len(ids) < 2:
        raise ArgumentError(f"perplexity: text must have at least two tokens, got {len(ids)}")
    tokens = torch.tensor(ids, device=model.model.embed_tokens.weight.device)
    total = 0.0
    for inputs, targets in zip(tokens[:-1].split(window), tokens[1:].split(window), strict=True):
        hidden = model.model(inputs[None])[0]
        for rows, wanted in zip(hidden.split(_ROWS), targets.split(_ROWS), strict=True):
            total += cross_entropy(model.lm_head(rows), wanted, reduction="sum").item()
    if not math.isfinite(total):
        raise FloatingPointError("perplexity: the model's logits are not finite")
    return total / (len(ids) - 1)


def perplexity(model: CausalLM, ids: Sequence[int], *, window: int | None = None) -> float:
    """``exp`` of :func:`mean_loss`: among how many equally likely tokens the model seems to choose.

    Arguments and errors are those of :func:`mean_loss`.
    """
    return exp(mean_loss(model, ids, window=window))


def exp(loss: float) -> float:
    """A mean loss as a perplexity, infinite where float64 cannot hold it."""
    return math.exp(loss) if loss < math.log(sys.float_info.max) else math.inf
