"""A block in which nothing may wait for the device."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_METHODS = (
    "item", "tolist", "nonzero", "cpu", "numpy", "equal", "allclose",
    "__bool__", "__int__", "__float__", "__index__",
)  # fmt: skip
_FUNCTIONS = ("nonzero", "argwhere", "equal", "allclose", "unique", "masked_select")


@contextlib.contextmanager
def no_host_sync() -> Iterator[None]:
    """Raise AssertionError where code inside reads a tensor's value on the host.

    On CPU tensors this stands for what would wait on a GPU; on a GPU torch itself watches as well.
    """
    with contextlib.ExitStack() as stack:
        for name in _METHODS:
            stack.enter_context(_swapped(Tensor, name, _refusing(f"Tensor.{name}")))
        for name in _FUNCTIONS:
            stack.enter_context(_swapped(torch, name, _refusing(f"torch.{name}")))
        stack.enter_context(_swapped(Tensor, "__getitem__", _getitem(Tensor.__getitem__)))
        if torch.cuda.is_available():
            stack.enter_context(_sync_debug_mode())
        yield


@contextlib.contextmanager
def _swapped(owner: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        # an inherited method comes back when the override goes
        setattr(owner, name, own) if own is not None else delattr(owner, name)


def _refusing(what: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"{what} waits for the device")

    return refuse


def _getitem(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def getitem(self: Tensor, index: Any) -> Tensor:
        parts = index if isinstance(index, tuple) else (index,)
        if any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts):
            raise AssertionError("indexing with a mask waits for the device")
        return original(self, index)

    return getitem


@contextlib.contextmanager
def _sync_debug_mode() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            # that the mode is a prototype
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
