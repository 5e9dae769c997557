"""Attention over a cache by torch's own operators.

Where the host knows the lengths, rows of one length are a call of causal attention on a view of the
cache, or on a copy of their pages.  On a GPU the host does not look: all that the cache can hold is
gathered and masked, in float32; for rows whose tokens stand side by side, of every row for all
tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.ops.eager import attention, rotary
from fastlm.ops.eager._written import attend
from fastlm.ops.reference.attention_with_kv_cache import (
    capacity_of,
    quantized,
    read_lengths,
    read_pages,
    sequences_of,
    widened,
)

# Scores of a block of queries that is written out.
_WRITTEN_SCORES = 1 << 19


def forward(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    cache_seqlens: Tensor | None,
    block_table: Tensor | None,
    cu_seqlens_q: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    sinks: Tensor | None,
    cache_length: int,
    rotary_interleaved: bool,
    scale: float,
    window_size: int | None,
    softcap: float | None,
    num_splits: int | None,
) -> tuple[Tensor, Tensor]:
    caches = _Caches(k_cache, v_cache, k_scale, v_scale, block_table)
    capacity = capacity_of(k_cache, block_table, rotary_cos)
    tables = None
    if rotary_cos is not None and rotary_sin is not None:
        tables = _Tables(rotary_cos, rotary_sin, rotary_interleaved)
    options = _Options(sinks, scale, window_size, softcap)
    if cu_seqlens_q is not None and query.is_cpu:
        at = sequences_of(query, cu_seqlens_q)
        return _packed(query, caches, key, value, at, cache_seqlens, cache_length, tables, options)
    if cu_seqlens_q is None and (len(query) == 0 or capacity == 0):
        return _empty(query, v_cache, key is None and cache_seqlens is None)
    is_read = cache_seqlens is None and block_table is None and cu_seqlens_q is None
    if not query.is_cpu and not is_read:
        rows = len(query) if cu_seqlens_q is None else len(cu_seqlens_q) - 1
        if cache_seqlens is None:
            cache_seqlens = torch.full((rows,), cache_length, device=query.device)
        if cu_seqlens_q is not None:
            return _unread_packed(
                query, caches, key, value, cu_seqlens_q, cache_seqlens, capacity, tables, options
            )
        return _unread(query, caches, key, value, cache_seqlens, capacity, tables, options)
    new = [0 if key is None else query.shape[1]] * len(query)
    lengths = caches.read(cache_seqlens, cache_length, new, capacity)
    return _known(query, caches, key, value, lengths, tables, options)


def _empty(query: Tensor, v_cache: Tensor, fits: bool) -> tuple[Tensor, Tensor]:
    """Of no rows, or over caches without room: nothing to see, or rows that do not fit."""
    batch, num_queries, heads, _ = query.shape
    out = query.new_full((batch, num_queries, heads, v_cache.shape[-1]), 0.0 if fits else torch.nan)
    dtype = torch.promote_types(query.dtype, torch.float32)
    lse = -torch.inf if fits else torch.nan
    return out, query.new_full((batch, heads, num_queries), lse, dtype=dtype)


class _Tables(NamedTuple):
    """Cosines and sines of positions."""

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def turned(self, query: Tensor, key: Tensor, at: slice | Tensor) -> tuple[Tensor, Tensor]:
        """``at`` the positions, of all rows or ``(B, T)``."""
        return rotary.forward(query, key, self.cos[at], self.sin[at], self.interleaved)


class _Options(NamedTuple):
    sinks: Tensor | None
    scale: float
    window_size: int | None
    softcap: float | None


@dataclass(frozen=True)
class _Caches:
    """Keys and values, whole or in pages.

    Attributes:
        keys: ``(B, S_max, G, D)`` or ``(pages, page_size, G, D)``.
        values: The same with Dv.
        key_scales: ``(B, S_max, G)`` or ``(pages, page_size, G)`` of int8 caches, else None.
        value_scales: Likewise.
        table: ``(B, max_pages)``, or None for whole ones.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    table: Tensor | None

    def of(self, row: int) -> _Caches:
        """Those of one row."""
        at = slice(row, row + 1)
        if self.table is not None:
            return replace(self, table=self.table[at])
        k_scales, v_scales = (
            None if x is None else x[at] for x in (self.key_scales, self.value_scales)
        )
        return _Caches(self.keys[at], self.values[at], k_scales, v_scales, None)

    def read(
        self, cache_seqlens: Tensor | None, cache_length: int, new: Sequence[int], capacity: int
    ) -> list[int]:
        """The tokens of each row; with as many ``new`` they must fit."""
        lengths = read_lengths(cache_seqlens, cache_length, new, capacity)
        if self.table is not None:
            for row, (length, count) in enumerate(zip(lengths, new, strict=True)):
                read_pages(row, length + count, self.keys, self.table)
        return lengths

    def append(self, rows: slice, start: int, key: Tensor, value: Tensor) -> None:
        """Write the tokens of ``rows`` from position ``start`` on."""
        at: Any = (rows, slice(start, start + key.shape[1]))
        if self.table is not None:
            positions = torch.arange(start, start + key.shape[1], device=key.device)
            at = self._places(self.table[rows], positions.expand(key.shape[:2]))
        for stored, x in self._as_stored(key, value):
            stored[at] = x

    def append_unread(
        self, rows: Tensor, positions: Tensor, fits: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Write every token that ``fits``, at its place in ``rows``; all three are ``(N,)``.

        A token that does not writes what another one writes, or if there is none what is there.
        """
        chosen = torch.arange(len(fits), device=fits.device)
        chosen = torch.where(fits, chosen, fits.int().argmax())
        nothing_fits = ~fits.any()
        rows, positions = rows[chosen], positions[chosen].clamp(0, self.capacity - 1)
        at = rows, positions
        if self.table is not None:
            page_size = self.keys.shape[1]
            pages = self.table[rows, positions // page_size].long()
            at = pages.clamp(0, len(self.keys) - 1), positions % page_size
        for stored, x in self._as_stored(key, value):
            stored[at] = torch.where(nothing_fits, stored[at], x[chosen])

    def stored(self, rows: slice, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The first tokens of ``rows``, ``(rows, length, G, D)`` and with Dv, in ``dtype``."""
        pages = None
        if self.table is not None:
            pages = self.table[rows, : -(-length // self.keys.shape[1])].long()
            pages = pages.clamp(0, len(self.keys) - 1)

        def found(x: Tensor) -> Tensor:
            return x[rows, :length] if pages is None else x[pages].flatten(1, 2)[:, :length]

        k, v = (
            widened(found(x), None if scales is None else found(scales), dtype)
            for x, scales in ((self.keys, self.key_scales), (self.values, self.value_scales))
        )
        return k, v

    def hold(self, cache_seqlens: Tensor, new: int | Tensor, capacity: int) -> Tensor:
        """``(B,)``: whether a row's length, and its pages, are any; with ``new`` more tokens."""
        fits = (cache_seqlens >= 0) & (cache_seqlens <= capacity - new)
        if self.table is not None:
            pages = torch.arange(self.table.shape[1], device=fits.device)
            needed = pages * self.keys.shape[1] < (cache_seqlens + new)[:, None]
            exists = (self.table >= 0) & (self.table < len(self.keys))
            fits &= (exists | ~needed).all(1)
        return fits

    def _as_stored(self, key: Tensor, value: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What is written, and what of ``(B, T, G, D)`` into it."""
        if self.key_scales is None or self.value_scales is None:
            return [(self.keys, key), (self.values, value)]
        (k, k_scales), (v, v_scales) = quantized(key), quantized(value)
        scales = [(self.key_scales, k_scales), (self.value_scales, v_scales)]
        return [(self.keys, k), (self.values, v), *scales]

    @property
    def capacity(self) -> int:
        return self.keys.shape[1] * (1 if self.table is None else self.table.shape[1])

    def _places(self, table: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        page_size = self.keys.shape[1]
        return table.long().gather(1, positions // page_size), positions % page_size


def _packed(
    query: Tensor,
    caches: _Caches,
    key: Tensor | None,
    value: Tensor | None,
    sequences: Sequence[tuple[slice, slice]],
    cache_seqlens: Tensor | None,
    cache_length: int,
    tables: _Tables | None,
    options: _Options,
) -> tuple[Tensor, Tensor]:
    """Rows whose tokens stand side by side, one by one."""
    new = [0 if key is None else query[at].shape[1] for at in sequences]
    capacity = caches.capacity if tables is None else min(caches.capacity, len(tables.cos))
    lengths = caches.read(cache_seqlens, cache_length, new, capacity)
    _, total, heads, _ = query.shape
    out = query.new_zeros((1, total, heads, caches.values.shape[-1]))
    dtype = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_full((1, heads, total), -torch.inf, dtype=dtype)
    for row, (at, length) in enumerate(zip(sequences, lengths, strict=True)):
        k, v = (None if x is None else x[at] for x in (key, value))
        out[at], lse[:, :, at[1]] = _known(
            query[at], caches.of(row), k, v, [length], tables, options
        )
    return out, lse


def _known(
    query: Tensor,
    caches: _Caches,
    key: Tensor | None,
    value: Tensor | None,
    lengths: list[int],
    tables: _Tables | None,
    options: _Options,
) -> tuple[Tensor, Tensor]:
    """Rows of one length that follow each other are one call."""
    outs, lses, row = [], [], 0
    runs = [(length, len(list(run))) for length, run in itertools.groupby(lengths)]
    for length, count in runs or [(0, 0)]:
        rows = slice(row, row + count)
        row += count
        q = query[rows]
        if key is not None and value is not None:
            k = key[rows]
            end = length + q.shape[1]
            if tables is not None:
                q, k = tables.turned(q, k, slice(length, end))
            caches.append(rows, length, k, value[rows])
            length = end
        k, v = caches.stored(rows, length, q.dtype)
        out, lse = attention.forward(
            q, k, v, options.sinks, None, None, None, None,
            options.scale, options.window_size, options.softcap,
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
    return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs), torch.cat(lses))


def _unread(
    query: Tensor,
    caches: _Caches,
    key: Tensor | None,
    value: Tensor | None,
    cache_seqlens: Tensor,
    capacity: int,
    tables: _Tables | None,
    options: _Options,
) -> tuple[Tensor, Tensor]:
    """Lengths stay on the device; a row that does not fit gives NaN."""
    batch, num_queries = query.shape[:2]
    lengths, new = cache_seqlens.long(), 0 if key is None else num_queries
    fits = caches.hold(lengths, new, capacity)
    tokens = torch.arange(num_queries, device=query.device)
    if key is not None and value is not None:
        positions = lengths[:, None] + tokens
        if tables is not None:
            query, key = tables.turned(query, key, positions.clamp(0, len(tables.cos) - 1))
        rows = torch.arange(batch, device=query.device)
        at = (x[:, None].expand_as(positions).flatten() for x in (rows, fits))
        row_of, fit = at
        caches.append_unread(
            row_of, positions.flatten(), fit, key.flatten(0, 1), value.flatten(0, 1)
        )
    lengths = (lengths + new).masked_fill(~fits, 0)
    # the key that each query is aligned with
    last = tokens + (lengths[:, None] - num_queries)
    out, lse = _masked(query, caches, lengths, last, options)
    unfit = ~fits[:, None, None]
    out = out.masked_fill(unfit[..., None], torch.nan).to(query.dtype).contiguous()
    return out, lse.masked_fill(unfit, torch.nan)


def _unread_packed(
    query: Tensor,
    caches: _Caches,
    key: Tensor | None,
    value: Tensor | None,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
    capacity: int,
    tables: _Tables | None,
    options: _Options,
) -> tuple[Tensor, Tensor]:
    """Counts stay on the device too: all tokens are queries of every row, and those of one stay."""
    _, total, heads, _ = query.shape
    bounds = cu_seqlens_q.long().clamp(0, total)
    first = bounds[:-1]
    count = (bounds[1:] - first).clamp(min=0)
    lengths, new = cache_seqlens.long(), count if key is not None else torch.zeros_like(count)
    fits = caches.hold(lengths, new, capacity)
    tokens = torch.arange(total, device=query.device)
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros((1, total, heads, caches.values.shape[-1]), dtype=dtype)
    lse = query.new_full((1, heads, total), -torch.inf, dtype=dtype)
    if len(count) == 0:
        return out.to(query.dtype), lse
    seeing = range(len(count) if caches.capacity else 0)
    # (rows, N): which tokens are whose
    own = (tokens >= first[:, None]) & (tokens < (first + count)[:, None])
    has_row, row_of = own.any(0), own.int().argmax(0)
    positions = (lengths + new - count - first)[row_of] + tokens
    if key is not None and value is not None and capacity > 0:
        if tables is not None:
            places = positions[None].clamp(0, len(tables.cos) - 1)
            query, key = tables.turned(query, key, places)
        caches.append_unread(row_of, positions, has_row & fits[row_of], key[0], value[0])
    lengths = (lengths + new).masked_fill(~fits, 0)
    for row in seeing:
        is_own, at = own[row], slice(row, row + 1)
        last = positions.masked_fill(~(is_own & fits[row]), -1)[None]
        attended, found = _masked(query, caches.of(row), lengths[at], last, options)
        out = torch.where(is_own[:, None, None], attended, out)
        lse = torch.where(is_own, found, lse)
    unfit = has_row & ~fits[row_of]
    out = out.masked_fill(unfit[:, None, None], torch.nan).to(query.dtype).contiguous()
    return out, lse.masked_fill(unfit, torch.nan)


def _masked(
    query: Tensor,
    caches: _Caches,
    lengths: Tensor,
    last: Tensor,
    options: _Options,
) -> tuple[Tensor, Tensor]:
    """Over all that the caches can hold, of which each query sees the keys to its ``last``.

    ``last`` is ``(B, T)``, below the ``lengths`` ``(B,)``; computed in float32.
    """
    batch, num_queries, heads, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    k, v = caches.stored(slice(0, batch), caches.capacity, dtype)
    keys = torch.arange(caches.capacity, device=query.device)
    # what lies behind may be NaN, and 0 * NaN is too
    v = v.masked_fill((keys >= lengths[:, None])[..., None, None], 0.0)
    q, k, v = (x.transpose(1, 2) for x in (query.to(dtype), k, v))
    window = options.window_size
    first = torch.zeros_like(last) if window is None else last + 1 - window
    step = max(1, _WRITTEN_SCORES // max(1, batch * heads * caches.capacity))
    outs, lses = [], []
    for start in range(0, num_queries, step):
        at = slice(start, start + step)
        seen = (keys <= last[:, at, None]) & (keys >= first[:, at, None])
        out, lse = attend(q[:, :, at], k, v, options.scale, options.softcap, seen[:, None])
        outs.append(out)
        lses.append(lse)
    out, lse = torch.cat(outs, 2).transpose(1, 2), torch.cat(lses, 2)
    return (out, lse) if options.sinks is None else attention.with_sinks(out, lse, options.sinks)


def forward_refuses(*args: object) -> str | None:
    return None
