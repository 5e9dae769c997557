"""Attention of a few tokens of every sequence over a cache, from memory to memory, on a CPU."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.model.kv_cache import KVCache
from fastlm.model.paged_kv_cache import PagedRows
from fastlm.model.products import Call


class Attention(Protocol):
    """Of heads of queries, keys and values side by side, ``(B, T, H + 2 G, D)``, a layer at a time.

    What is in their memory is read, rotated and stored, and ``(B, T, H, D)`` is written.
    """

    def begin(self) -> None:
        """Of the tokens after those in the cache."""

    def __call__(self, layer: int) -> None:
        """Of one layer."""


class CacheAttention:
    """As the cache does it: any number of tokens, any cache.

    Args:
        cache: Of the model.
        heads: ``(B, T, H + 2 G, D)``, read.
        attended: ``(B, T, H, D)``, written.
        windows: How many of the latest keys the queries of each layer see; None for all.
        tables: Cosines and sines of all positions, or None.
    """

    def __init__(
        self,
        cache: KVCache | PagedRows,
        heads: Tensor,
        attended: Tensor,
        windows: Sequence[int | None],
        tables: tuple[Tensor, Tensor] | None,
    ) -> None:
        self._cache, self._attended, self._windows = cache, attended, windows
        self._heads, self._tables = _parts(heads, attended), tables

    def begin(self) -> None:
        pass

    def __call__(self, layer: int) -> None:
        query, key, value = self._heads
        window = self._windows[layer]
        out = self._cache.attend(layer, query, key, value, window, rotary=self._tables)
        self._attended.copy_(out)


class _Turning:
    """Rotation of queries and keys side by side, ``(N, H + G, D)``, to other memory, ``out``."""

    def __init__(self, heads: Tensor, tables: tuple[Tensor, Tensor]) -> None:
        count, total, width = heads.shape
        self.out = torch.empty_like(heads, memory_format=torch.contiguous_format)
        # cosines, sines and what is less than nothing by them, of each token
        self._tables, self._angles = tables, heads.new_empty(3, count, 1, width // 2)
        cos, sin, minus_sin = self._angles
        low, high = heads.chunk(2, dim=-1)
        out_low, out_high = self.out.chunk(2, dim=-1)
        both = (count, total, 2, width // 2)
        self._calls: list[Call] = [
            partial(torch.mul, heads.view(both), cos[:, :, None], out=self.out.view(both)),
            partial(out_low.addcmul_, high, minus_sin),
            partial(out_high.addcmul_, low, sin),
        ]

    def place(self, positions: Tensor) -> None:
        """Say where the tokens stand, ``(N,)`` of whole numbers."""
        cos, sin, minus_sin = self._angles
        for angles, table in zip((cos, sin), self._tables, strict=True):
            angles.copy_(table.index_select(0, positions)[:, None])
        torch.neg(sin, out=minus_sin)

    def __call__(self) -> None:
        for call in self._calls:
            call()


class DirectAttention:
    """Of one token of every sequence; those of one length are one call of torch's attention.

    A sequence alone is two products and a softmax instead, which are about as fast over a long
    cache and cost fewer calls over a short one.

    Takes the arguments of :class:`CacheAttention`, T = 1, and of caches those that hold floats.
    """

    def __init__(
        self,
        cache: KVCache,
        heads: Tensor,
        attended: Tensor,
        windows: Sequence[int | None],
        tables: tuple[Tensor, Tensor] | None,
    ) -> None:
        self._cache, self._windows = cache, windows
        self._query, self._key, self._value = (x[:, 0] for x in _parts(heads, attended))
        # (B, H, 1, D), as torch has them
        self._attended = attended.transpose(1, 2)
        self._is_grouped = self._query.shape[1] > self._key.shape[1]
        self._turn: _Turning | None = None
        if tables is not None:
            sizes = self._query.shape[1], self._key.shape[1]
            self._turn = _Turning(heads[:, 0, : sum(sizes)], tables)
            self._query, self._key = self._turn.out.split(sizes, dim=1)

    def begin(self) -> None:
        cache = self._cache
        if self._turn is not None:
            self._turn.place(cache.seqlens)
        self._runs = list[_Run]()
        row = 0
        for length, run in itertools.groupby(cache.lengths):
            rows = slice(row, row + len(list(run)))
            row = rows.stop
            self._runs.append(self._run(rows, length))

    def _run(self, rows: slice, length: int) -> _Run:
        """Sequences of one length, whose views of all layers are made at once."""
        stored = [cache[:, rows] for cache in (self._cache.keys, self._cache.values)]
        seen = {
            window: [
                x[:, :, 0 if window is None else max(0, length + 1 - window) : length + 1]
                .transpose(2, 3)
                .unbind(0)
                for x in stored
            ]
            for window in set(self._windows)
        }
        keys, values = (x[:, :, length].unbind(0) for x in stored)
        return _Run(
            query=self._query[rows, :, None], key=self._key[rows], value=self._value[rows],
            out=self._attended[rows], keys=keys, values=values, seen=seen,
        )  # fmt: skip

    def __call__(self, layer: int) -> None:
        if self._turn is not None:
            self._turn()
        window = self._windows[layer]
        for query, key, value, out, keys, values, seen in self._runs:
            keys[layer].copy_(key)
            values[layer].copy_(value)
            all_keys, all_values = (x[layer] for x in seen[window])
            if len(query) == 1:
                _attend_alone(query[0], all_keys[0], all_values[0], out[0])
                continue
            out.copy_(
                F.scaled_dot_product_attention(
                    query, all_keys, all_values, enable_gqa=self._is_grouped
                )
            )


def _attend_alone(query: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
    """A query ``(H, 1, D)`` over ``(G, S, D)``, whose rows in memory are those of tokens."""
    groups, _, width = keys.shape
    scores = torch.baddbmm(
        query.new_empty(()), query.view(groups, -1, width), keys.mT,
        beta=0, alpha=1 / math.sqrt(width),
    )  # fmt: skip
    torch.bmm(scores.softmax(dim=-1), values, out=out.view(groups, -1, width))


class PromptAttention:
    """By torch's, of the first tokens of every sequence of an empty cache, without windows.

    Takes the arguments of :class:`CacheAttention` but the windows, and of caches those that hold
    floats.
    """

    def __init__(
        self,
        cache: KVCache,
        heads: Tensor,
        attended: Tensor,
        tables: tuple[Tensor, Tensor] | None,
    ) -> None:
        self._query, self._key, self._value = _parts(heads, attended)
        # (B, H, T, D), as torch has them
        self._attended = attended.transpose(1, 2)
        batch, tokens = heads.shape[:2]
        self._stored = [x[:, :, :tokens] for x in (cache.keys, cache.values)]
        self._turn: _Turning | None = None
        if tables is not None:
            sizes = self._query.shape[2], self._key.shape[2]
            self._turn = _Turning(heads[:, :, : sum(sizes)].flatten(0, 1), tables)
            self._turn.place(torch.arange(tokens).repeat(batch))
            turned = self._turn.out.unflatten(0, (batch, tokens))
            self._query, self._key = turned.split(sizes, dim=2)

    def begin(self) -> None:
        pass

    def __call__(self, layer: int) -> None:
        if self._turn is not None:
            self._turn()
        for stored, new in zip(self._stored, (self._key, self._value), strict=True):
            stored[layer].copy_(new)
        query, key, value = (x.transpose(1, 2) for x in (self._query, self._key, self._value))
        is_grouped = query.shape[1] > key.shape[1]
        self._attended.copy_(
            F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=is_grouped)
        )


class _Run(NamedTuple):
    """n sequences of one length that follow each other."""

    # what is new of them, (n, H, 1, D) and (n, G, D), and where attention goes, (n, H, 1, D)
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    # of each layer, where they are stored, (n, G, D)
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    # by window, of each layer keys and values, (n, G, S, D)
    seen: dict[int | None, list[tuple[Tensor, ...]]]


def _parts(heads: Tensor, attended: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values."""
    num_heads = attended.shape[2]
    kv_heads = (heads.shape[2] - num_heads) // 2
    query, key, value = heads.split((num_heads, kv_heads, kv_heads), dim=2)
    return query, key, value
