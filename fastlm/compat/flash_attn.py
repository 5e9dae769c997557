"""The functions of the ``flash_attn`` package (2.x), computed by :func:`fastlm.causal_attention`.

For programs whose build of that package fails, on any device and in any float dtype::

    from fastlm.compat.flash_attn import flash_attn_func, flash_attn_varlen_func

Names, order, defaults and layouts are theirs (https://github.com/Dao-AILab/flash-attention).

Of what version 2.8 exports these two are all there is: ``flash_attn_with_kvcache`` is missing, and
so are the functions of packed tensors, ``flash_attn_qkvpacked_func``, ``flash_attn_kvpacked_func``,
``flash_attn_varlen_qkvpacked_func`` and ``flash_attn_varlen_kvpacked_func``.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from fastlm.ops._checks import check_integer, check_real, check_shape, check_tensor, check_that
from fastlm.ops.attention import causal_attention

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]


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


def _check_tensors(
    op: str, q: Tensor, k: Tensor, v: Tensor, leading: tuple[str, ...], keys: str
) -> None:
    """Check shapes under the names they have here; :func:`causal_attention` checks the rest."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(op, name, x)
    check_shape(op, "q", q, (*leading, "H", "D"))
    *batch, _, heads, head_dim = q.shape
    check_shape(op, "k", k, (*batch, keys, "G", head_dim), "to match q")
    check_shape(op, "v", v, (*k.shape[:-1], "Dv"), "to match k")
    kv_heads = k.shape[-2]
    divides = kv_heads > 0 and heads > 0 and heads % kv_heads == 0
    requirement = "have a number of heads that divides q's"
    check_that(op, "k", divides, requirement, f"{kv_heads} for {heads}")


def _refuse_options(
    op: str,
    dropout_p: float,
    alibi_slopes: Tensor | None,
    return_attn_probs: bool,
    block_table: Tensor | None = None,
) -> None:
    if dropout_p != 0:
        raise NotImplementedError(f"{op}: dropout_p must be 0, got {dropout_p}")
    for name, x in (("alibi_slopes", alibi_slopes), ("block_table", block_table)):
        if x is not None:
            raise NotImplementedError(f"{op}: {name} must be None, got {type(x).__name__}")
    if return_attn_probs:
        raise NotImplementedError(
            f"{op}: return_attn_probs must be False, got {return_attn_probs}; for the lse call "
            "fastlm.causal_attention with return_lse=True"
        )


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
