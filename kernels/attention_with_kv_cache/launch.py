"""Allocate outputs and launch.  Arguments are already checked by the caller."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .._launch import accumulator, launch
from .._runtime import refuses_device
from ..attention.launch import uses_tf32
from ..attention.tuning import block
from . import tuning
from .append import append_kernel
from .decode import combine_kernel, decode_kernel


def forward_refuses(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    *rest: object,
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
    if widest > tuning.MAX_HEAD_DIM:
        return f"head_dim must be at most {tuning.MAX_HEAD_DIM}, got {widest}"
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
    group_size = heads // kv_heads
    is_packed = cu_seqlens_q is not None
    batch = given if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    acc = accumulator(query.dtype)
    out = query.new_empty((given, num_queries, heads, value_dim))
    lse = query.new_empty(
        (given, heads, num_queries), dtype=torch.promote_types(query.dtype, torch.float32)
    )
    if is_packed:
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
    # where the tokens of a row are: the same for all three kernels
    lengths = (cache_length, capacity, max_pages, page_size, len(k_cache))
    tables = (cache_seqlens, block_table, cu_seqlens_q, rotary_cos, rotary_sin)
    counts: dict[str, Any] = {
        "HAS_LENGTHS": cache_seqlens is not None,
        "IS_PACKED": is_packed,
    }
    kinds = counts | {"IS_PAGED": block_table is not None, "HAS_SCALES": k_scale is not None}
    turns = {
        "PAIRS": 0 if rotary_cos is None else rotary_cos.shape[1],
        "INTERLEAVED": rotary_interleaved,
    }
    sizes = {
        "HEAD_DIM": head_dim, "VALUE_DIM": value_dim,
        "BLOCK_D": block(head_dim), "BLOCK_V": block(value_dim), "ACC": acc,
    }  # fmt: skip
    strides: tuple[int, ...] = (*k_cache.stride()[:3], *v_cache.stride()[:3])
    for scales in (k_scale, v_scale):
        strides += (0, 0, 0) if scales is None else scales.stride()
    if key is not None and value is not None:
        plan = tuning.APPEND
        blocks = batch * triton.cdiv(num_queries * kv_heads, plan.block_m)
        if is_packed:
            blocks = (num_queries // plan.block_m + batch) * kv_heads
        launch(
            append_kernel, (blocks,),
            key, value, k_cache, v_cache, k_scale, v_scale, *tables,
            *key.stride()[:3], *value.stride()[:3], *strides, batch, kv_heads, num_queries,
            *lengths, **kinds, **turns, **sizes, BLOCK=plan.block_m,
            num_warps=plan.num_warps, num_stages=plan.num_stages,
        )  # fmt: skip

    options = {
        "HAS_WINDOW": window_size is not None, "HAS_SOFTCAP": softcap is not None,
        "FAST_CAP": softcap is not None and softcap <= 128.0 and query.itemsize == 2,
        "HAS_SINKS": sinks is not None, "PRECISION": "tf32" if uses_tf32(query) else "ieee",
    }  # fmt: skip
    longest = cache_length + num_queries
    if cache_seqlens is not None or is_packed:
        longest = capacity
    most_pairs = num_queries * group_size
    classes = tuning.classes(group_size, most_pairs) if is_packed else [(0, most_pairs)]
    plans = [
        tuning.plan(min(most, most_pairs), head_dim, value_dim, query.dtype, k_cache.dtype)
        for _, most in classes
    ]
    # a part has a block of keys or more
    parts = max(1, triton.cdiv(capacity, min(plan.block_n for plan in plans)))
    parts = min(num_splits or 1, parts)
    # room for the results of splits: each row's own, or where they are fewer, each query's
    row_slots, slots = 0, batch * num_queries
    if is_packed:
        row_slots = tuning.MOST_PAIRS // group_size
        slots = batch * row_slots
        if slots > num_queries or num_splits is not None:
            row_slots, slots = 0, num_queries
    partial: tuple[Tensor, Tensor] | None = None
    combining: list[tuple[tuple[int, ...], dict[str, Any]]] = []
    for (least, most), plan in zip(classes, plans, strict=True):
        pairs = min(most, most_pairs)
        splits, split_keys = parts, tuning.split_keys(pairs) if num_splits is None else 0
        if split_keys:
            splits = min(tuning.MOST_SPLITS, max(1, triton.cdiv(longest, tuning.SPLIT_KEYS)))
        splitting = {
            "APPENDS": key is not None, "SPLIT_KEYS": split_keys,
            "MOST_SPLITS": tuning.MOST_SPLITS, "BLOCK_N": plan.block_n,
        }  # fmt: skip
        results = (out, lse)
        if splits > 1:
            if partial is None:
                shape = (heads * slots, splits)
                partial = lse.new_empty((*shape, value_dim)), lse.new_empty(shape)
            results = partial
            if split_keys:
                # these classes are split alike: one launch puts them together
                combining = []
            from_pairs = 0 if split_keys else least
            combining.append(((parts, splits, from_pairs, most, slots, row_slots), splitting))
        programs = batch * triton.cdiv(pairs, plan.block_m)
        if is_packed and not split_keys:
            programs = most_pairs // plan.block_m + batch
        launch(
            decode_kernel, (kv_heads * programs * splits,),
            query, k_cache, v_cache, k_scale, v_scale, *results, sinks, *tables,
            *query.stride()[:3], *strides,
            batch * kv_heads, kv_heads, group_size, num_queries, *lengths,
            0 if window_size is None else min(window_size, capacity + num_queries), parts, splits,
            least, most, slots, row_slots, scale, softcap or 1.0,
            **(splitting | kinds), **turns, **sizes, **options, IS_WHOLE=splits == 1,
            BLOCK_M=plan.block_m, num_warps=plan.num_warps, num_stages=plan.num_stages,
        )  # fmt: skip
    plan = tuning.COMBINE
    for numbers, splitting in combining:
        assert partial is not None
        launch(
            combine_kernel, (batch * heads * (1 if is_packed else num_queries),),
            *partial, out, lse, cache_seqlens, cu_seqlens_q,
            batch, heads, group_size, num_queries, cache_length, capacity, *numbers,
            **splitting, **counts, VALUE_DIM=value_dim, BLOCK_V=sizes["BLOCK_V"], ACC=acc,
            BLOCK_S=plan.block_m, num_warps=plan.num_warps, num_stages=plan.num_stages,
        )  # fmt: skip
    return out, lse
