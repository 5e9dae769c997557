"""Attention over a cache by its definition: causal attention, row by row, of what the cache holds.

Row b has ``L = cache_seqlens[b] + T`` tokens, or without new keys ``cache_seqlens[b]``; its last T
positions are those of the queries.  Queries and new keys are rotated at their positions.

What is written and what comes out are judged apart: :func:`written_forward` says what is to be in
the caches, :func:`truth_forward` and :func:`plain_forward` attend over what is there.
"""

from __future__ import annotations

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

    Without ``cache_seqlens`` every row has ``cache_length`` tokens.

    Raises:
        ValueError: A row does not fit; nothing is written.
    """
    new = 0 if key is None else query.shape[1]
    capacity = capacity_of(k_cache, block_table, rotary_cos)
    starts = read_lengths(cache_seqlens, cache_length, len(query), new, capacity)
    if block_table is not None:
        for row, start in enumerate(starts):
            read_pages(row, start + new, k_cache, block_table)
    if key is not None and value is not None:
        rows = torch.arange(len(query), device=query.device)
        tables = (rotary_cos, rotary_sin, rotary_interleaved)
        at = _places(rows, starts, new, k_cache, block_table)
        key = _turned(key, starts, *tables)
        for cache, scales, x in ((k_cache, k_scale, key), (v_cache, v_scale, value)):
            if scales is None:
                cache[at] = x
            else:
                cache[at], scales[at] = quantized(x)
    return _row_by_row(
        attention.forward, query, (k_cache, k_scale), (v_cache, v_scale), starts, new, block_table,
        rotary_cos, rotary_sin, sinks, rotary_interleaved, scale, window_size, softcap,
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
    new = query.shape[1]
    found = _starts(query, k_cache, key, cache_seqlens, block_table, rotary_cos, cache_length)
    fitting = [row for row, start in enumerate(found) if start is not None]
    starts = [start for start in found if start is not None]
    rows = torch.tensor(fitting, dtype=torch.int64, device=query.device)
    at = _places(rows, starts, new, k_cache, block_table)
    tables = (rotary_cos, rotary_sin, rotary_interleaved)
    plain, truth = (
        (_turned(k[rows], starts, *tables), v[rows])
        for k, v in ((key, value), (key.double(), value.double()))
    )
    if k_scale is None:
        return [(at, *pair) for pair in zip(plain, truth, strict=True)]
    ratios, scales = zip(
        *(
            zip(divided(x, torch.float32), divided(y, torch.float64), strict=True)
            for x, y in zip(plain, truth, strict=True)
        ),
        strict=True,
    )
    return [(at, *pair) for pair in (*ratios, *scales)]


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
    starts = _starts(query, k_cache, key, cache_seqlens, block_table, rotary_cos, cache_length)
    return _row_by_row(
        attention.truth_forward, query.double(), (k_cache, k_scale), (v_cache, v_scale), starts,
        0 if key is None else query.shape[1], block_table, rotary_cos, rotary_sin, sinks,
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
    starts = _starts(query, k_cache, key, cache_seqlens, block_table, rotary_cos, cache_length)
    return _row_by_row(
        attention.plain_forward, query, (k_cache, k_scale), (v_cache, v_scale), starts,
        0 if key is None else query.shape[1], block_table, rotary_cos, rotary_sin, sinks,
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


def read_lengths(
    cache_seqlens: Tensor | None, cache_length: int, batch: int, new: int, capacity: int
) -> list[int]:
    """The tokens of each row before the append, on the host.

    Raises:
        ValueError: With ``new`` more they do not fit.
    """
    if cache_seqlens is None:
        return [cache_length] * batch
    lengths = cache_seqlens.tolist()
    if any(not 0 <= length <= capacity - new for length in lengths):
        raise ValueError(
            f"{_OP}: cache_seqlens must be from 0 to {capacity - new}, so that {new} more fit in "
            f"{capacity}, got {lengths}"
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
    query: Tensor,
    k_cache: Tensor,
    key: Tensor | None,
    cache_seqlens: Tensor | None,
    block_table: Tensor | None,
    rotary_cos: Tensor | None,
    cache_length: int,
) -> list[int | None]:
    """The tokens of each row before the append; None for a row that does not fit."""
    new = 0 if key is None else query.shape[1]
    capacity = capacity_of(k_cache, block_table, rotary_cos)
    lengths = [cache_length] * len(query) if cache_seqlens is None else cache_seqlens.tolist()
    starts: list[int | None] = []
    for row, length in enumerate(lengths):
        fits = 0 <= length <= capacity - new
        if fits and block_table is not None:
            pages = block_table[row, : -(-(length + new) // k_cache.shape[1])]
            fits = bool(((pages >= 0) & (pages < len(k_cache))).all())
        starts.append(length if fits else None)
    return starts


def _turned(
    heads: Tensor,
    starts: list[int],
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
) -> Tensor:
    """``(B, T, heads, D)`` at the positions from ``starts`` on."""
    if rotary_cos is None or rotary_sin is None:
        return heads
    at = _positions(starts, heads.shape[1], heads.device)
    angles = rotary_cos[at], rotary_sin[at]
    return rotary.forward(heads, heads[:, :, :0], *angles, rotary_interleaved)[0]


def _positions(starts: list[int], count: int, device: torch.device) -> Tensor:
    """``(B, count)``."""
    first = torch.tensor(starts, dtype=torch.int64, device=device)
    return first[:, None] + torch.arange(count, device=device)


def _places(
    rows: Tensor, starts: list[int], new: int, cache: Tensor, block_table: Tensor | None
) -> Places:
    """Where the new tokens of ``rows`` stand; both ``(len(rows), new)``."""
    positions = _positions(starts, new, cache.device)
    if block_table is None:
        return rows[:, None].expand_as(positions), positions
    page_size = cache.shape[1]
    return block_table[rows].long().gather(1, positions // page_size), positions % page_size


def _row_by_row(
    attend: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    keys: tuple[Tensor, Tensor | None],
    values: tuple[Tensor, Tensor | None],
    starts: Sequence[int | None],
    new: int,
    block_table: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    sinks: Tensor | None,
    rotary_interleaved: bool,
    scale: float,
    window_size: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Over what stands in the caches, each with its scales."""
    batch, num_queries, heads, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_full((batch, num_queries, heads, values[0].shape[-1]), torch.nan)
    lse = query.new_full((batch, heads, num_queries), torch.nan, dtype=dtype)
    for b, start in enumerate(starts):
        if start is None:
            continue
        row = slice(b, b + 1)
        q = query[row]
        if new:
            q = _turned(q, [start], rotary_cos, rotary_sin, rotary_interleaved)
        k, v = (_stored(b, start + new, *x, block_table, q.dtype) for x in (keys, values))
        out[row], lse[row] = attend(
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
