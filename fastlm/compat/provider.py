"""Our attention behind torch's own ``scaled_dot_product_attention``, through torch's registry."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import attention as registry
from torch.nn.attention import SDPBackend

from fastlm.ops import _checked
from fastlm.ops._dispatch import weigh
from fastlm.ops.attention import BACKENDS

NAME = "fastlm"
_FORWARD = "aten::_scaled_dot_product_flash_attention"
_BACKWARD = "aten::_scaled_dot_product_flash_attention_backward"
_DTYPES = (torch.float16, torch.bfloat16)
# How many uses are open, and what puts back what the first of them found.
_lock = threading.Lock()
_open_uses = 0
_put_back = contextlib.ExitStack()
# Set while one of ours runs in this thread: the oracle of checked() asks torch's function.
_running = threading.local()

Forward = tuple[Tensor, Tensor, None, None, int, int, Tensor, Tensor, Tensor]


def use_as_sdpa() -> contextlib.ExitStack:
    """Run causal calls of :func:`torch.nn.functional.scaled_dot_product_attention` by our kernels.

    For models that cannot be changed.  Takes effect when it is called, for the whole process, and
    ends with the ``with`` block or ``close()``::

        with fastlm.use_as_sdpa():
            model(input_ids)

    Registers ``"fastlm"`` with torch's registry of flash-attention implementations
    (:func:`torch.nn.attention.register_flash_attention_impl`), activates it, and lets torch choose
    flash attention before its other backends, cuDNN among them.  The end puts back the
    implementation and the choice that were there; the name stays in the registry's list, as those
    of torch's own do.  Of several uses that overlap, the last to end does so.  An implementation
    that somebody else activates meanwhile is left alone.

    Ours serve what torch hands to flash attention (float16 or bfloat16, no mask, sm_80 and newer),
    provided it is causal or has one query, without dropout.  Anything else runs as before: on the
    kernel that was there, or a backend other than flash attention.  Compiled code is served
    too; so are direct calls of torch's operator, like those of ``backend="torch"``.

    Returns:
        A context manager whose ``close()`` undoes what this did; a second ``close()`` does nothing.

    Raises:
        RuntimeError: torch sees no CUDA device, or has no such registry (before 2.11).
    """
    if not hasattr(registry, "restore_flash_attention_impl"):
        raise RuntimeError(
            "use_as_sdpa: torch must have a registry of flash-attention implementations that can "
            f"be undone, got torch {torch.__version__}"
        )
    if not torch.cuda.is_available():
        raise RuntimeError(
            "use_as_sdpa: torch must see a CUDA device, got torch.cuda.is_available() False; "
            "fastlm.scaled_dot_product_attention runs anywhere"
        )
    global _open_uses, _put_back
    with _lock, contextlib.ExitStack() as changes:
        previous = registry.current_flash_attention_impl()
        if previous != NAME:
            changes.callback(_deactivate, previous)
            registry.register_flash_attention_impl(NAME, register_fn=override)
            registry.activate_flash_attention_impl(NAME)
        _prefer_flash(changes)
        kept = changes.pop_all()
        if _open_uses == 0:
            _put_back = kept
        _open_uses += 1
    use = contextlib.ExitStack()
    use.callback(_end)
    return use


def _end() -> None:
    global _open_uses
    with _lock:
        _open_uses -= 1
        if _open_uses == 0:
            _put_back.close()


def _deactivate(previous: str | None) -> None:
    if registry.current_flash_attention_impl() == NAME:
        registry.restore_flash_attention_impl()
    if registry.current_flash_attention_impl() is None and previous is not None:
        registry.activate_flash_attention_impl(previous)


def _prefer_flash(changes: contextlib.ExitStack) -> None:
    """Enable flash attention and let torch choose it before its other backends."""
    order = torch._C._get_sdp_priority_order()
    changes.callback(torch._C._set_sdp_priority_order, order)
    flash = SDPBackend.FLASH_ATTENTION.value
    torch._C._set_sdp_priority_order([flash, *(other for other in order if other != flash)])
    changes.callback(torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.flash_sdp_enabled())
    torch.backends.cuda.enable_flash_sdp(True)


class _Override:
    """What the registry keeps while ours are active."""

    def __init__(self, library: torch.library.Library) -> None:
        self._library: torch.library.Library | None = library

    def remove(self) -> None:
        # with the last reference to it go its kernels
        self._library = None


def override(dispatch_key: str = "CUDA") -> _Override:
    """Put ours in front of the kernels of torch's flash-attention operators."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        # that a kernel is overridden, which is what was asked for
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        for name, ours in ((_FORWARD, _forward), (_BACKWARD, _backward)):
            torchs = torch.library.get_kernel(name, dispatch_key)
            kernel = functools.partial(ours, torchs)
            library.impl(name, kernel, dispatch_key, with_keyset=True)
    return _Override(library)


def _forward(
    torchs: Any,
    keys: torch._C.DispatchKeySet,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Forward:
    """``_scaled_dot_product_flash_attention``: ``(B, H, T, D)``, causal is aligned at the ends.

    The lse is natural; seed and offset of the random numbers, which without dropout there are none
    of, are zeros, and the debug mask is empty.
    """
    arguments = (*_heads_inside(query, key, value), *[None] * 5, _scale(query, scale), None, None)
    causal = is_causal or query.shape[2] == 1
    if not _serves("forward", arguments, dropout_p, causal, return_debug_mask):
        return torchs.call_boxed(
            keys, query, key, value, dropout_p, is_causal, return_debug_mask, scale=scale
        )
    with _ours_running():
        out, lse = torch.ops.fastlm.causal_attention_forward.default(*arguments, "triton")
    return (
        _laid_out_like(query, out), lse, None, None, query.shape[2], key.shape[2],
        torch.zeros(2, dtype=torch.uint64, device=query.device),
        torch.zeros((), dtype=torch.uint64, device=query.device),
        query.new_empty(0),
    )  # fmt: skip


def _backward(
    torchs: Any,
    keys: torch._C.DispatchKeySet,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``_scaled_dot_product_flash_attention_backward``, of a forward by ours or by torch's."""
    dout, q, k, v, o = _heads_inside(grad_out, query, key, value, out)
    factor = _scale(query, scale)
    arguments = (
        dout, None, q, k, v, *[None] * 5, o, logsumexp, factor, None, None, True, True, False,
    )  # fmt: skip
    causal = is_causal or query.shape[2] == 1
    if not _serves("backward", arguments, dropout_p, causal, False):
        return torchs.call_boxed(
            keys, grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k,
            dropout_p, is_causal, philox_seed, philox_offset, scale=scale,
        )  # fmt: skip
    with _ours_running():
        grads = torch.ops.fastlm.causal_attention_backward.default(*arguments, "triton")
    dquery, dkey, dvalue, _ = grads
    return _laid_out_like(query, dquery), _laid_out_like(key, dkey), _laid_out_like(value, dvalue)


def _serves(
    step: str, arguments: tuple[Any, ...], dropout_p: float, causal: bool, debug_mask: bool
) -> bool:
    if getattr(_running, "ours", False) or dropout_p != 0.0 or not causal or debug_mask:
        return False
    query, key, value = arguments[2:5] if step == "backward" else arguments[:3]
    fits = (
        query.dtype in _DTYPES
        and query.dtype == key.dtype == value.dtype
        and query.dim() == key.dim() == 4
        and key.shape == value.shape
        and (query.shape[0], query.shape[3]) == (key.shape[0], key.shape[3])
        and key.shape[2] > 0
        and query.shape[2] % key.shape[2] == 0
    )
    return (
        fits and weigh("causal_attention", step, BACKENDS, "triton", arguments).backend is not None
    )


@contextlib.contextmanager
def _ours_running() -> Iterator[None]:
    _running.ours = True
    try:
        with torch.no_grad(), _autograd_within_reach():
            yield
    finally:
        _running.ours = False


def _autograd_within_reach() -> contextlib.AbstractContextManager[Any]:
    """Bring back for the oracle of checked(), which differentiates, what torch left on its way."""
    if not _checked.is_on():
        return contextlib.nullcontext()
    left = torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        left = left.remove(torch._C.DispatchKey.__members__[name])
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), left)


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def _heads_inside(*tensors: Tensor) -> list[Tensor]:
    """``(B, H, T, D)`` to ``(B, T, H, D)`` and back."""
    return [x.transpose(1, 2) for x in tensors]


def _laid_out_like(like: Tensor, result: Tensor) -> Tensor:
    """``(B, T, H, D)`` to ``(B, H, T, D)`` with the strides that torch's operator promises."""
    result, promised = result.transpose(1, 2), torch.empty_like(like)
    return result if result.stride() == promised.stride() else promised.copy_(result)
