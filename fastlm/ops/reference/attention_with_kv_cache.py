"""Attention over a cache by its definition: causal attention, row by row, of what the cache holds.

Row b has ``L = cache_seqlens[b] + T`` tokens, or without new keys ``cache_seqlens[b]``; its last T
positions are those of the queries.  Queries and new keys are rotated at their positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastlm.ops.reference import attention, rotary

_OP = "attention_with_kv_cache"


def forward(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
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
    out, lse, written = _row_by_row(
        attention.forward, query, k_cache, v_cache, key, value, cache_seqlens, block_table,
        rotary_cos, rotary_sin, sinks, cache_length, rotary_interleaved, scale, window_size,
        softcap,
    )  # fmt: skip
    for row, start, new_key, new_value in written:
        for t in range(new_key.shape[0]):
            at = _place(row, start + t, k_cache, block_table)
            k_cache[at], v_cache[at] = new_key[t], new_value[t]
    return out, lse


def truth_forward(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
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
    """Rotated queries and keys are not rounded, and nothing is written."""
    wide = (None if x is None else x.double() for x in (key, value, rotary_cos, rotary_sin))
    key, value, rotary_cos, rotary_sin = wide
    return _row_by_row(
        attention.truth_forward, query.double(), k_cache, v_cache, key, value, cache_seqlens,
        block_table, rotary_cos, rotary_sin, sinks, cache_length, rotary_interleaved, scale,
        window_size, softcap,
    )[:2]  # fmt: skip


def plain_forward(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
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
    """torch's rotation and attention in the working dtype; nothing is written."""
    return _row_by_row(
        attention.plain_forward, query, k_cache, v_cache, key, value, cache_seqlens, block_table,
        rotary_cos, rotary_sin, sinks, cache_length, rotary_interleaved, scale, window_size,
        softcap,
    )[:2]  # fmt: skip


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


def _row_by_row(
    attend: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
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
) -> tuple[Tensor, Tensor, list[tuple[int, int, Tensor, Tensor]]]:
    """out, lse and what is to be written: row, first token, keys, values."""
    batch, num_queries, heads, _ = query.shape
    new = 0 if key is None else num_queries
    capacity = capacity_of(k_cache, block_table, rotary_cos)
    outs, lses, written = [], [], []
    for b, start in enumerate(read_lengths(cache_seqlens, cache_length, batch, new, capacity)):
        q = query[b : b + 1]
        if block_table is not None:
            read_pages(b, start + new, k_cache, block_table)
        k, v = (_stored(b, start, x, block_table).to(query.dtype) for x in (k_cache, v_cache))
        if key is not None and value is not None:
            new_key, new_value = key[b : b + 1], value[b : b + 1]
            if rotary_cos is not None and rotary_sin is not None:
                at = slice(start, start + new)
                angles = rotary_cos[at], rotary_sin[at]
                q, new_key = rotary.forward(q, new_key, *angles, rotary_interleaved)
            written.append((b, start, new_key[0], new_value[0]))
            k, v = torch.cat((k, new_key), 1), torch.cat((v, new_value), 1)
        out, lse = attend(q, k, v, sinks, None, None, None, None, scale, window_size, softcap)
        outs.append(out)
        lses.append(lse)
    if not outs:
        dtype = torch.promote_types(query.dtype, torch.float32)
        outs = [query.new_empty((batch, num_queries, heads, v_cache.shape[-1]))]
        lses = [query.new_empty((batch, heads, num_queries), dtype=dtype)]
    return torch.cat(outs), torch.cat(lses), written


def _stored(row: int, length: int, cache: Tensor, block_table: Tensor | None) -> Tensor:
    """``(1, length, G, D)``, the first tokens of a row."""
    if block_table is None:
        return cache[row : row + 1, :length]
    return cache[read_pages(row, length, cache, block_table)].flatten(0, 1)[None, :length]


def _place(
    row: int, token: int, cache: Tensor, block_table: Tensor | None
) -> tuple[int | Tensor, int]:
    if block_table is None:
        return row, token
    page, slot = divmod(token, cache.shape[1])
    return block_table[row, page], slot


def forward_refuses(*args: object) -> None:
    return None
