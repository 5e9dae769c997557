"""First derivatives only, and an error instead of a wrong second one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Like torch's decorator of this name, for ``backward`` of an ``autograd.Function``.

    Torch's lets ``create_graph=True`` return a gradient without a graph wherever the incoming one
    needs none, as after ``loss.sum()``: a gradient penalty would then silently count for nothing.
    Here differentiating any gradient raises RuntimeError.
    """

    @functools.wraps(backward)
    def first_order(ctx: Any, *gradients: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        with torch.no_grad():
            results = backward(ctx, *gradients)
        if torch.compiler.is_compiling():
            return results
        several = isinstance(results, tuple)
        flat = results if several else (results,)
        message = f"{backward.__qualname__}: the gradient of a gradient is not implemented"
        raising = torch._C._functions.DelayedError(message.encode(), len(flat))
        marked = raising(*(_needing_gradient(x) for x in flat))
        return marked if several else marked[0] if isinstance(marked, tuple) else marked

    return first_order


def _needing_gradient(x: Any) -> Any:
    return x.detach().requires_grad_() if isinstance(x, Tensor) else x
