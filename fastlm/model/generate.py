"""The decoding loop: one pass over the prompt, then one token at a time over a cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastlm._errors import ArgumentError
from fastlm.model.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from fastlm.model.transformer import CausalLM


def generate(
    model: CausalLM,
    input_ids: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator | None,
    eos_token_ids: tuple[int, ...],
    pad_token_id: int,
) -> Tensor:
    """``(B, T)`` to ``(B, T + new)``; rows that have ended are filled up with ``pad_token_id``."""
    ids = [input_ids]
    ended = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    eos = torch.tensor(eos_token_ids, dtype=input_ids.dtype, device=input_ids.device)
    for tokens, _ in decode(model, input_ids, max_new_tokens, sampling, generator):
        tokens = tokens.masked_fill(ended, pad_token_id)
        ids.append(tokens[:, None])
        if eos_token_ids:
            ended |= torch.isin(tokens, eos)
            if ended.all():
                break
    return torch.cat(ids, dim=1)


@torch.inference_mode()
def decode(
    model: CausalLM,
    input_ids: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the next tokens ``(B,)`` and the logits ``(B, V)`` they were drawn from.

    Ends after ``max_new_tokens``, or when prompt and continuation fill the context.

    Raises:
        ArgumentError: As :func:`new_tokens`.
        FloatingPointError: The model's logits are not finite.
    """
    batch, length = input_ids.shape
    count = new_tokens(model, length, max_new_tokens)
    if count == 0:
        return
    # the last token is never fed back
    cache = model.new_cache(batch, length + count - 1)
    logits = model(input_ids, cache=cache, logits_to_keep=1).logits
    device = logits.device
    generator = torch.Generator(device) if generator is None else generator
    seeds = torch.randint(2**62, (batch,), generator=generator, device=device).tolist()
    size = logits.shape[-1]
    sampler = Sampler([sampling] * batch, seeds, vocab_size=size, max_draws=count, device=device)
    steps = torch.zeros(batch, dtype=torch.int64, device=device)
    for left in reversed(range(count)):
        tokens = sampler.draw(logits[:, -1], steps).to(input_ids.dtype)
        if (tokens < 0).any():
            raise FloatingPointError("generate: the model's logits are not finite")
        steps += 1
        yield tokens, logits[:, -1]
        if left:
            logits = model(tokens[:, None], cache=cache).logits


def new_tokens(model: CausalLM, length: int, max_new_tokens: int) -> int:
    """How many tokens may follow a prompt of ``length``.

    Raises:
        ArgumentError: The prompt is empty or longer than the context, or ``max_new_tokens`` is no
            whole number or negative.
    """
    context = model.config.max_position_embeddings
    check_prompt("generate", length, context)
    whole = isinstance(max_new_tokens, int) and max_new_tokens >= 0
    if not whole:
        raise ArgumentError(
            f"generate: max_new_tokens must be a whole number of at least 0, got {max_new_tokens}"
        )
    return min(max_new_tokens, context - length)


def check_prompt(caller: str, length: int, context: int) -> None:
    """Refuse a prompt of no tokens, or of more than the context has.

    Raises:
        ArgumentError: It is; the message begins with ``caller``.
    """
    if length == 0:
        raise ArgumentError(f"{caller}: prompt must have at least one token, got none")
    if length > context:
        raise ArgumentError(
            f"{caller}: prompt must fit in the context of {context} tokens, got {length}"
        )
