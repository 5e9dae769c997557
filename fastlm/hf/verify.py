"""Compare what takes a layer's place with the layer, by the rule that judges every kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlm.ops._tolerance import compare

# What a model's own code may raise when it is handed something else than it was written for.
SURPRISES = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, OSError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What a comparison found.

    Attributes:
        why: The reason that the two are not the same, or None.
        error: The largest error found, as a share of the largest value; None where none was sought.
    """

    why: str | None = None
    error: float | None = None


def judge(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    inputs: Sequence[tuple[Tensor, ...]],
) -> Verdict:
    """Compare outputs and gradients of two functions, in float32, with ``theirs`` in float64."""
    worst = 0.0
    for tensors in inputs:
        try:
            truth = _with_gradients(theirs, tensors, torch.float64)
            plain = _with_gradients(theirs, tensors, torch.float32)
            actual = _with_gradients(ours, tensors, torch.float32)
        except SURPRISES as error:
            return Verdict(f"it cannot be tried: {first_line(error)}")
        for got, usual, want in zip(actual, plain, truth, strict=True):
            verdict = agree(got, usual, want)
            if verdict.why is not None:
                return verdict
            worst = max(worst, verdict.error or 0.0)
    return Verdict(error=worst)


def agree(actual: Tensor, plain: Tensor, truth: Tensor) -> Verdict:
    """Judge one result by the tolerance rule."""
    mismatch = compare(actual, plain, truth)
    if mismatch is not None:
        return Verdict(f"results differ: {mismatch}")
    largest = truth.abs().max() if truth.numel() else torch.zeros(())
    if not bool(largest > 0) or not bool(largest.isfinite()):
        return Verdict(error=0.0)
    return Verdict(error=float((actual.double() - truth).abs().max() / largest))


def first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _with_gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], dtype: torch.dtype
) -> list[Any]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
    with torch.enable_grad():
        out = function(*leaves)
        weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)
        return [out.detach(), *torch.autograd.grad(out, leaves, weights.to(out.dtype))]
