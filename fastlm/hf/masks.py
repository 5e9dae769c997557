"""Masks as transformers asks for them: which keys a query sees, in numbers where it can be said."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import masking_utils
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from fastlm.ops.packing import cu_seqlens_from_document_ids

# Questions about a mask that its numbers answer: anything else is asked of the dense one.
_ABOUT = {
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda")
} | {Tensor.dim, Tensor.size}


@dataclass(frozen=True)
class Visible:
    """Which keys queries see: those up to their own position, and of these a range.

    Attributes:
        num_keys: How many keys the mask is for, the last of which may be of no use yet.
        used_keys: How many the last query sees the last of: the ends of both are aligned.
        window_size: How many of the latest keys each query sees, or None.
        key_start: ``(B,)``: the first key of each row that is no padding, or None.
        key_end: ``(B,)``: the end of these, or None.
        cu_seqlens: Boundaries of the documents that rows, one after another, consist of, or None.
    """

    num_keys: int
    used_keys: int
    window_size: int | None = None
    key_start: Tensor | None = None
    key_end: Tensor | None = None
    cu_seqlens: Tensor | None = None


class Mask(Tensor):
    """A bool mask ``(B, 1, T, S)``, True where a query sees a key, that is made when it is used.

    Our attention reads ``visible``.  Whatever else touches it finds the values that transformers
    makes for torch's attention.
    """

    visible: Visible
    dense: Callable[[], Tensor]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func is Tensor.contiguous:  # before generation hands it to the model
            return args[0]
        args, kwargs = tree_map_only(Mask, lambda mask: mask.dense(), (args, kwargs or {}))
        return func(*args, **kwargs)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function of ``attn_implementation="fastlm"``, with the arguments of transformers'.

    None means the same as to torch's attention there: causal from the first key, or one query that
    sees all.  Causal masks with padding at the ends of rows, windows, packed documents and caches
    become a :class:`Mask`; any other the dense one of transformers.  So does every mask under
    ``torch.compile``.  One of a single query, which compiled code may be given, is dense too and
    knows its numbers.  Models that compute attention themselves get the mask that they add to their
    scores.
    """
    call: dict[str, Any] = {
        "batch_size": batch_size, "q_length": q_length, "kv_length": kv_length,
        "q_offset": q_offset, "kv_offset": kv_offset, "mask_function": mask_function,
        "attention_mask": attention_mask, "local_size": local_size, "use_vmap": use_vmap,
        "allow_is_bidirectional_skip": allow_is_bidirectional_skip, "device": device,
    }  # fmt: skip
    if config is not None and not _asks_for_attention(type(config)):
        return eager_mask(**call, config=config, **kwargs)
    dense = functools.partial(sdpa_mask, **call)
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or use_vmap:
        return dense(allow_is_causal_skip=allow_is_causal_skip)
    visible = _visible(
        q_length, kv_length, q_offset, kv_offset, _recognised(mask_function), attention_mask
    )
    if visible is None:
        return dense(allow_is_causal_skip=allow_is_causal_skip)
    starts_empty = visible.used_keys == q_length > 1
    sees_all = q_length == 1 and visible.used_keys == kv_length
    if allow_is_causal_skip and (starts_empty or sees_all) and _is_plain(visible):
        return None
    dense = functools.partial(_marked, dense, allow_is_causal_skip=False)
    if q_length == 1:
        mask = dense()
        mask.visible = visible
        return mask
    data = torch.zeros((), dtype=torch.bool, device=device)
    mask = Tensor._make_subclass(Mask, data.expand(batch_size, 1, q_length, kv_length))
    mask.visible, mask.dense = visible, functools.cache(dense)
    return mask


def visible_of(mask: Tensor | None) -> Visible | None:
    """What is known of a mask of ours; nothing of what was computed from one or written into it."""
    visible = None if mask is None else getattr(mask, "visible", None)
    if visible is None or torch.compiler.is_compiling():
        return visible
    dense = mask
    if isinstance(mask, Mask):
        if not cast(Any, mask.dense).cache_info().currsize:
            return visible
        dense = mask.dense()
    made = cast(Any, dense).version_made
    return visible if made is None or made == cast(Tensor, dense)._version else None


def _marked(dense: Callable[..., Tensor], **options: Any) -> Any:
    """A dense mask that shows whether somebody wrote into it since; not in inference mode."""
    mask: Any = dense(**options)
    mask.version_made = None if mask.is_inference() else mask._version
    return mask


@torch.compiler.assume_constant_result
def _asks_for_attention(config_class: type) -> bool:
    """Whether models with such configs leave attention to a registered function."""
    return _asks(config_class)


@functools.cache
def _asks(config_class: type) -> bool:
    # models that are not in the library are taken at their word
    model = MODEL_MAPPING.get(config_class, None)
    models = model if isinstance(model, tuple) else (model,)
    return all(each is None or each._can_set_attn_implementation() for each in models)


def _is_plain(visible: Visible) -> bool:
    window = visible.window_size
    return (
        (window is None or window >= visible.used_keys)
        and visible.key_start is None
        and visible.cu_seqlens is None
    )


@dataclass
class _Rules:
    """What a mask function of transformers consists of."""

    is_causal: bool = False
    window_size: int | None = None
    documents: Tensor | None = None


def _recognised(function: Callable[..., Any]) -> _Rules | None:
    """The rules that ``function`` is the intersection of, or None if it is not all known ones.

    The functions are closures; they are told apart by the function of transformers that made them.
    """
    rules = _Rules()
    return rules if _add(rules, function) and rules.is_causal else None


def _add(rules: _Rules, function: Callable[..., Any]) -> bool:
    if function is causal_mask_function:
        rules.is_causal = True
        return True
    if getattr(function, "__module__", None) != masking_utils.__name__ or not function.__closure__:
        return False
    names, cells = function.__code__.co_freevars, function.__closure__
    held = {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
    match function.__qualname__.partition(".")[0]:
        case "and_masks":
            return all([_add(rules, part) for part in held["mask_functions"]])
        case "sliding_window_overlay":
            width = held["sliding_window"]
            rules.window_size = min(width, rules.window_size or width)
            return isinstance(width, int) and width >= 1
        case "packed_sequence_mask_function":
            rules.documents = held["packed_sequence_mask"]
            return True
        case "remap_positions_for_packed_sequence":
            # positions count up by one within a document, so distances are those of the indices
            return _add(rules, held["mask_function"])
    return False


def _visible(
    num_queries: int,
    num_keys: int,
    q_offset: int | Tensor,
    kv_offset: int,
    rules: _Rules | None,
    padding: Tensor | None,
) -> Visible | None:
    if rules is None or (padding is not None and padding.dim() != 2):
        return None
    if rules.documents is not None:
        if padding is not None or num_queries != num_keys:
            return None
        documents = rules.documents
        count = int((documents[:, -1] + 1).sum())
        bounds = cu_seqlens_from_document_ids(documents, count)
        return Visible(num_keys, num_keys, rules.window_size, cu_seqlens=bounds)
    if padding is not None:
        missing = kv_offset + num_keys - padding.shape[-1]
        padding = torch.nn.functional.pad(padding, (0, max(missing, 0)))
        padding = padding[:, kv_offset : kv_offset + num_keys]
    if num_queries == 1 and isinstance(q_offset, Tensor):
        return _of_one_query(num_keys, q_offset - kv_offset, rules.window_size, padding)
    # as transformers reads it to know if the cache is empty
    used = int(q_offset) - kv_offset + num_queries
    if not num_queries <= used <= num_keys:
        return None
    start = end = None
    if padding is not None:
        padding = padding[:, :used]
        if not bool(padding.all()):
            ends = _ends(padding)
            if ends is None:
                return None
            start, end = ends
    return Visible(num_keys, used, rules.window_size, start, end)


def _of_one_query(
    num_keys: int, position: Tensor, window_size: int | None, padding: Tensor | None
) -> Visible | None:
    """Of a query at a position that the host does not know."""
    last = position.reshape(()).long() + 1
    start, end = torch.zeros_like(last), last
    if padding is not None:
        ends = _ends(padding)
        if ends is None:
            return None
        start, end = ends[0], torch.minimum(ends[1], last)
    if window_size is not None:
        start = torch.maximum(start, last - window_size)
    # its own size, which a row has, is what attention broadcasts to
    return Visible(num_keys, num_keys, None, start, end)


def _ends(padding: Tensor) -> tuple[Tensor, Tensor] | None:
    """First and end of the tokens of each row, if they follow one another."""
    count = padding.sum(-1)
    first = padding.int().argmax(-1)
    last = padding.shape[-1] - padding.flip(-1).int().argmax(-1)
    together = (last - first == count) | (count == 0)
    if not bool(together.all()):
        return None
    return first, torch.where(count == 0, first, last)
