"""torch's ``scaled_dot_product_attention``, computed by ours where ours can."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor

# by itself, since ours may have taken its place in torch.nn.functional
from torch._C._nn import scaled_dot_product_attention as _torchs_function

from fastlm.ops._autocast import dtype_under_autocast
from fastlm.ops._checks import FLOAT_DTYPES, PLAIN, overrides_torch
from fastlm.ops._explain import Route
from fastlm.ops.attention import MAX_HEAD_DIM, causal_attention

_OURS, _TORCHS = "causal_attention", "torch.nn.functional.scaled_dot_product_attention"
_NUMBERS = (float, int, torch.SymFloat, torch.SymInt)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Softmax attention with the arguments and the meaning of torch's function of that name.

    Agrees with :func:`torch.nn.functional.scaled_dot_product_attention`, and can take its place.
    Causal attention of as many keys as queries or more, of which the first T count, and a single
    query without a mask go to :func:`causal_attention`, without a copy of a tensor that has up to
    four dimensions.  Anything else goes to torch's own: other masks, whose values are never looked
    at, dropout, attention that is not causal, fewer keys than queries, leading dimensions that
    broadcast, tensor subclasses, ``torch.func`` transforms, other devices, what torch refuses.
    ``fastlm.explain("scaled_dot_product_attention", ...)`` says where a call goes and why.

    What goes to ours differs from torch's in this: a gradient of its gradient raises;
    :func:`torch.nn.attention.sdpa_kernel` is not asked; ``out`` is laid out in memory as
    ``(..., T, H, Dv)`` whatever the layout of query; the backward needs ``out`` as it was and it is
    a view, so that where a gradient is needed changing it in place raises, then or in the backward,
    which torch's allows on some of its kernels; and
    :class:`torch.utils.flop_counter.FlopCounterMode` counts nothing.

    Args:
        query: ``(..., H, T, D)`` or ``(T, D)``.
        key: ``(..., G, S, D)`` or ``(S, D)``, with G == H but for ``enable_gqa``.
        value: ``(..., G, S, Dv)`` or ``(S, Dv)``.
        attn_mask: Broadcasts to ``(..., H, T, S)``: bool, True where a query sees a key, or of the
            dtype of query and added to the scores; or one of :mod:`torch.nn.attention.bias`, of
            which ours knows without its values whom it hides.
        dropout_p: Above 0, the probability that a weight becomes 0.
        is_causal: Query t sees the keys s <= t, the beginnings being aligned; not with a mask.
        scale: Factor of the scores; None for ``1 / sqrt(D)``.
        enable_gqa: Query head h reads key and value head ``h // (H // G)``.

    Returns:
        ``(..., H, T, Dv)`` in the dtype of query, or in what ``torch.autocast`` casts it to.

    Raises:
        RuntimeError, TypeError, ValueError: torch's own, where torch refuses the arguments.
    """
    call = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if not _is_usual(*call) and _refusal(*call) is not None:
        return _torchs_function(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    length = query.shape[-2]
    if _aligns_beginnings(attn_mask, is_causal) and key.shape[-2] > length:
        key, value = key.narrow(-2, 0, length), value.narrow(-2, 0, length)
    out = causal_attention(*(_ours(x) for x in (query, key, value)), scale=scale)
    out = cast(Tensor, out).transpose(1, 2)
    return out if query.dim() == 4 else out.view(*query.shape[:-1], value.shape[-1])


_SIGNATURE = inspect.signature(scaled_dot_product_attention)


def route(*args: Any, **kwargs: Any) -> Route:
    """Where :func:`scaled_dot_product_attention` sends a call with these arguments, and why."""
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    query, key, _, attn_mask, _, is_causal, *_ = call = tuple(bound.arguments.values())
    why_not = _refusal(*call)
    if why_not is not None:
        return Route(_TORCHS, why_not, is_ours=False)
    if not _aligns_beginnings(attn_mask, is_causal):
        why = "a single query sees all keys" if attn_mask is None else "attn_mask says it is causal"
    elif key.shape[-2] > query.shape[-2]:
        why = "it is causal, and no query sees the keys past the number of queries"
    else:
        why = "it is causal"
    return Route(_OURS, why, is_ours=True)


def _aligns_beginnings(attn_mask: Tensor | None, is_causal: bool) -> bool:
    return is_causal or (attn_mask is not None and _variant(attn_mask) == "UPPER_LEFT")


def _is_usual(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> bool:
    """Whether it is causal self-attention of equal heads, in one look: one by one takes longer."""
    if not (type(query) in PLAIN and type(key) in PLAIN and type(value) in PLAIN):
        return False
    if query.is_nested or key.is_nested or value.is_nested:
        return False
    shape, dtype = query.shape, query.dtype
    return (
        attn_mask is None
        and is_causal is True
        and type(dropout_p) is float
        and dropout_p == 0.0
        and (scale is None or type(scale) is float)
        and enable_gqa is False
        and len(shape) == 4
        and shape == key.shape == value.shape
        and shape[1] > 0
        and 1 <= shape[3] <= MAX_HEAD_DIM
        and dtype in FLOAT_DTYPES
        and dtype == key.dtype == value.dtype
        and (query.is_cpu or query.is_cuda)
        and query.device == key.device == value.device
        and query.layout == key.layout == value.layout == torch.strided
        and not _is_transformed()
    )


def _refusal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> str | None:
    """Why the call is torch's, or None; constant sentences, since a compiler traces this."""
    for x in (query, key, value):
        if not _is_plain(x):
            return "a tensor is no plain strided one"
    if _is_transformed():
        return "torch.func transforms the call"
    if query.device.type not in ("cpu", "cuda") or not query.device == key.device == value.device:
        return "the tensors are not all on one CPU or NVIDIA GPU"
    flags: tuple[object, ...] = (is_causal, enable_gqa)
    if not all(isinstance(flag, bool) for flag in flags):
        return "a flag is not a bool"
    if not _is_number(dropout_p) or dropout_p != 0:
        return "causal_attention has no dropout, and dropout_p is not 0"
    if not (scale is None or _is_number(scale)):
        return "scale is not a number"
    return _refusal_of_shapes(query, key, value, enable_gqa) or _refusal_of_mask(
        query.shape[-2], key.shape[-2], attn_mask, is_causal
    )


def _refusal_of_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> str | None:
    if not 2 <= query.dim() == key.dim() == value.dim():
        return "the tensors have different numbers of dimensions, or fewer than two"
    if not query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
        return "leading dimensions differ"
    heads, kv_heads = query.shape[-3:-2], key.shape[-3:-2]
    if kv_heads != value.shape[-3:-2] or (heads != kv_heads and not enable_gqa):
        return "the tensors have different numbers of heads"
    if enable_gqa and (not heads or heads[0] == 0 or kv_heads[0] == 0 or heads[0] % kv_heads[0]):
        return "there are no heads of key that could be shared evenly by those of query"
    if 0 in heads:
        return "there are no heads"
    if key.shape[-2] != value.shape[-2] or query.shape[-1] != key.shape[-1]:
        return "query, key and value do not fit together"
    for x in (query, value):
        if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
            return f"causal_attention takes a head_dim of 1 to {MAX_HEAD_DIM}"
    dtype = _dtype(query)
    if dtype not in FLOAT_DTYPES or not dtype == _dtype(key) == _dtype(value):
        return "the tensors are not all of one float dtype"
    return None


def _refusal_of_mask(
    num_queries: int, num_keys: int, attn_mask: Tensor | None, is_causal: bool
) -> str | None:
    if attn_mask is None:
        if not is_causal and num_queries != 1:
            return "it is not causal"
    elif is_causal:
        return "both attn_mask and is_causal are given"
    elif (variant := _variant(attn_mask)) is None:
        return "attn_mask is a tensor, and only its values could tell whom it hides"
    elif variant == "LOWER_RIGHT" and _shape(attn_mask) != (num_queries, num_keys):
        return "attn_mask is made for other lengths"
    if num_queries > num_keys:
        return "it is causal with more queries than keys, the last of which see every key"
    return None


def _is_plain(x: Any) -> bool:
    """Whether ours takes such a tensor; of some kinds torch's has versions of its own."""
    return (
        isinstance(x, Tensor)
        and not overrides_torch(x)
        and x.layout == torch.strided
        and not (x.is_quantized or x.is_nested)
        and type(x).__name__ != "DTensor"
    )


def _is_transformed() -> bool:
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is not None
    )


def _is_number(x: object) -> bool:
    return isinstance(x, _NUMBERS)


def _variant(mask: Tensor) -> str | None:
    """Which corner of the scores a bias of :mod:`torch.nn.attention.bias` is aligned with.

    By name, because importing that module imports the compiler.
    """
    return mask.variant.name if type(mask).__name__ == "CausalBias" else None  # type: ignore[attr-defined]


def _shape(mask: Any) -> tuple[int, int]:
    return mask.seq_len_q, mask.seq_len_kv


def _dtype(x: Tensor) -> torch.dtype:
    """What ``torch.autocast`` casts ``x`` to, for torch's function and for ours."""
    return dtype_under_autocast(x) if x.is_floating_point() else x.dtype


def _ours(x: Tensor) -> Tensor:
    """``(..., H, T, D)`` or ``(T, D)`` to ``(B, T, H, D)``."""
    if x.dim() != 4:
        x = x[(None,) * (4 - x.dim())] if x.dim() < 4 else x.flatten(0, -4)
    return x.transpose(1, 2)
