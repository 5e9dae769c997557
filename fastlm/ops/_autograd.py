"""First derivatives only, and an error instead of a wrong second one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_Backward = Callable[..., tuple[Any, ...]]


def once_differentiable(backward: _Backward) -> _Backward:
    """Like torch's decorator of this name, for ``backward`` of an ``autograd.Function``.

    Torch's lets ``create_graph=True`` return a gradient without a graph wherever the incoming one
    needs none, as after ``loss.sum()``: a gradient penalty would then silently count for nothing.
    Here differentiating any gradient raises RuntimeError, with respect to whatever it depends on:
    to incoming gradients, and to the inputs, which the function must save or :func:`tie`.
    """

    @functools.wraps(backward)
    def first_order(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        if torch.compiler.is_compiling():
            with torch.no_grad():
                return backward(ctx, *gradients)
        ctx = _Unpacked(ctx)
        with torch.no_grad():
            results = backward(ctx, *gradients)
        # torch.autograd.grad visits only what leads to its inputs, as the error then does
        causes = [x for x in (*gradients, *ctx.saved_tensors) if x is not None and x.requires_grad]
        message = f"{backward.__qualname__}: the gradient of a gradient is not implemented"
        raising = torch._C._functions.DelayedError(message.encode(), len(results) + len(causes))
        return raising(*(_needing_gradient(x) for x in results), *causes)[: len(results)]

    return first_order


def tie(like: Tensor) -> Tensor:
    """An empty tensor that leads from gradients to inputs which are not saved.

    ``forward`` of the function saves it and returns it as its last output: what is saved of the
    outputs has the function itself as its history, and so every input of it.
    """
    return like.new_empty(0)


class _Unpacked:
    """A context that unpacks what it saved once: activation checkpointing allows no more."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.saved_tensors = ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _needing_gradient(x: Any) -> Any:
    return x.detach().requires_grad_() if isinstance(x, Tensor) else x
