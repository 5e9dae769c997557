"""The functions of the ``flash_attn`` package (2.x), computed by the ops of this one.

For programs whose build of that package fails, on any device and in any float dtype::

    from fastlm.compat.flash_attn import flash_attn_func, flash_attn_varlen_func
    from fastlm.compat.flash_attn import flash_attn_with_kvcache

Names, order, defaults and layouts are theirs (https://github.com/Dao-AILab/flash-attention).

Of what version 2.8 exports the functions of packed tensors are missing:
``flash_attn_qkvpacked_func``, ``flash_attn_kvpacked_func``, ``flash_attn_varlen_qkvpacked_func``
and ``flash_attn_varlen_kvpacked_func``.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fastlm.ops._checks import (
    check_dtype,
    check_integer,
    check_real,
    check_same_device,
    check_shape,
    check_tensor,
    check_that,
)
from fastlm.ops.attention import causal_attention
from fastlm.ops.attention_with_kv_cache import attention_with_kv_cache

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """Causal softmax attention with the arguments of ``flash_attn.flash_attn_func``.

    Query t sees the keys from ``t + S - T - left`` to ``t + S - T + right``, the ends being aligned
    as in that package since 2.1; what :func:`causal_attention` says of results holds here.

    Args:
        q: ``(B, T, H, D)``.
        k: ``(B, S, G, D)``, H a multiple of G.
        v: ``(B, S, G, Dv)``.
        dropout_p: Must be 0.
        softmax_scale: Factor of the scores; None for ``1 / sqrt(D)``.
        causal: ``right`` is 0, whatever window_size says.  Without it window_size must say so, but
            for a single query, after whose position there are no keys.
        window_size: ``(left, right)``; negative for no limit.
        softcap: Positive: scores become ``softcap * tanh(score / softcap)``; 0 for none.
        alibi_slopes: Must be None.
        deterministic: The backward is, on Triton kernels, whether asked for or not.
        return_attn_probs: Must be False; the lse is what :func:`causal_attention` returns with
            ``return_lse=True``.

    Returns:
        ``(B, T, H, Dv)``.

    Raises:
        NotImplementedError: An argument asks for what is not implemented.
        ValueError, TypeError: As :func:`causal_attention`.
    """
    op = "flash_attn_func"
    _refuse_options(op, dropout_p, alibi_slopes, return_attn_probs)
    _check_tensors(op, q, k, v, ("B", "T"), "S")
    out = causal_attention(
        q,
        k,
        v,
        scale=softmax_scale,
        window_size=_window(op, causal, window_size, sees_all=q.shape[1] == 1),
        softcap=_softcap(op, softcap),
    )
    return cast(Tensor, out)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention in packed sequences, as ``flash_attn.flash_attn_varlen_func``.

    Args:
        q: ``(total_q, H, D)``.
        k: ``(total_k, G, D)``, H a multiple of G.
        v: ``(total_k, G, Dv)``.
        cu_seqlens_q: ``(sequences + 1,)`` int32, on the device: sequence b has the queries from
            ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]``; those after the last get 0.
        cu_seqlens_k: The same of the keys.
        max_seqlen_q: The integer 1 says that no sequence has more than one query.  Any other value
            is not needed and not looked at.
        max_seqlen_k: Not needed and not looked at.
        dropout_p: Must be 0.
        softmax_scale: Factor of the scores; None for ``1 / sqrt(D)``.
        causal: As in :func:`flash_attn_func`, in each sequence; without it ``right`` must be 0, but
            where ``max_seqlen_q`` is 1.
        window_size: ``(left, right)``; negative for no limit.
        softcap: Positive: scores become ``softcap * tanh(score / softcap)``; 0 for none.
        alibi_slopes: Must be None.
        deterministic: The backward is, on Triton kernels, whether asked for or not.
        return_attn_probs: Must be False.
        block_table: Must be None.

    Returns:
        ``(total_q, H, Dv)``.

    Raises:
        NotImplementedError: An argument asks for what is not implemented.
        ValueError, TypeError: As :func:`causal_attention`.
    """
    op = "flash_attn_varlen_func"
    _refuse_options(op, dropout_p, alibi_slopes, return_attn_probs, block_table)
    _check_tensors(op, q, k, v, ("total_q",), "total_k")
    is_single = isinstance(max_seqlen_q, int) and max_seqlen_q == 1
    out = causal_attention(
        q[None],
        k[None],
        v[None],
        scale=softmax_scale,
        window_size=_window(op, causal, window_size, sees_all=is_single),
        softcap=_softcap(op, softcap),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    return cast(Tensor, out)[0]


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Extend caches in place and attend over them, as ``flash_attn.flash_attn_with_kvcache``.

    What :func:`attention_with_kv_cache` says of results and of rows that do not fit holds here.  A
    query that sees no key has an lse of -inf, of theirs +inf.

    Args:
        q: ``(B, T, H, D)``.
        k_cache: ``(B_cache, S_cache, G, D)``, H a multiple of G; or, with ``block_table``,
            ``(num_blocks, page_block_size, G, D)``.  Without ``cache_batch_idx`` row b of q belongs
            to row b of the caches, which may have more.
        v_cache: The same with Dv.
        k: ``(B, T, G, D)``, written to ``k_cache`` from ``cache_seqlens`` on; of as many tokens as
            q, where theirs may have others.
        v: ``(B, T, G, Dv)``, with k.
        rotary_cos: ``(positions, R/2)``, R <= D; turns q and k by their positions, with k alone.
        rotary_sin: Likewise.
        cache_seqlens: Tokens of each row before the append, an int or ``(B,)`` int32; None, where
            there is no k, for as many as the caches can hold.
        cache_batch_idx: ``(B,)`` int32 on the device, the row of the caches of each row of q; not
            with ``block_table``.
        cache_leftpad: Must be None.
        block_table: ``(B, max_num_blocks_per_seq)`` int32.
        softmax_scale: Factor of the scores; None for ``1 / sqrt(D)``.
        causal: ``right`` is 0, whatever window_size says.  Without it window_size must say so, but
            for T == 1, where there are no keys after the query's.
        window_size: ``(left, right)``; negative for no limit.
        softcap: Positive: scores become ``softcap * tanh(score / softcap)``; 0 for none.
        rotary_interleaved: Pair neighbouring channels, True if not said otherwise.
        alibi_slopes: Must be None.
        num_splits: Into how many parts the keys are divided; 0 lets the length decide.
        return_softmax_lse: Also return the log-sum-exp of each query's scores.

    Returns:
        ``(B, T, H, Dv)``, with ``return_softmax_lse`` also ``(B, H, T)``.

    Raises:
        NotImplementedError: An argument asks for what is not implemented.
        ValueError, TypeError: As :func:`attention_with_kv_cache`; also where gradients are on and
            an input requires one, which theirs drops without a word.
    """
    op = "flash_attn_with_kvcache"
    _refuse_tensors(op, cache_leftpad=cache_leftpad, alibi_slopes=alibi_slopes)
    _check_caches(op, q, k_cache, v_cache, k, v, is_paged=block_table is not None)
    batch, num_queries = q.shape[:2]
    if cache_batch_idx is not None:
        if block_table is not None:
            raise NotImplementedError(f"{op}: cache_batch_idx must be None with block_table")
        check_tensor(op, "cache_batch_idx", cache_batch_idx)
        check_dtype(op, "cache_batch_idx", cache_batch_idx, (torch.int32, torch.int64))
        check_shape(op, "cache_batch_idx", cache_batch_idx, (batch,), "to match q")
        check_same_device(op, "cache_batch_idx", cache_batch_idx, "q", q)
        # a row of the caches is a page, the only one that its sequence has
        block_table = cache_batch_idx[:, None]
    elif block_table is None:
        requirement = f"have a row for each of the {batch} of q"
        check_that(op, "k_cache", len(k_cache) >= batch, requirement, len(k_cache))
        k_cache, v_cache = k_cache[:batch], v_cache[:batch]
    has_tables = rotary_cos is not None or rotary_sin is not None
    check_that(op, "k", k is not None or not has_tables, "be given with rotary_cos", "None")
    if cache_seqlens is None:
        check_that(op, "cache_seqlens", k is None, "be given with k", "None")
        max_pages = 1
        if block_table is not None:
            check_tensor(op, "block_table", block_table)
            check_shape(op, "block_table", block_table, (batch, "max_num_blocks_per_seq"))
            max_pages = block_table.shape[1]
        cache_seqlens = k_cache.shape[1] * max_pages
    check_integer(op, "num_splits", num_splits)
    check_that(op, "num_splits", num_splits >= 0, "be 0 or more", num_splits)
    return attention_with_kv_cache(
        q,
        k_cache,
        v_cache,
        key=k,
        value=v,
        cache_seqlens=cache_seqlens,
        block_table=block_table,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        scale=softmax_scale,
        window_size=_window(op, causal, window_size, sees_all=num_queries == 1),
        softcap=_softcap(op, softcap),
        num_splits=num_splits or None,
        return_lse=return_softmax_lse,
    )


def _check_caches(
    op: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    *,
    is_paged: bool,
) -> None:
    """Shapes, under the names they have here."""
    check_that(op, "v", (k is None) == (v is None), "come with k", "one of the two")
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(op, name, x)
    check_shape(op, "q", q, ("B", "T", "H", "D"))
    batch, num_queries, _, head_dim = q.shape
    sizes = ("num_blocks", "page_block_size") if is_paged else ("B_cache", "S_cache")
    check_shape(op, "k_cache", k_cache, (*sizes, "G", head_dim), "to match q")
    check_shape(op, "v_cache", v_cache, (*k_cache.shape[:-1], "Dv"), "to match k_cache")
    _check_groups(op, "k_cache", q, k_cache)
    if k is None or v is None:
        return
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        check_tensor(op, name, x)
        check_shape(op, name, x, (batch, "T", *cache.shape[2:]), f"to match q and {name}_cache")
        if x.shape[1] != num_queries:
            raise NotImplementedError(
                f"{op}: {name} must have as many tokens as q, {num_queries}, got {x.shape[1]}"
            )


def _check_tensors(
    op: str, q: Tensor, k: Tensor, v: Tensor, leading: tuple[str, ...], keys: str
) -> None:
    """Check shapes under the names they have here; :func:`causal_attention` checks the rest."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(op, name, x)
    check_shape(op, "q", q, (*leading, "H", "D"))
    *batch, _, _, head_dim = q.shape
    check_shape(op, "k", k, (*batch, keys, "G", head_dim), "to match q")
    check_shape(op, "v", v, (*k.shape[:-1], "Dv"), "to match k")
    _check_groups(op, "k", q, k)


def _check_groups(op: str, name: str, q: Tensor, keys: Tensor) -> None:
    heads, kv_heads = q.shape[-2], keys.shape[-2]
    divides = kv_heads > 0 and heads > 0 and heads % kv_heads == 0
    requirement = "have a number of heads that divides q's"
    check_that(op, name, divides, requirement, f"{kv_heads} for {heads}")


def _refuse_options(
    op: str,
    dropout_p: float,
    alibi_slopes: Tensor | None,
    return_attn_probs: bool,
    block_table: Tensor | None = None,
) -> None:
    if dropout_p != 0:
        raise NotImplementedError(f"{op}: dropout_p must be 0, got {dropout_p}")
    _refuse_tensors(op, alibi_slopes=alibi_slopes, block_table=block_table)
    if return_attn_probs:
        raise NotImplementedError(
            f"{op}: return_attn_probs must be False, got {return_attn_probs}; for the lse call "
            "fastlm.causal_attention with return_lse=True"
        )


def _refuse_tensors(op: str, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None:
            raise NotImplementedError(f"{op}: {name} must be None, got {type(x).__name__}")


def _window(op: str, causal: bool, window_size: tuple[int, int], *, sees_all: bool) -> int | None:
    """How many keys each query sees at most, itself included."""
    is_pair = isinstance(window_size, tuple | list) and len(window_size) == 2
    check_that(op, "window_size", is_pair, "be a pair (left, right)", window_size)
    left, right = window_size
    for side in (left, right):
        check_integer(op, "window_size", side)
    if not causal and right != 0 and not sees_all:
        raise NotImplementedError(
            f"{op}: causal must be True, or window_size end with 0, got causal={causal} and "
            f"window_size={tuple(window_size)}: keys after a query's own are never seen"
        )
    return None if left < 0 else left + 1


def _softcap(op: str, softcap: float) -> float | None:
    check_real(op, "softcap", softcap)
    check_that(op, "softcap", softcap >= 0, "be 0 or positive", softcap)
    return softcap or None
