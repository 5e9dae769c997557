"""Causal attention over a cache of keys and values, which it extends."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastlm.ops._autocast import dtype_under_autocast
from fastlm.ops._checks import (
    check_dtype,
    check_integer,
    check_real,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
    check_that,
    within_float32,
)
from fastlm.ops._define import define_op

_OP = "attention_with_kv_cache"
MAX_HEAD_DIM = 512
_INT32_MAX = 2**31 - 1
BACKENDS = {
    "triton": "fastlm.kernels.attention_with_kv_cache",
    "cuda": "fastlm.ops.cuda.attention_with_kv_cache",
    "torch": "fastlm.ops.eager.attention_with_kv_cache",
    "reference": "fastlm.ops.reference.attention_with_kv_cache",
}


def attention_with_kv_cache(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    key: Tensor | None = None,
    value: Tensor | None = None,
    cache_seqlens: int | Tensor,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    scale: float | None = None,
    window_size: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Rotate query and key, append key and value to a cache in place, attend over the cache.

    One call decodes a token (T == 1), prefills a chunk or verifies a guess.  Row b, with L tokens
    after the append, gives what :func:`causal_attention` gives for its queries and those L keys and
    values: the ends are aligned, query t sees the keys s <= t + L - T.  Nothing behind them is
    read, and no token before them is written.  With ``key`` each row takes T tokens more, and
    queries and keys are rotated as by :func:`apply_rotary` at the positions L - T to L - 1.

    The triton and cuda backends divide the keys of a row among programs and put their results
    together (Dao et al., 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html).  Into how
    many parts depends on L and on T H / G alone, so a row has the same bits in any batch and in a
    cache of any size or kind.  Their workspace, of D + 1 floats for each query, head and part, has
    room for the longest row that the cache can hold, where lengths are on the device; with
    ``cu_seqlens_q`` for all queries, or as many as can have parts if they are fewer.  There is no
    gradient.
    Under autocast query, key and value are cast to the dtype of the caches, or to autocast's if
    those are int8.

    An int8 cache has a float32 scale for each token and head, which the append writes with it.  A
    row x of D channels, turned and in the dtype of query, becomes ``scale = max |x| / 127`` and of
    each x / scale the nearest integer, of two the even one, from -127 to 127.  Both divisions are
    in float32, rounded to nearest (in float64 for float64 inputs, the scale then in float32).  A
    row of zeros has the scale 0, one with an infinity or NaN the scale NaN, and both integers 0.
    Every backend stores the same integers, but where a rotation that was rounded otherwise changes
    which one is nearest.

    Args:
        query: ``(B, T, H, D)``; float32, bfloat16, float16 or float64; T from 1, D from 1
            to 512, of which the triton and cuda backends take 256.
        k_cache: ``(B, S_max, G, D)``, dtype of query or int8, written in place; or, with
            ``block_table``, pages ``(pages, page_size, G, D)``.  H must be a multiple of G.
        v_cache: ``(B, S_max, G, Dv)`` or ``(pages, page_size, G, Dv)``, likewise.  With ``key``
            neither cache may share memory with another argument.
        key: ``(B, T, G, D)`` to append, dtype of query; None to append nothing.
        value: ``(B, T, G, Dv)``, with ``key``.
        cache_seqlens: How many tokens each row has before the append: one int for all, or ``(B,)``
            int32 or int64 on the device, which is never read on the host of a GPU, nor changed.
        block_table: ``(B, max_pages)`` int32 or int64 on the device: token s of row b stands at
            ``s % page_size`` in page ``block_table[b, s // page_size]``.  A page that is appended
            to must belong to one row.
        rotary_cos: ``(positions, R/2)``, R <= D, any float dtype: cosines by absolute position.
        rotary_sin: Shape and dtype of ``rotary_cos``.
        rotary_interleaved: Pair neighbouring channels, as in :func:`apply_rotary`.
        scale: Factor of the scores, any float; None for ``1 / sqrt(D)``.
        window_size: As in :func:`causal_attention`.
        softcap: Likewise.
        sinks: Likewise; ``(H,)``.
        cu_seqlens_q: ``(rows + 1,)`` int32 or int64, on the device, for B == 1: row b of the caches
            has the queries, and appends the keys, from ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b +
            1]``; what is said of B elsewhere is then said of rows.  Boundaries rise from 0; tokens
            after the last give 0.  How many a row has changes no shape and is read on no host.
        k_scale: ``(B, S_max, G)`` or ``(pages, page_size, G)`` float32, written in place, with int8
            caches alone: what stands for a key is ``k_cache`` times it.  Memory of its own, like
            that of the caches.
        v_scale: The same for ``v_cache``.
        num_splits: Into how many parts these two divide the keys of each row, at most; None lets
            its length decide.
        return_lse: Also return the log-sum-exp of each query's scores.
        backend: ``"auto"``, ``"triton"``, ``"cuda"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``out`` ``(B, T, H, Dv)`` in the dtype of query; with ``return_lse`` also ``lse``
        ``(B, H, T)``, natural log, float32, float64 for float64 inputs.  Where lengths are read on
        the device, the out and lse of a row that its cache, its table or its rotary table cannot
        hold are NaN, and nothing of it is written.

    Raises:
        ValueError: Shapes or devices do not match, a number is out of range, an input requires a
            gradient while gradients are on, a cache is a view that negates, or lengths known on the
            host do not fit; nothing is written then.
        TypeError: A dtype is not one of those above, or they differ.
        NotImplementedError: ``backend`` cannot take these inputs; the message says why.
    """
    if torch._C._is_any_autocast_enabled() and isinstance(k_cache, Tensor):
        query, key, value = _cast_to_cache(k_cache, query, key, value)
    rows = _check_tensors(
        query, k_cache, v_cache, k_scale, v_scale, key, value, block_table, cu_seqlens_q
    )
    if key is not None:
        _check_writable(k_cache, v_cache, k_scale, v_scale)
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if rotary_cos is not None or rotary_sin is not None:
        _check_rotary(query, key, rotary_cos, rotary_sin)
    new = 0 if key is None or cu_seqlens_q is not None else query.shape[1]
    lengths, length = _checked_lengths(query, new, cache_seqlens, rows, capacity, rotary_cos)
    _check_options(query, scale, window_size, softcap, sinks, num_splits)
    if softcap is not None:
        softcap = within_float32(softcap)
    if block_table is not None:
        block_table = _narrow(block_table).contiguous()
    if cu_seqlens_q is not None:
        cu_seqlens_q = _narrow(cu_seqlens_q).contiguous()
    if window_size is not None:
        window_size = min(int(window_size), _INT32_MAX)
    out, lse = _forward(
        query, k_cache, v_cache, k_scale, v_scale, key, value, lengths, block_table, cu_seqlens_q,
        rotary_cos, rotary_sin, sinks, length, rotary_interleaved,
        query.shape[-1] ** -0.5 if scale is None else float(scale), window_size,
        softcap, num_splits, backend,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _check_tensors(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    block_table: Tensor | None,
    cu_seqlens_q: Tensor | None,
) -> int:
    """How many rows the caches have."""
    tensors = {"query": query, "k_cache": k_cache, "v_cache": v_cache}
    check_that(_OP, "value", (key is None) == (value is None), "come with key", "one of the two")
    if key is not None and value is not None:
        tensors |= {"key": key, "value": value}
    for name, x in tensors.items():
        check_tensor(_OP, name, x)
        _check_constant(name, x)
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        _check_stored(name, x)
    check_dtype(_OP, "query", query)
    check_shape(_OP, "query", query, ("B", "T", "H", "D"))
    batch, num_queries, heads, head_dim = query.shape
    check_that(_OP, "query", num_queries > 0, "have T of at least 1", num_queries)
    rows = batch
    if cu_seqlens_q is not None:
        check_that(_OP, "query", batch == 1, "have B == 1 with cu_seqlens_q", batch)
        rows = _checked_rows(query, cu_seqlens_q)
    stored: int | str = rows
    if block_table is not None:
        check_tensor(_OP, "block_table", block_table)
        check_dtype(_OP, "block_table", block_table, (torch.int32, torch.int64))
        check_shape(_OP, "block_table", block_table, (rows, "max_pages"), "to match query")
        check_same_device(_OP, "block_table", block_table, "query", query)
        stored = "pages"
        has_room = k_cache.dim() == 4 and k_cache.shape[1] > 0
        check_that(_OP, "k_cache", has_room, "have pages of a token or more", tuple(k_cache.shape))
    check_shape(_OP, "k_cache", k_cache, (stored, "S_max", "G", head_dim), "to match query")
    stored, size, kv_heads, _ = k_cache.shape
    check_shape(_OP, "v_cache", v_cache, (stored, size, kv_heads, "Dv"), "to match k_cache")
    if key is not None and value is not None:
        shape = (batch, num_queries, kv_heads)
        check_shape(_OP, "key", key, (*shape, head_dim), "to match query and k_cache")
        check_shape(_OP, "value", value, (*shape, v_cache.shape[-1]), "to match query and v_cache")
    is_int8 = k_cache.dtype == torch.int8
    for name, x in list(tensors.items())[1:]:
        if not (is_int8 and name in ("k_cache", "v_cache")):
            check_same_dtype(_OP, name, x, "query", query)
        check_same_device(_OP, name, x, "query", query)
    check_same_dtype(_OP, "v_cache", v_cache, "k_cache", k_cache)
    for name, scales in (("k_scale", k_scale), ("v_scale", v_scale)):
        given = "None" if scales is None else f"{k_cache.dtype} caches".removeprefix("torch.")
        check_that(_OP, name, (scales is not None) == is_int8, "come with int8 caches", given)
        if scales is not None:
            check_tensor(_OP, name, scales)
            _check_constant(name, scales)
            _check_stored(name, scales)
            check_dtype(_OP, name, scales, (torch.float32,))
            check_shape(_OP, name, scales, k_cache.shape[:3], "to match k_cache")
            check_same_device(_OP, name, scales, "query", query)
    for name, x in (("query", query), ("v_cache", v_cache)):
        fits = 1 <= x.shape[-1] <= MAX_HEAD_DIM
        check_that(_OP, name, fits, f"have a head_dim of 1 to {MAX_HEAD_DIM}", x.shape[-1])
    divides = kv_heads > 0 and heads > 0 and heads % kv_heads == 0
    requirement = "have a number of heads that divides query's"
    check_that(_OP, "k_cache", divides, requirement, f"{kv_heads} for {heads}")
    return rows


def _cast_to_cache(k_cache: Tensor, *tensors: Any) -> list[Any]:
    """As autocast would: the caches, which are written, decide the dtype if they can."""
    dtype = k_cache.dtype
    if dtype == torch.int8:
        return [x.to(dtype_under_autocast(x)) if isinstance(x, Tensor) else x for x in tensors]
    return [x.to(dtype) if isinstance(x, Tensor) else x for x in tensors]


def _narrow(x: Tensor) -> Tensor:
    """In int32, what is beyond it being no length and no page either way."""
    return x if x.dtype == torch.int32 else x.clamp(-1, _INT32_MAX).int()


def _check_writable(
    k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    check_that(_OP, "v_cache", v_cache is not k_cache, "be another tensor than k_cache", "it")
    differ = v_scale is None or v_scale is not k_scale
    check_that(_OP, "v_scale", differ, "be another tensor than k_scale", "it")
    written = (("k_cache", k_cache), ("v_cache", v_cache), ("k_scale", k_scale))
    for name, x in (*written, ("v_scale", v_scale)):
        if x is None:
            continue
        expanded = any(
            size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)
        )
        requirement = "have memory of its own for every element, to be written"
        check_that(_OP, name, not expanded, requirement, f"strides {x.stride()}")


def _check_stored(name: str, x: Tensor) -> None:
    """torch would write to a copy of a view that negates what it shows, if it does not crash."""
    # what Dynamo traces cannot be asked
    negates = not torch.compiler.is_compiling() and x.is_neg()
    check_that(_OP, name, not negates, "be no view that negates: use resolve_neg()", "one")


def _check_constant(name: str, x: Tensor) -> None:
    needs = torch.is_grad_enabled() and x.requires_grad
    requirement = "not require a gradient, the op has none: use torch.no_grad()"
    check_that(_OP, name, not needs, requirement, "requires_grad=True")


def _check_rotary(
    query: Tensor, key: Tensor | None, rotary_cos: Tensor | None, rotary_sin: Tensor | None
) -> None:
    for name, x in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin)):
        check_that(_OP, name, x is not None, "come with the other table", "None")
        check_tensor(_OP, name, x)
        _check_constant(name, x)  # type: ignore[arg-type]
    assert rotary_cos is not None
    assert rotary_sin is not None
    check_that(_OP, "key", key is not None, "be given with rotary_cos", "None")
    check_dtype(_OP, "rotary_cos", rotary_cos)
    check_same_device(_OP, "rotary_cos", rotary_cos, "query", query)
    check_shape(_OP, "rotary_cos", rotary_cos, ("positions", "R/2"))
    check_shape(_OP, "rotary_sin", rotary_sin, rotary_cos.shape, "to match rotary_cos")
    check_same_dtype(_OP, "rotary_sin", rotary_sin, "rotary_cos", rotary_cos)
    check_same_device(_OP, "rotary_sin", rotary_sin, "query", query)
    channels, head_dim = 2 * rotary_cos.shape[-1], query.shape[-1]
    check_that(_OP, "rotary_cos", channels <= head_dim, f"rotate at most {head_dim}", channels)


def _checked_rows(query: Tensor, cu_seqlens_q: Tensor) -> int:
    check_tensor(_OP, "cu_seqlens_q", cu_seqlens_q)
    check_dtype(_OP, "cu_seqlens_q", cu_seqlens_q, (torch.int32, torch.int64))
    check_same_device(_OP, "cu_seqlens_q", cu_seqlens_q, "query", query)
    shape = tuple(cu_seqlens_q.shape)
    has_start = len(shape) == 1 and shape[0] > 0
    check_that(_OP, "cu_seqlens_q", has_start, "have shape (rows + 1,)", shape)
    return shape[0] - 1


def _checked_lengths(
    query: Tensor,
    new: int,
    cache_seqlens: int | Tensor,
    rows: int,
    capacity: int,
    rotary_cos: Tensor | None,
) -> tuple[Tensor | None, int]:
    """``cache_seqlens`` as the operator takes it: per row on the device, or one on the host."""
    if isinstance(cache_seqlens, Tensor):
        check_tensor(_OP, "cache_seqlens", cache_seqlens)
        check_dtype(_OP, "cache_seqlens", cache_seqlens, (torch.int32, torch.int64))
        check_shape(_OP, "cache_seqlens", cache_seqlens, (rows,), "to match query")
        check_same_device(_OP, "cache_seqlens", cache_seqlens, "query", query)
        return _narrow(cache_seqlens).contiguous(), 0
    check_integer(_OP, "cache_seqlens", cache_seqlens)
    most = capacity if rotary_cos is None else min(capacity, rotary_cos.shape[0])
    fits = 0 <= cache_seqlens <= most - new
    requirement = f"be from 0 to {most - new}, so that {new} more fit in {most}"
    check_that(_OP, "cache_seqlens", fits, requirement, cache_seqlens)
    return None, int(cache_seqlens)


def _check_options(
    query: Tensor,
    scale: float | None,
    window_size: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    num_splits: int | None,
) -> None:
    for name, number in (("window_size", window_size), ("num_splits", num_splits)):
        if number is not None:
            check_integer(_OP, name, number)
            check_that(_OP, name, number >= 1, "be at least 1", number)
    if scale is not None:
        check_real(_OP, "scale", scale)
    if softcap is not None:
        check_real(_OP, "softcap", softcap)
        check_that(_OP, "softcap", 0 < softcap < math.inf, "be positive and finite", softcap)
    if sinks is not None:
        check_tensor(_OP, "sinks", sinks)
        _check_constant("sinks", sinks)
        check_dtype(_OP, "sinks", sinks)
        check_shape(_OP, "sinks", sinks, query.shape[2:3], "to match query")
        check_same_device(_OP, "sinks", sinks, "query", query)


def _fake(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    batch, num_queries, heads, _ = query.shape
    out = query.new_empty((batch, num_queries, heads, v_cache.shape[-1]))
    dtype = torch.promote_types(query.dtype, torch.float32)
    return out, query.new_empty((batch, heads, num_queries), dtype=dtype)


_WRITTEN = ("k_cache", "v_cache", "k_scale", "v_scale")
_forward = define_op(_OP, "forward", BACKENDS, fake=_fake, mutates=_WRITTEN)
