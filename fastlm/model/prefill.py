"""Prompts of any lengths into a cache, in one pass without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from fastlm.model.kv_cache import KVCache
from fastlm.model.paged_kv_cache import PagedRows
from fastlm.ops.attention import causal_attention
from fastlm.ops.rotary import apply_rotary

if TYPE_CHECKING:
    from fastlm.model.transformer import CausalLM

# Read in one pass, which bounds the memory of what layers compute.  An int8 cache takes a prompt at
# a time, since it is attention that rounds to it.
_MOST_TOKENS = 16_384


class PackedPrompts:
    """Prompts one behind the other, on their way into an empty cache.

    Blocks see one sequence, ``(1, N)``, of which the training kernel keeps the prompts apart.
    """

    def __init__(self, cache: KVCache | PagedRows, lengths: Sequence[int]) -> None:
        self._cache = cache
        self._lengths = list(lengths)
        counts = torch.tensor(self._lengths)
        ends = counts.cumsum(0)
        rows = torch.arange(len(self._lengths)).repeat_interleave(counts)
        positions = torch.arange(len(rows)) - (ends - counts)[rows]
        device = cache.device
        self.last = (ends - 1).to(device)
        self._rows, self._positions = rows.to(device), positions.to(device)
        self._cu_seqlens = torch.cat((ends.new_zeros(1), ends)).int().to(device)

    def positions(self, tokens: int) -> Tensor:
        return self._positions

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window_size: int | None,
        *,
        rotary: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Rotate, store, attend each to its prompt: ``(1, N, H, D)``."""
        if rotary is not None:
            cos, sin = rotary
            query, key = apply_rotary(query, key, cos[self._positions], sin[self._positions])
        self._cache.store(layer, self._rows, self._positions, key[0], value[0])
        out = causal_attention(
            query, key, value, window_size=window_size,
            cu_seqlens_q=self._cu_seqlens, cu_seqlens_k=self._cu_seqlens,
        )  # fmt: skip
        return cast(Tensor, out)

    def advance(self, tokens: int) -> None:
        self._cache.advance(self._lengths)


@torch.no_grad()
def prefill(
    model: CausalLM, prompts: Sequence[Sequence[int]], cache: KVCache | PagedRows
) -> Tensor:
    """Store prompts in an empty cache; logits ``(B, V)`` of what follows each.

    Args:
        model: Whose cache it is.
        prompts: Token ids of each row, one or more.
        cache: Without tokens, with a row for each prompt.

    Raises:
        ValueError: A prompt is empty, the cache is not, or has no room for them.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not all(lengths):
        raise ValueError("prefill: prompts must have at least one token each, got none")
    if any(cache.lengths):
        raise ValueError(f"prefill: cache must be empty, got lengths {cache.lengths}")
    cache.check_room(len(prompts), lengths)
    groups = _groups(lengths, 0 if cache.scales[0] is not None else _MOST_TOKENS)
    logits = [_stored(model, prompts[start:end], cache.part(start, end)) for start, end in groups]
    if isinstance(cache, KVCache):
        # a part of it has lengths of its own
        cache.set_lengths(lengths)
    return torch.cat(logits)


def _groups(lengths: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Where prompts that are read together begin and end: of at most ``most`` tokens, or one."""
    groups, start, total = [], 0, 0
    for row, length in enumerate(lengths):
        if row > start and total + length > most:
            groups.append((start, row))
            start, total = row, 0
        total += length
    return [*groups, (start, len(lengths))]


def _stored(
    model: CausalLM, prompts: Sequence[Sequence[int]], cache: KVCache | PagedRows
) -> Tensor:
    lengths = [len(prompt) for prompt in prompts]
    if len(set(lengths)) == 1:
        ids = torch.tensor([list(prompt) for prompt in prompts], device=cache.device)
        return model(ids, cache=cache, logits_to_keep=1).logits[:, -1]
    cache.check_room(len(prompts), lengths)
    packed = PackedPrompts(cache, lengths)
    ids = torch.tensor([[token for prompt in prompts for token in prompt]], device=cache.device)
    hidden = model.model(ids, packed)
    return cast(Tensor, model.lm_head(hidden[0, packed.last]))
