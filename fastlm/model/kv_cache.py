"""Keys and values of the tokens a model has seen, in memory allocated once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from fastlm.ops.attention import causal_attention
from fastlm.ops.attention_with_kv_cache import attention_with_kv_cache
from fastlm.ops.rotary import apply_rotary


class Context(Protocol):
    """What a model's blocks ask of the tokens that came before: a cache, or prompts for one."""

    def positions(self, tokens: int) -> Tensor:
        """Of the new tokens, ``(T,)`` or ``(B, T)`` int64, from 0 at the start of a sequence."""

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
        """Rotate, store the new keys and values of ``layer``, attend over all: ``(B, T, H, D)``.

        ``rotary`` has the tables of all positions; None where positions are not rotated.
        """

    def advance(self, tokens: int) -> None:
        """Count tokens that every layer has stored."""


class KVCache:
    """Room for ``max_length`` tokens of ``batch`` sequences in every layer.

    Sequences may have different lengths.  The host knows them all, so that what does not fit is
    refused before anything is written; the device has them too, and kernels read them there.
    Memory behind a sequence's length is never read.

    Attributes:
        keys: ``(layers, B, max_length, G, D)``, of the model's dtype or int8.
        values: Same shape and dtype.
        scales: Of int8, those of keys and of values, ``(layers, B, max_length, G)`` float32; else
            both None.
        lengths: Tokens stored so far, of each sequence.
        seqlens: The same on the device, ``(B,)`` int32.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        max_length: int,
        *,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, batch, max_length, num_kv_heads, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.scales = new_scales(self.keys)
        self.lengths = [0] * batch
        self.seqlens = torch.zeros(batch, dtype=torch.int32, device=device)

    @property
    def _stored(self) -> tuple[Tensor, ...]:
        return self.keys, self.values, *(x for x in self.scales if x is not None)

    @property
    def device(self) -> torch.device:
        return self.keys.device

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def max_length(self) -> int:
        return self.keys.shape[2]

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths, default=0)

    def check_room(self, batch: int, tokens: int | Sequence[int]) -> None:
        """Refuse tokens that do not fit, before anything is written.

        Args:
            batch: Number of sequences.
            tokens: How many more of each, or one number for all.

        Raises:
            ValueError: The batch differs, or the cache is too short.
        """
        if batch != self.batch:
            raise ValueError(f"KVCache: input must have batch {self.batch}, got {batch}")
        more = [tokens] * batch if isinstance(tokens, int) else tokens
        for length, count in zip(self.lengths, more, strict=True):
            if length + count > self.max_length:
                raise ValueError(
                    f"KVCache: input must fit in the {self.max_length - length} of "
                    f"{self.max_length} tokens that are free, got {count}"
                )

    def positions(self, tokens: int) -> Tensor:
        return following(self.seqlens, self.lengths, tokens)

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
        """Rotate, store, attend: ``(B, T, H, D)``; a cache's first tokens by the training kernel.

        Lengths change only with :meth:`advance`, once every layer has stored its part.
        """
        keys, values = self.keys[layer], self.values[layer]
        cos, sin = rotary if rotary is not None else (None, None)
        tokens = query.shape[1]
        k_scale, v_scale = (None if x is None else x[layer] for x in self.scales)
        if self.length == 0 and tokens > 1 and k_scale is None:
            if cos is not None and sin is not None:
                query, key = apply_rotary(query, key, cos[:tokens], sin[:tokens])
            keys[:, :tokens], values[:, :tokens] = key, value
            return cast(Tensor, causal_attention(query, key, value, window_size=window_size))
        out = attention_with_kv_cache(
            query, keys, values, key=key, value=value, cache_seqlens=self._known_lengths(),
            k_scale=k_scale, v_scale=v_scale,
            rotary_cos=cos, rotary_sin=sin, window_size=window_size,
        )  # fmt: skip
        return cast(Tensor, out)

    def _known_lengths(self) -> int | Tensor:
        """One number for all on a CPU, where that is faster; a CUDA graph must find them there."""
        alike = self.keys.is_cpu and len(set(self.lengths)) == 1
        return self.lengths[0] if alike else self.seqlens

    def store(
        self, layer: int, rows: Tensor, positions: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Write ``(N, G, D)`` keys and values, each at its row and position, ``(N,)`` int64.

        Not into an int8 cache: only attention rounds to it.
        """
        self.keys[layer, rows, positions] = key
        self.values[layer, rows, positions] = value

    def advance(self, tokens: int | Sequence[int]) -> None:
        """Count tokens that every layer has stored: as many of each row, or a number for each."""
        if isinstance(tokens, int):
            self.lengths = [length + tokens for length in self.lengths]
            # on the device, so that a CUDA graph counts too
            self.seqlens.add_(tokens)
        else:
            self.set_lengths([n + more for n, more in zip(self.lengths, tokens, strict=True)])

    def reset(self, length: int = 0) -> None:
        """Forget the tokens from ``length`` on, of every sequence.

        Raises:
            ValueError: A sequence has fewer.
        """
        shortest = min(self.lengths, default=0)
        if not 0 <= length <= shortest:
            raise ValueError(f"KVCache: length must be in [0, {shortest}], got {length}")
        self.set_lengths([length] * self.batch)

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Say how many tokens of each sequence are kept or have been stored.

        Raises:
            ValueError: Not one for each sequence, or one that the cache does not have.
        """
        if len(lengths) != self.batch or not all(0 <= n <= self.max_length for n in lengths):
            raise ValueError(
                f"KVCache: lengths must be {self.batch} numbers from 0 to {self.max_length}, "
                f"got {list(lengths)}"
            )
        self.lengths = list(lengths)
        self.seqlens.copy_(torch.tensor(self.lengths, dtype=torch.int32))

    def part(self, start: int, end: int) -> KVCache:
        """The sequences from ``start`` to ``end`` as a cache of their own, in the same memory."""
        part, rows = copy.copy(self), slice(start, end)
        part.keys, part.values = self.keys[:, rows], self.values[:, rows]
        part.scales = tuple(None if x is None else x[:, rows] for x in self.scales)
        part.lengths, part.seqlens = self.lengths[rows], self.seqlens[rows]
        return part

    def spread(self, sources: Sequence[int], lengths: Sequence[int]) -> None:
        """Make row b a copy of row ``sources[b]``, at most b, which has ``lengths[sources[b]]``."""
        for row in reversed(range(len(sources))):
            source = sources[row]
            if source != row:
                for cache in self._stored:
                    cache[:, row, : lengths[source]] = cache[:, source, : lengths[source]]
        self.set_lengths([lengths[source] for source in sources])

    def keep(self, rows: Sequence[int]) -> None:
        """Keep the sequences ``rows``, in this order; the others leave, and their memory waits.

        A sequence moves only where its place changes.

        Raises:
            ValueError: A row is not there, or given twice.
        """
        if len(set(rows)) != len(rows) or not all(0 <= row < self.batch for row in rows):
            raise ValueError(
                f"KVCache: rows must be different ones below {self.batch}, got {list(rows)}"
            )
        moved = [(to, row) for to, row in enumerate(rows) if to != row]
        if moved:
            targets, sources = zip(*moved, strict=True)
            longest = max(self.lengths[row] for row in sources)
            for cache in self._stored:
                # a copy of the rows that move, of a layer at a time
                for layer in cache:
                    layer[list(targets), :longest] = layer[list(sources), :longest]
        lengths = [self.lengths[row] for row in rows]
        vars(self).update(vars(self.part(0, len(rows))))
        self.set_lengths(lengths)


def new_scales(cache: Tensor) -> tuple[Tensor | None, ...]:
    """Room for the scales of keys and of values, a number for each of their rows, if int8."""
    if cache.dtype != torch.int8:
        return None, None
    k_scale, v_scale = (
        torch.empty(cache.shape[:-1], dtype=torch.float32, device=cache.device) for _ in range(2)
    )
    return k_scale, v_scale


def following(seqlens: Tensor, lengths: Sequence[int], tokens: int) -> Tensor:
    """Positions of ``tokens`` more after each sequence: ``(T,)`` where all are alike on a CPU."""
    if seqlens.is_cpu and len(set(lengths)) == 1:
        return torch.arange(lengths[0], lengths[0] + tokens)
    return seqlens[:, None].long() + torch.arange(tokens, device=seqlens.device)
