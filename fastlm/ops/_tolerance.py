"""How close is right: the one rule by which any result is judged, in tests and in checked().

``truth`` is the definition in float64 on the same rounded inputs, ``plain`` what eager torch gives
in the dtype of the output.  With e = |actual - truth| and e_plain = |plain - truth|:

    max e <= m max e_plain + a            rms e <= 1.5 rms e_plain + a / 4
    |mean(sign(truth) (actual - truth))| <= that of plain + 6 u rms(truth) / sqrt(n)

u is the unit roundoff of the output's dtype, a = 8 * 2^-24 max|truth| for float32 (2^-53 for
float64) and u * 2^-6 max|truth| for narrower dtypes.  The third line sees truncation where rounding
was due; it takes the errors of elements as independent, which a last cast to a narrow dtype makes
them, and is not asked of float32 and float64, where the errors of a row have one cause, its lse for
example.
Integers that stand for real numbers, ``truth`` and ``plain`` being those, must be the nearest:
max e <= 1/2 + m max e_plain + 8 * 2^-24 max|truth|.

Positions of NaN, +inf and -inf must be those of the truth or, where eager torch differs from it,
those of eager torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


@dataclass(frozen=True)
class Mismatch:
    """The worst element of a result that breaks the rule.

    Attributes:
        reason: Which line of the rule is broken, with its numbers.
        index: Position of the worst element.
        actual: Value there.
        expected: Float64 truth there.
    """

    reason: str
    index: tuple[int, ...]
    actual: float
    expected: float

    def __str__(self) -> str:
        return f"{self.reason}; worst at {list(self.index)}: {self.actual!r}, not {self.expected!r}"


def compare(
    actual: Tensor, plain: Tensor, truth: Tensor, *, multiple: float = 2.0
) -> Mismatch | None:
    """Judge ``actual``; ``plain`` and ``truth`` have its shape.  None means close enough.

    Args:
        actual: Result, any float dtype, or integers; its dtype decides the roundoff allowed.
        plain: The same from eager torch in the dtype of ``actual``, of integers before rounding.
        truth: The same in float64.
        multiple: m above: 2, or 3 for attention gradients with softcap or head_dim above 128.
    """
    if actual.shape != truth.shape:
        return Mismatch(f"shape {tuple(actual.shape)}, not {tuple(truth.shape)}", (), 0.0, 0.0)
    if actual.numel() == 0:
        return None
    got, want = actual.detach().double(), truth.detach().double()
    usual = plain.detach().double()
    # a value beyond the range of the output's dtype is infinite in any correct result
    representable = want.to(actual.dtype).double() if actual.is_floating_point() else want
    class_differs = (_kind(got) != _kind(representable)) & (_kind(got) != _kind(usual))
    if class_differs.any():
        return _mismatch("not finite where it should be, or the reverse", class_differs, got, want)
    finite = got.isfinite() & want.isfinite()
    if not finite.any():
        return None
    error = torch.where(finite, (got - want).abs(), 0.0)
    # what plain torch overflows in allows nothing
    usual_error = torch.where(finite & usual.isfinite(), (usual - want).abs(), 0.0)
    if not actual.is_floating_point():
        allowed = 0.5 + multiple * usual_error.max().item() + 2.0**-21 * want.abs().max().item()
        if error.max().item() <= allowed:
            return None
        reason = f"error {error.max().item():.3e}, {allowed:.3e} allowed"
        return _mismatch(reason, error, got, want)
    roundoff = _UNIT_ROUNDOFF[actual.dtype]
    scale = want[finite].abs().max().item()
    floor = (8 * roundoff if roundoff <= 2.0**-24 else roundoff * 2.0**-6) * scale

    allowed = multiple * usual_error.max().item() + floor
    if error.max().item() > allowed:
        return _mismatch(f"error {error.max().item():.3e}, {allowed:.3e} allowed", error, got, want)
    count = int(finite.sum())
    rms = (error.square().sum() / count).sqrt().item()
    allowed = 1.5 * (usual_error.square().sum() / count).sqrt().item() + floor / 4
    if rms > allowed:
        return _mismatch(f"rms error {rms:.3e}, {allowed:.3e} allowed", error, got, want)
    if actual.dtype.itemsize > 2:
        return None
    finite &= usual.isfinite()
    count = int(finite.sum())
    if not count:
        return None
    shrink = _shrink(got[finite], want[finite])
    size = want[finite].square().mean().sqrt().item()
    allowed = _shrink(usual[finite], want[finite]) + 6 * roundoff * size / count**0.5
    if shrink > allowed:
        return _mismatch(f"shrink {shrink:.3e}, {allowed:.3e} allowed", error, got, want)
    return None


def differing(reason: str, differs: Tensor, actual: Tensor, expected: Tensor) -> Mismatch | None:
    """The first element that ``differs``, of tensors that must be equal."""
    return _mismatch(reason, differs, actual, expected) if differs.any() else None


def _kind(x: Tensor) -> Tensor:
    """0 finite, 1 NaN, 2 +inf, 3 -inf."""
    return x.isnan() * 1 + x.isposinf() * 2 + x.isneginf() * 3


def _shrink(x: Tensor, truth: Tensor) -> float:
    return (truth.sign() * (x - truth)).mean().abs().item()


def _mismatch(reason: str, score: Tensor, got: Tensor, want: Tensor) -> Mismatch:
    flat = int(score.to(torch.float64).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), got.shape))
    return Mismatch(reason, index, got.flatten()[flat].item(), want.flatten()[flat].item())
