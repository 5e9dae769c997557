"""Attention of a few tokens of every sequence over a cache, from memory to memory, on a CPU."""

from __future__ import annotations

import itertools
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


class DirectAttention:
    """By torch's, of one token of every sequence; sequences of one length are one call.

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
        self._cache, self._windows, self._tables = cache, windows, tables
        self._query, self._key, self._value = (x[:, 0] for x in _parts(heads, attended))
        # (B, H, 1, D), as torch has them
        self._attended = attended.transpose(1, 2)
        self._is_grouped = self._query.shape[1] > self._key.shape[1]
        self._turn = list[Call]()
        if tables is not None:
            self._turn = self._turning(heads[:, 0, : -self._key.shape[1]])

    def _turning(self, heads: Tensor) -> list[Call]:
        """Calls that rotate queries and keys side by side, ``(B, H + G, D)``, to other memory."""
        batch, total, width = heads.shape
        turned = torch.empty_like(heads, memory_format=torch.contiguous_format)
        self._query, self._key = turned.split((self._query.shape[1], self._key.shape[1]), dim=1)
        # cosines, sines and what is less than nothing by them, of each sequence
        self._angles = heads.new_empty(3, batch, 1, width // 2)
        cos, sin, minus_sin = self._angles
        low, high = heads.chunk(2, dim=-1)
        turned_low, turned_high = turned.chunk(2, dim=-1)
        both = (batch, total, 2, width // 2)
        return [
            partial(torch.mul, heads.view(both), cos[:, :, None], out=turned.view(both)),
            partial(turned_low.addcmul_, high, minus_sin),
            partial(turned_high.addcmul_, low, sin),
        ]

    def begin(self) -> None:
        cache = self._cache
        if self._tables is not None:
            cos, sin, minus_sin = self._angles
            for angles, table in zip((cos, sin), self._tables, strict=True):
                angles.copy_(table.index_select(0, cache.seqlens)[:, None])
            torch.neg(sin, out=minus_sin)
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
        for call in self._turn:
            call()
        window = self._windows[layer]
        for query, key, value, out, keys, values, seen in self._runs:
            keys[layer].copy_(key)
            values[layer].copy_(value)
            all_keys, all_values = seen[window]
            out.copy_(
                F.scaled_dot_product_attention(
                    query, all_keys[layer], all_values[layer], enable_gqa=self._is_grouped
                )
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
