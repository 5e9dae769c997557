"""``attn_implementation="fastlm"``: transformers' attention by ours, where ours says the same."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fastlm.hf import masks
from fastlm.hf.masks import Mask, visible_of
from fastlm.ops._checks import FLOAT_DTYPES
from fastlm.ops.attention import MAX_HEAD_DIM, causal_attention

NAME = "fastlm"
# Arguments of attention functions that say more than query, key and value, beside those we know.
_STANDARD = {
    "module", "query", "key", "value", "attention_mask", "scaling", "dropout", "kwargs",
    "softcap", "s_aux", "is_causal", "sliding_window", "output_attentions",
}  # fmt: skip
_FOREIGN = ("position_bias", "cache", "sinks", "indices", "block_indices")
_EAGER = "eager_attention_forward"
Attention = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Call:
    """Where one call of attention went.

    Attributes:
        module: Name of the attention layer.
        to: ``"causal_attention"``, ``"sdpa"`` or ``"eager"``.
        why: The reason that it was not ours, or None.
    """

    module: nn.Module
    to: str
    why: str | None


# Whoever listens to the calls of this thread: gets each with its arguments and its result.
Listener = Callable[[Call, Tensor, Attention, tuple[Any, ...], dict[str, Any]], None]
_listener: ContextVar[Listener | None] = ContextVar("fastlm_attention_listener", default=None)


def register() -> None:
    """Make the name known to transformers; nothing that is there is changed."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, masks.attention_mask)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers' layers call it.

    Causal attention of a mask that :mod:`fastlm.hf.masks` knows, with softcap and sinks, is
    :func:`fastlm.causal_attention`.  Any other call goes where it would go without us: to torch's
    attention, or to the function of the model's own file for what that does not have.

    Args:
        module: The layer.
        query: ``(B, H, T, D)``.
        key: ``(B, G, S, D)``.
        value: ``(B, G, S, Dv)``.
        attention_mask: None, a mask of ours, or dense, bool or added to the scores.
        dropout: Probability; of 0 alone ours.
        scaling: Factor of the scores; None for ``1 / sqrt(D)``.
        is_causal: None for what the layer says.
        kwargs: ``softcap``, ``s_aux`` (sinks), and what else the model passes down.

    Returns:
        ``(B, T, H, Dv)``, contiguous, and None, or the weights where the model's own function ran.
    """
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    wants = _wants(type(module))
    call = (query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    why_not = _refusal(*call, wants)
    options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
    if why_not is None:
        out = _ours(query, key, value, attention_mask, scaling, kwargs)
        result: tuple[Tensor, Tensor | None] = out, None
    else:
        _, other = _other(module, wants, kwargs)
        result = other(module, query, key, value, attention_mask, **options)
    if not torch.compiler.is_compiling() and (listener := _listener.get()) is not None:
        to, other = _other(module, wants, kwargs)
        heard = Call(module, "causal_attention" if why_not is None else to, why_not)
        listener(heard, result[0], other, (module, query, key, value, attention_mask), options)
    return result


def _refusal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: object,
    is_causal: bool,
    kwargs: dict[str, Any],
    wants: str | None,
) -> str | None:
    """Why the call is not ours, or None; constant sentences, since a compiler traces this."""
    foreign = [*_FOREIGN, *(wants or "").split(",")]
    for name in foreign:
        if kwargs.get(name) is not None:
            return "the model passes something that causal_attention has no argument for"
    if wants is None and "softcap" not in kwargs and "s_aux" not in kwargs:
        return "the model's file has no attention but its own"
    if kwargs.get("output_attentions"):
        return "the weights are asked for, which are never stored"
    if dropout != 0.0:
        return "causal_attention has no dropout"
    if not (scaling is None or isinstance(scaling, (float, int))):
        return "the scale is no number"
    if mask is None:
        if not is_causal and query.shape[2] > 1:
            return "it is not causal"
        if query.shape[2] > key.shape[2]:
            return "there are more queries than keys"
    else:
        visible = visible_of(mask)
        if visible is None:
            return "the mask is a tensor, and only its values could tell whom it hides"
        if mask.shape[0] != query.shape[0] or visible.num_keys != key.shape[2]:
            return "the mask is made for other sizes"
        if mask.shape[2] != query.shape[2]:
            return "the mask is made for other sizes"
        if visible.key_start is not None and _bounds(query, kwargs) is not None:
            return "rows have both documents and padding"
    if _bounds(query, kwargs) is not None and query.shape[2] != key.shape[2]:
        return "documents are packed beside a cache"
    if not _fits(query, key, value):
        return "sizes, dtypes or devices are none that causal_attention takes"
    return None


def _bounds(query: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """Of the documents that the model was told of, beside what its mask says."""
    return kwargs.get("cu_seq_lens_q") if query.shape[2] > 1 else None


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    heads, kv_heads = query.shape[1], key.shape[1]
    return (
        query.dim() == key.dim() == value.dim() == 4
        and query.shape[0] == key.shape[0] == value.shape[0]
        and kv_heads == value.shape[1]
        and kv_heads > 0
        and heads % kv_heads == 0
        and key.shape[2] == value.shape[2]
        and query.shape[3] == key.shape[3]
        and 1 <= query.shape[3] <= MAX_HEAD_DIM
        and 1 <= value.shape[3] <= MAX_HEAD_DIM
        and query.dtype in FLOAT_DTYPES
        and query.dtype == key.dtype == value.dtype
        and query.device == key.device == value.device
        and query.device.type in ("cpu", "cuda")
    )


def _ours(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    batch, num_queries = query.shape[:2]
    options: dict[str, Any] = {
        "scale": scaling, "softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux"),
    }  # fmt: skip
    visible = visible_of(mask)
    used, bounds = key.shape[1], kwargs.get("cu_seq_lens_q") if num_queries > 1 else None
    if visible is None:
        if num_queries > 1:  # the beginnings are aligned: the rest of the cache is empty
            used = num_queries
    else:
        used = visible.used_keys
        bounds = bounds if visible.cu_seqlens is None else visible.cu_seqlens
        options["window_size"] = visible.window_size
        if visible.key_start is not None and visible.key_end is not None:
            options["key_start"] = visible.key_start.expand(batch)
            options["key_end"] = visible.key_end.expand(batch)
    if used < key.shape[1]:
        key, value = key[:, :used], value[:, :used]
    if bounds is not None:
        options["cu_seqlens_q"] = bounds
        query, key, value = (x.flatten(0, 1).unsqueeze(0) for x in (query, key, value))
    out = cast(Tensor, causal_attention(query, key, value, **options))
    return out.reshape(batch, num_queries, *out.shape[2:]).contiguous()


@torch.compiler.assume_constant_result
def _wants(layer: type) -> str | None:
    """What the function of the layer's file takes beside the usual, comma-separated.

    None where its models may run on no attention but that.
    """
    return _read(layer)


@functools.cache
def _read(layer: type) -> str | None:
    forward: Any = inspect.unwrap(layer.forward)  # type: ignore[attr-defined]
    names = vars(sys.modules.get(forward.__module__, object))
    models: list[Any] = [
        x for x in names.values()
        if isinstance(x, type) and issubclass(x, PreTrainedModel)
        and x.__module__ == names["__name__"]
    ]  # fmt: skip
    if models and not any(x._supports_sdpa for x in models):
        return None
    eager = names.get(_EAGER)
    taken = set(inspect.signature(eager).parameters) if eager else set()
    return ",".join(sorted(taken - _STANDARD))


def _other(module: nn.Module, wants: str | None, kwargs: dict[str, Any]) -> tuple[str, Attention]:
    """Who attends where ours does not, by name and as a function."""
    beyond_sdpa = (
        kwargs.get("softcap") is not None
        or kwargs.get("s_aux") is not None
        or kwargs.get("output_attentions")
        or wants is None
    )
    # of the file that the forward is in, which has it at hand as its default
    eager = type(module).forward.__globals__.get(_EAGER)
    if beyond_sdpa and eager is not None:
        return "eager", functools.partial(_eager, eager)
    return "sdpa", _sdpa


def _sdpa(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    *tensors, mask = args
    return sdpa_attention_forward(module, *tensors, _dense(mask), **kwargs)


def _eager(
    eager: Attention,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    is_causal: bool,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The model's own function, which takes a mask that is added to the scores, or none at all."""
    mask = _dense(mask)
    if mask is None and is_causal and query.shape[2] > 1:
        shape = (query.shape[2], key.shape[2])
        mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None and mask.dtype == torch.bool:
        zeros = torch.zeros((), dtype=query.dtype, device=query.device)
        mask = torch.where(mask, zeros, torch.finfo(query.dtype).min)
    return eager(module, query, key, value, mask, **kwargs)


def _dense(mask: Tensor | None) -> Tensor | None:
    return mask.dense() if isinstance(mask, Mask) else mask
