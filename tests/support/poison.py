"""Uninitialised memory that is never zero by luck."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_MAKERS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


@contextlib.contextmanager
def poisoned(byte: int = 0xFF) -> Iterator[None]:
    """``torch.empty`` and its kin return memory of this byte, repeated.

    0xFF is NaN in every float dtype and -1 in integers; 0x7F is 3e38 in float32 and bfloat16.
    """
    originals = [getattr(owner, name) for owner, name in _MAKERS]
    for (owner, name), original in zip(_MAKERS, originals, strict=True):
        setattr(owner, name, _poisoning(original, byte))
    try:
        yield
    finally:
        for (owner, name), original in zip(_MAKERS, originals, strict=True):
            setattr(owner, name, original)


def _poisoning(original: Callable[..., Tensor], byte: int) -> Callable[..., Tensor]:
    # an inner poisoned() replaces the outer one's byte
    original = getattr(original, "__wrapped__", original)

    @functools.wraps(original)
    def maker(*args: Any, **kwargs: Any) -> Tensor:
        out = original(*args, **kwargs)
        if not torch.compiler.is_compiling():
            _fill(out, byte)
        return out

    return maker


def _fill(out: Tensor, byte: int) -> None:
    plain = type(out) is Tensor or type(out) is torch.nn.Parameter
    if not plain or isinstance(out, FakeTensor) or out.is_meta or out.layout != torch.strided:
        return
    if not out.numel() or out.is_quantized:
        return
    with torch.no_grad():
        if out.dtype == torch.bool:
            out.detach().fill_(True)
        else:
            storage = torch.tensor([], dtype=torch.uint8, device=out.device)
            storage.set_(out.untyped_storage()).fill_(byte)
