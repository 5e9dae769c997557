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


# Where plain torch is further off than this share of the largest value, the value is rounding.
_MEANING = 1e-3


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
        verdict = agree(actual, plain, truth)
        if verdict.why is not None:
            return verdict
        worst = max(worst, verdict.error or 0.0)
    return Verdict(error=worst)


def agree(actual: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor]) -> Verdict:
    """Judge results by the tolerance rule: all together, each in units of its largest value.

    One number alone, a loss for example, has no root mean square to speak of.  What is zero but for
    rounding, like the gradient of the biases of keys, has the unit of the largest result.
    """
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor, bool]] = []
    for results in zip(actual, plain, truth, strict=True):
        if results[0].shape != results[2].shape:
            return Verdict(f"shape {tuple(results[0].shape)}, not {tuple(results[2].shape)}")
        got, usual, want = (x.detach().double().flatten() for x in results)
        unit = want.abs().nan_to_num().max() if want.numel() else torch.zeros(())
        is_rounding = not bool((usual - want).abs().nan_to_num().le(_MEANING * unit).all())
        parts.append((got, usual, want, unit, is_rounding))
    largest = max((float(part[3]) for part in parts), default=0.0) or 1.0
    together = [
        [x / (largest if is_rounding or not unit else unit) for x in results]
        for *results, unit, is_rounding in parts
    ]
    got, usual, want = (torch.cat(each) for each in zip(*together, strict=True))
    mismatch = compare(got.to(torch.promote_types(actual[0].dtype, torch.float32)), usual, want)
    if mismatch is not None:
        return Verdict(f"results differ: {mismatch}")
    return Verdict(error=float((got - want).abs().nan_to_num().max()) if got.numel() else 0.0)


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
