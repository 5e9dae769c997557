"""Attention over a cache by the CUDA C++ kernels of ``csrc/attention_with_kv_cache.cuh``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.kernels.attention_with_kv_cache import tuning
from fastlm.ops.cuda._extension import address, dtype_of, kernels, place, refuses_device

# Of queries and of values.
MAX_HEAD_DIM = 256
# Pairs of a query and a head that share keys, of a team of 128 threads and of the largest block.
TEAM_PAIRS, MOST_TEAMS = 8, 2
# Keys of a tile at most, one for four threads of a team.
MOST_KEYS = 32
# Bytes of the two tiles that a block holds: beside its queries, four blocks or more share a
# multiprocessor's memory.  Chosen from that alone; not yet measured on a GPU.
TILE_BYTES = 32 * 1024
# What tokens of a row, and of the cache it is in, are counted in.
_MOST_TOKENS = 1 << 30


def forward_refuses(
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
) -> str | None:
    reason = refuses_device(query, "query")
    if reason is not None:
        return reason
    named = {"query": query, "k_cache": k_cache, "v_cache": v_cache, "key": key, "value": value}
    for name, x in named.items():
        # the stride of a dimension of size 1 is never used
        if x is not None and x.shape[-1] > 1 and x.stride(-1) != 1:
            return f"the last dimension of {name} has stride {x.stride(-1)}: it must be contiguous"
    widest = max(query.shape[-1], v_cache.shape[-1])
    if widest > MAX_HEAD_DIM:
        return f"head_dim must be at most {MAX_HEAD_DIM}, got {widest}"
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if max(capacity, query.shape[1] * query.shape[2]) >= _MOST_TOKENS:
        return f"more than {_MOST_TOKENS} tokens or queries of a row"
    return None


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
    given, num_queries, heads, head_dim = query.shape
    kv_heads, value_dim = v_cache.shape[2:]
    batch = given if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    out = query.new_empty((given, num_queries, heads, value_dim))
    lse = query.new_empty(
        (given, heads, num_queries), dtype=torch.promote_types(query.dtype, torch.float32)
    )
    if cu_seqlens_q is not None:
        # of tokens that no row has
        out.zero_()
        lse.fill_(-torch.inf)
    if batch == 0:
        return out, lse
    if rotary_cos is not None and rotary_sin is not None:
        rotary_cos, rotary_sin = rotary_cos.contiguous(), rotary_sin.contiguous()
    if sinks is not None:
        sinks = sinks.contiguous()
    page_size, max_pages = k_cache.shape[1], 1 if block_table is None else block_table.shape[1]
    capacity = page_size * max_pages
    if rotary_cos is not None:
        capacity = min(capacity, rotary_cos.shape[0])
    rows = kernels().CachedRows(
        keys=_stored(k_cache, k_scale), values=_stored(v_cache, v_scale),
        lengths=address(cache_seqlens), table=address(block_table), bounds=address(cu_seqlens_q),
        cos=address(rotary_cos), sin=address(rotary_sin),
        table_dtype=dtype_of(query if rotary_cos is None else rotary_cos),
        turned=0 if rotary_cos is None else rotary_cos.shape[1],
        is_interleaved=rotary_interleaved, appends=key is not None, rows=batch,
        num_tokens=num_queries, kv_heads=kv_heads, group_size=heads // kv_heads,
        length=cache_length, capacity=capacity, max_pages=max_pages, page_size=page_size,
        num_pages=len(k_cache),
    )  # fmt: skip
    if key is not None and value is not None:
        kernels().append_to_kv_cache(
            dtype=dtype_of(query), rows=rows, key=_given(key), value=_given(value), **place(query)
        )
    is_long = cache_seqlens is not None or cu_seqlens_q is not None
    numbers = plan(
        num_queries, heads // kv_heads, head_dim, value_dim, query.itemsize, k_cache.itemsize,
        longest=capacity if is_long else cache_length + num_queries, rows=batch,
        is_packed=cu_seqlens_q is not None, num_splits=num_splits,
    )  # fmt: skip
    part_outs = part_lses = None
    if numbers["splits"] > 1:
        shape = (heads, numbers["slots"], numbers["splits"])
        part_outs, part_lses = lse.new_empty((*shape, value_dim)), lse.new_empty(shape)
    kernels().attend_to_kv_cache(
        dtype=dtype_of(query), rows=rows, query=_given(query), scale=scale, softcap=softcap or 0.0,
        window=0 if window_size is None else min(window_size, capacity + num_queries),
        sinks=address(sinks), sinks_dtype=dtype_of(query if sinks is None else sinks),
        out=address(out), lse=address(lse), part_outs=address(part_outs),
        part_lses=address(part_lses), plan=kernels().CachePlan(**numbers), **place(query),
    )  # fmt: skip
    return out, lse


def _stored(cache: Tensor, scales: Tensor | None) -> Any:
    """Keys or values as the kernels are told of them; it keeps nothing alive."""
    return kernels().Stored(
        elements=address(cache),
        scales=address(scales),
        strides=cache.stride()[:3],
        scale_strides=(0, 0, 0) if scales is None else scales.stride(),
        dim=cache.shape[-1],
    )


def _given(x: Tensor) -> Any:
    return kernels().Given(elements=address(x), strides=x.stride()[:3])


def plan(
    num_queries: int,
    group_size: int,
    head_dim: int,
    value_dim: int,
    itemsize: int,
    stored_itemsize: int,
    *,
    longest: int,
    rows: int,
    is_packed: bool,
    num_splits: int | None,
) -> dict[str, int]:
    """Fields of a ``CachePlan``; how keys are divided is what the triton backend does.

    Args:
        num_queries: Of a row, or with ``is_packed`` of all.
        group_size: Query heads of a head of keys.
        head_dim: Of queries and keys.
        value_dim: Of values.
        itemsize: Of queries.
        stored_itemsize: Of the cache.
        longest: Tokens that a row may have.
        rows: Of the cache.
        is_packed: Whether rows have a count of queries each.
        num_splits: As the caller has it.
    """
    pairs = num_queries * group_size
    key_bytes = sum(-(-dim * stored_itemsize // 128) * 128 + 64 for dim in (head_dim, value_dim))
    # longer rows of numbers leave fewer keys; two tiles are held
    tile = max(1, min(MOST_KEYS, TILE_BYTES // (2 * key_bytes)))
    tile = 1 << (tile.bit_length() - 1)
    slots, row_slots, parts = rows * num_queries, 0, 0
    if num_splits is not None:
        # a part has a tile of keys or more
        parts = splits = min(num_splits, max(1, -(-longest // tile)))
    elif (group_size if is_packed else pairs) <= tuning.MOST_PAIRS:
        splits = min(tuning.MOST_SPLITS, max(1, -(-longest // tuning.SPLIT_KEYS)))
    else:
        splits = 1
    if is_packed:
        slots = num_queries
        # room for each row's own, or where they are fewer, for each query's
        if num_splits is None and 0 < rows * (tuning.MOST_PAIRS // group_size) <= num_queries:
            row_slots = tuning.MOST_PAIRS // group_size
            slots = rows * row_slots
    return {
        "tile": tile,
        "teams": min(MOST_TEAMS, -(-pairs // TEAM_PAIRS)),
        "parts": parts,
        "split_keys": tuning.SPLIT_KEYS,
        "most_splits": tuning.MOST_SPLITS,
        "most_pairs": tuning.MOST_PAIRS,
        "splits": splits,
        "slots": slots,
        "row_slots": row_slots,
    }
