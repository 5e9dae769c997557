"""Attention over a cache by its definition: causal attention, row by row, of what the cache holds.

Row b has ``L = cache_seqlens[b] + T`` tokens, or without new keys ``cache_seqlens[b]``; its last T
positions are those of the queries.  Queries and new keys are rotated at their positions.

What is written and what comes out are judged apart: :func:`written_forward` says what is to be in
the caches, :func:`truth_forward` and :func:`plain_forward` attend over what is there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastlm.ops.reference import attention, rotary

_OP = "attention_with_kv_cache"
# rows and slots of a cache
Places = tuple[Tensor, Tensor]


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
    """out ``(B, T, H, Dv)`` in the dtype of query and lse ``(B, H, T)`` in float32 or float64.

    Without ``cache_seqlens`` every row has ``cache_length`` tokens.  With ``cu_seqlens_q`` the
    queries of the rows stand side by side.

    Raises:
        ValueError: A row does not fit, or boundaries are none; nothing is written.
    """
    sequences = sequences_of(query, cu_seqlens_q)
    new = [0 if key is None else query[at].shape[1] for at in sequences]
    capacity = capacity_of(k_cache, block_table, rotary_cos)
    starts = read_lengths(cache_seqlens, cache_length, new, capacity)
    if block_table is not None:
        for row, (start, count) in enumerate(zip(starts, new, strict=True)):
            read_pages(row, start + count, k_cache, block_table)
    tables = (rotary_cos, rotary_sin, rotary_interleaved)
    if key is not None and value is not None:
        for row, (at, start) in enumerate(zip(sequences, starts, strict=True)):
            place = _places(row, start, new[row], k_cache, block_table)
            k, v = _turned(key[at], start, *tables)[0], value[at][0]
            for cache, scales, x in ((k_cache, k_scale, k), (v_cache, v_scale, v)):
                if scales is None:
                    cache[place] = x
                else:
                    cache[place], scales[place] = quantized(x)
    return _row_by_row(
        attention.forward, query, (k_cache, k_scale), (v_cache, v_scale), sequences, starts, new,
        block_table, *tables, sinks, scale, window_size, softcap,
    )  # fmt: skip


def written_forward(
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
) -> list[tuple[Places, Tensor, Tensor]]:
    """What is new in the caches and scales: where, as eager torch has it, and in float64.

    Of an int8 cache that is before it is rounded to integers.  Rows that do not fit are left out.
    """
    if key is None or value is None:
        nowhere = (torch.empty(0, dtype=torch.int64, device=query.device),) * 2
        written = (x for x in (k_cache, v_cache, k_scale, v_scale) if x is not None)
        return [(nowhere, x[nowhere], x[nowhere].double()) for x in written]
    sequences = sequences_of(query, cu_seqlens_q)
    new = [query[at].shape[1] for at in sequences]
    capacity = capacity_of(k_cache, block_table, rotary_cos)
    starts = _starts(k_cache, cache_seqlens, cache_length, new, capacity, block_table)
    tables = (rotary_cos, rotary_sin, rotary_interleaved)
    # of no rows, should none fit
    places = [_places(0, 0, 0, k_cache, None)]
    keys, values = ([x[:0].flatten(0, 1)] for x in (key, value))
    true_keys = [keys[0].double()]
    for row, (at, start) in enumerate(zip(sequences, starts, strict=True)):
        if start is not None:
            places.append(_places(row, start, new[row], k_cache, block_table))
            keys.append(_turned(key[at], start, *tables)[0])
            true_keys.append(_turned(key[at].double(), start, *tables)[0])
            values.append(value[at][0])
    where = torch.cat([place[0] for place in places]), torch.cat([place[1] for place in places])
    plain = torch.cat(keys), torch.cat(values)
    truth = torch.cat(true_keys), plain[1].double()
    if k_scale is None:
        return [(where, *pair) for pair in zip(plain, truth, strict=True)]
    (k_ratio, k_factor), (v_ratio, v_factor) = (divided(x, torch.float32) for x in plain)
    (true_k, true_k_factor), (true_v, true_v_factor) = (divided(x, torch.float64) for x in truth)
    return [
        (where, k_ratio, true_k),
        (where, v_ratio, true_v),
        (where, k_factor, true_k_factor),
        (where, v_factor, true_v_factor),
    ]


def truth_forward(
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
    """Over caches to which ``key`` and ``value`` are already appended.

    Rotated queries are not rounded.  A row that does not fit is NaN.
    """
    return _of_appended(
        attention.truth_forward, query.double(), (k_cache, k_scale), (v_cache, v_scale), key,
        cache_seqlens, block_table, cu_seqlens_q, rotary_cos, rotary_sin, sinks, cache_length,
        rotary_interleaved, scale, window_size, softcap,
    )  # fmt: skip


def plain_forward(
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
    """The same by torch's rotation and attention in the working dtype."""
    return _of_appended(
        attention.plain_forward, query, (k_cache, k_scale), (v_cache, v_scale), key,
        cache_seqlens, block_table, cu_seqlens_q, rotary_cos, rotary_sin, sinks, cache_length,
        rotary_interleaved, scale, window_size, softcap,
    )  # fmt: skip


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(..., D)`` in int8 and ``(...,)`` float32, whose product is x to within half a scale.

    With w = x in float32, or in float64 if x is: ``scale = max |w| / 127`` along the last
    dimension, and of w / scale the nearest integer, of two the even one, from -127 to 127.  Both
    divisions are rounded to nearest.  Zeros have the scale 0 and are 0; where an element is no
    number, or the scale none in float32, it is NaN, and all integers are 0.
    """
    ratio, scale = divided(x, torch.float32)
    return ratio.round().clamp(-127, 127).to(torch.int8), scale


def divided(x: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(w / scale, scale)`` of :func:`quantized`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = wide.abs().amax(-1)
    # by a tensor: on a GPU a number would be multiplied by as its reciprocal
    scale = (largest / torch.full_like(largest, 127.0)).to(scale_dtype)
    scale = scale.masked_fill(~scale.isfinite(), torch.nan)
    divisor = scale.to(wide.dtype)[..., None]
    return torch.where(divisor > 0, wide / divisor, 0.0), scale


def widened(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What is stored as ``x``, in ``dtype``."""
    if scale is None:
        return x.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return (x.to(wide) * scale.to(wide)[..., None]).to(dtype)


def capacity_of(k_cache: Tensor, block_table: Tensor | None, rotary_cos: Tensor | None) -> int:
    """How many tokens a row can have."""
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    return capacity if rotary_cos is None else min(capacity, rotary_cos.shape[0])


def sequences_of(query: Tensor, cu_seqlens_q: Tensor | None) -> list[tuple[slice, slice]]:
    """Rows and tokens of query that belong to each row of the caches.

    Raises:
        ValueError: Boundaries begin elsewhere than at 0, fall, or end beyond the tokens.
    """
    batch, total = query.shape[:2]
    if cu_seqlens_q is None:
        return [(slice(row, row + 1), slice(0, total)) for row in range(batch)]
    bounds = cu_seqlens_q.tolist()
    if bounds[0] != 0 or bounds[-1] > total or bounds != sorted(bounds):
        raise ValueError(
            f"{_OP}: cu_seqlens_q must rise from 0 to at most {total}, the tokens of query, got "
            f"{bounds}"
        )
    return [(slice(0, 1), slice(*pair)) for pair in itertools.pairwise(bounds)]


def read_lengths(
    cache_seqlens: Tensor | None, cache_length: int, new: Sequence[int], capacity: int
) -> list[int]:
    """The tokens of each row before the append, on the host.

    Raises:
        ValueError: With as many ``new`` as the row gets they do not fit.
    """
    lengths = [cache_length] * len(new) if cache_seqlens is None else cache_seqlens.tolist()
    for length, count in zip(lengths, new, strict=True):
        if not 0 <= length <= capacity - count:
            raise ValueError(
                f"{_OP}: cache_seqlens must be from 0 to {capacity - count}, so that {count} more "
                f"fit in {capacity}, got {lengths}"
            )
    return lengths


def read_pages(row: int, length: int, cache: Tensor, block_table: Tensor) -> list[int]:
    """The pages of the first ``length`` tokens of a row, on the host.

    Raises:
        ValueError: The table names a page that is none.
    """
    count, page_size = cache.shape[:2]
    pages = block_table[row, : -(-length // page_size)].tolist()
    if any(not 0 <= page < count for page in pages):
        raise ValueError(
            f"{_OP}: block_table must name pages from 0 to {count - 1} for the {length} tokens of "
            f"row {row}, got {pages}"
        )
    return pages


def _starts(
    k_cache: Tensor,
    cache_seqlens: Tensor | None,
    cache_length: int,
    new: Sequence[int],
    capacity: int,
    block_table: Tensor | None,
) -> list[int | None]:
    """The tokens of each row before the append; None for a row that does not fit."""
    lengths = [cache_length] * len(new) if cache_seqlens is None else cache_seqlens.tolist()
    starts: list[int | None] = []
    for row, (length, count) in enumerate(zip(lengths, new, strict=True)):
        fits = 0 <= length <= capacity - count
        if fits and block_table is not None:
            pages = block_table[row, : -(-(length + count) // k_cache.shape[1])]
            fits = bool(((pages >= 0) & (pages < len(k_cache))).all())
        starts.append(length if fits else None)
    return starts


def _turned(
    heads: Tensor,
    start: int,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
) -> Tensor:
    """``(1, T, heads, D)`` at the positions from ``start`` on."""
    if rotary_cos is None or rotary_sin is None:
        return heads
    at = slice(start, start + heads.shape[1])
    nothing = heads[:, :, :0]
    return rotary.forward(heads, nothing, rotary_cos[at], rotary_sin[at], rotary_interleaved)[0]


def _places(row: int, start: int, new: int, cache: Tensor, block_table: Tensor | None) -> Places:
    """Where the new tokens of a row stand; both ``(new,)``."""
    positions = torch.arange(start, start + new, device=cache.device)
    if block_table is None:
        return torch.full_like(positions, row), positions
    page_size = cache.shape[1]
    return block_table[row].long()[positions // page_size], positions % page_size


def _of_appended(
    attend: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    keys: tuple[Tensor, Tensor | None],
    values: tuple[Tensor, Tensor | None],
    key: Tensor | None,
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
) -> tuple[Tensor, Tensor]:
    """Of rows that fit; the others are NaN."""
    sequences = sequences_of(query, cu_seqlens_q)
    new = [0 if key is None else query[at].shape[1] for at in sequences]
    capacity = capacity_of(keys[0], block_table, rotary_cos)
    starts = _starts(keys[0], cache_seqlens, cache_length, new, capacity, block_table)
    return _row_by_row(
        attend, query, keys, values, sequences, starts, new, block_table, rotary_cos, rotary_sin,
        rotary_interleaved, sinks, scale, window_size, softcap,
    )  # fmt: skip


def _row_by_row(
    attend: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    keys: tuple[Tensor, Tensor | None],
    values: tuple[Tensor, Tensor | None],
    sequences: Sequence[tuple[slice, slice]],
    starts: Sequence[int | None],
    new: Sequence[int],
    block_table: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    sinks: Tensor | None,
    scale: float,
    window_size: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Over what stands in the caches, each with its scales; 0 for queries of no row."""
    batch, num_queries, heads, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros((batch, num_queries, heads, values[0].shape[-1]))
    lse = query.new_full((batch, heads, num_queries), -torch.inf, dtype=dtype)
    for row, (at, start) in enumerate(zip(sequences, starts, strict=True)):
        rows, tokens = at
        if start is None:
            out[at], lse[rows, :, tokens] = torch.nan, torch.nan
            continue
        q = query[at]
        if new[row]:
            q = _turned(q, start, rotary_cos, rotary_sin, rotary_interleaved)
        length = start + new[row]
        k, v = (_stored(row, length, *x, block_table, q.dtype) for x in (keys, values))
        out[at], lse[rows, :, tokens] = attend(
            q, k, v, sinks, None, None, None, None, scale, window_size, softcap
        )
    return out, lse


def _stored(
    row: int,
    length: int,
    cache: Tensor,
    scale: Tensor | None,
    block_table: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``(1, length, G, D)``, the first tokens of a row."""
    pages = None if block_table is None else read_pages(row, length, cache, block_table)

    def found(x: Tensor) -> Tensor:
        return x[row, :length] if pages is None else x[pages].flatten(0, 1)[:length]

    return widened(found(cache), None if scale is None else found(scale), dtype)[None]


def forward_refuses(*args: object) -> None:
    return None
