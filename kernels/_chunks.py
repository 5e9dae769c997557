"""What every backend of a chunked linear loss shares: chunk sizes and products with a wide result.

Wide is the dtype sums are kept in: float32, or float64 for float64 inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Logits held at once, in elements, and the fewest and most rows of a chunk.
#   CPU: 16 MB of float32 stay in the last-level cache; below 256 rows the weight gradient, read and
#   written by every chunk, takes over 2 % of the time.
#   GPU: the same reasoning puts the fewest at 1,024 (at 250 rows that traffic equals the products).
_CPU_LIMITS = (1 << 22, 256, 4_096)
_GPU_LIMITS = (1 << 28, 1_024, 8_192)

# Up to this vocab_size the gradient of the logits stays wide in the products that follow: they are
# short, and one or two large elements of a row would show their rounding.
_WIDE_OPERANDS = 128

# Probabilities of a large vocabulary are subnormal in float16.  The gradient of the logits is at
# most 1, so a power of two below 65,504 moves it up without overflow; the products take it out.
_FLOAT16_SCALE = 4_096.0

# The gradient of a z-loss grows with the lse; one 16 times this is still finite in float16.
_USUAL_LSE = 1_024.0

# Elements of a narrow matrix that are widened at once on CPU: 64 MB of float32.
_WIDENED_AT_ONCE = 1 << 24


def wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def rows_per_chunk(num_rows: int, vocab_size: int, device_type: str) -> int:
    """Rows whose logits are held at once: a function of shapes only, so that results repeat.

    The chunks are of even size, so the last one is no sliver.
    """
    elements, fewest, most = _CPU_LIMITS if device_type == "cpu" else _GPU_LIMITS
    limit = max(fewest, min(most, elements // vocab_size))
    num_chunks = max(1, -(-num_rows // limit))
    return max(1, -(-num_rows // num_chunks))


def matmul(
    out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False, alpha: float = 1.0
) -> None:
    """``out = alpha a @ b``, added to ``out`` with ``accumulate``; summed in the dtype of ``out``.

    Args:
        out: ``(M, N)``, wide.
        a: ``(M, K)``, wide or narrow.
        b: ``(K, N)``, wide or narrow.
        accumulate: Without it ``out`` may hold anything.
        alpha: Factor of the product.
    """
    beta = int(accumulate)
    if a.dtype == b.dtype == out.dtype and not accumulate and alpha == 1.0:
        torch.mm(a, b, out=out)
    elif a.dtype == b.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    elif out.is_cuda and a.dtype == b.dtype:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    else:
        # only CUDA multiplies narrow matrices into a wide one; widening them first is exact
        a = a.to(out.dtype)
        step = max(1, _WIDENED_AT_ONCE // max(1, b.shape[0]))
        for part, columns in zip(out.split(step, 1), b.split(step, 1), strict=True):
            torch.addmm(part, a, columns.to(out.dtype), beta=beta, alpha=alpha, out=part)


def add_rows(out: Tensor, rows: Tensor, values: Tensor) -> None:
    """``out[rows[i]] += values[i]``, always summed in the same order."""
    if out.is_cuda:
        # sorts first, where index_add_ would use atomics
        out.index_put_((rows,), values, accumulate=True)
    else:
        # walks the rows in order, where index_put_ would use atomics
        out.index_add_(0, rows, values)


@dataclass(frozen=True)
class Operand:
    """How the gradient of the logits enters the products: its dtype, and the factor it carries."""

    dtype: torch.dtype
    scale: float = 1.0


def tensor_core_operand(input: Tensor, vocab_size: int) -> Operand:
    """The dtype of ``input``, since both operands need the same; wide if that would show."""
    if vocab_size <= _WIDE_OPERANDS or input.dtype == wide_dtype(input):
        return Operand(wide_dtype(input))
    return Operand(input.dtype, _FLOAT16_SCALE if input.dtype == torch.float16 else 1.0)


class LinearGradients:
    """Gradients of a linear layer, gathered from chunks of the gradient of its output.

    The element of a row at its target is near -1 everywhere, so that its rounding to a narrow
    operand would add up instead of cancelling, and that of a second likely class shows by itself;
    what these two lost is added back in wide arithmetic.

    Attributes:
        dinput: ``(N, C)`` wide, or empty.
        dweight: ``(V, C)`` wide, or empty; written by the first chunk.
    """

    def __init__(
        self, input: Tensor, weight: Tensor, operand: Operand, need_input: bool, need_weight: bool
    ) -> None:
        wide = wide_dtype(input)
        self._input, self._weight, self._operand = input, weight, operand
        self._need_input, self._need_weight = need_input, need_weight
        self.dinput = input.new_empty(input.shape if need_input else 0, dtype=wide)
        self.dweight = input.new_empty(weight.shape if need_weight else 0, dtype=wide)
        if input.shape[0] == 0:
            self.dweight.zero_()

    def add(self, rows: slice, dlogits: Tensor, lost: tuple[Tensor, Tensor] | None) -> None:
        """Take in one chunk.

        Args:
            rows: Which rows of the input these are.
            dlogits: ``(rows, V)`` in the dtype of the operand and times its scale.
            lost: What rounding took from ``dlogits``, if it was rounded: ``(rows, k)`` columns, in
                ``[0, V)``, and of each of these elements, wide, what to add.
        """
        x, alpha = self._input[rows], 1.0 / self._operand.scale
        residuals: list[tuple[Tensor, Tensor]] = []
        if lost is not None:
            columns, values = lost
            residuals = list(zip(columns.unbind(1), (values * alpha).split(1, 1), strict=True))
        if self._need_input:
            dinput = self.dinput[rows]
            matmul(dinput, dlogits, self._weight, alpha=alpha)
            for column, residual in residuals:
                dinput.addcmul_(self._weight[column], residual)
        if self._need_weight:
            matmul(self.dweight, dlogits.t(), x, accumulate=rows.start > 0, alpha=alpha)
            for column, residual in residuals:
                add_rows(self.dweight, column, x * residual)


@dataclass(frozen=True)
class Upstream:
    """The gradients that come in for each row, wide; None is 1 for ``dlosses``, 0 for the others.

    Attributes:
        z_weight: A scalar: the gradient is also that of the sum of ``z_weight * lse**2``.
    """

    dlosses: Tensor | None = None
    dlogprobs: Tensor | None = None
    dlse: Tensor | None = None
    dentropy: Tensor | None = None
    z_weight: Tensor | None = None

    def __getitem__(self, rows: slice | Tensor) -> Upstream:
        return self.each_row(lambda x: x[rows])

    def each_row(self, change: Callable[[Tensor], Tensor]) -> Upstream:
        """With ``change`` applied to all that is per row."""
        per_row = (self.dlosses, self.dlogprobs, self.dlse, self.dentropy)
        dlosses, *stats = (None if x is None else change(x) for x in per_row)
        dlogprobs, dlse, dentropy = stats
        return Upstream(dlosses, dlogprobs, dlse, dentropy, self.z_weight)

    def within_float16(
        self,
        operand: Operand,
        ignored: Tensor,
        weight: Tensor | None,
        logit_scale: float,
        vocab_size: int,
    ) -> tuple[Upstream, Tensor | None]:
        """For a float16 operand, gradients that keep those of the logits below 1, and their factor.

        Gradients of a scaled loss, or of one divided by a count, leave the range of float16.  Those
        of ignored rows, which may be anything, have no part in the factor.

        Args:
            operand: Other dtypes need no factor.
            ignored: ``(N,)``.
            weight: ``(V,)``, of the classes.
            logit_scale: Factor of the logits.
            vocab_size: V.
        """
        if operand.dtype != torch.float16 or ignored.numel() == 0:
            return self, None
        is_plain = all(x is None for x in vars(self).values()) and weight is None
        if is_plain and abs(logit_scale) <= 1.0:
            return self, None
        like = ignored.new_ones((), dtype=torch.float32)
        peak = like if self.dlosses is None else _peak(self.dlosses, ignored)
        if weight is not None:
            peak = peak * weight.abs().amax()
        for x, most in (
            (self.dlogprobs, 1.0),
            (self.dlse, 1.0),
            # p (log p + H) is at most 1/e and H, which is at most log V
            (self.dentropy, 1.0 + math.log(vocab_size)),
        ):
            if x is not None:
                peak = peak + most * _peak(x, ignored)
        if self.z_weight is not None:
            peak = peak + 2.0 * _USUAL_LSE * self.z_weight
        peak = abs(logit_scale) * peak
        peak = torch.where(peak > 0, peak, 1.0)
        dlosses = self.dlosses
        if dlosses is None:
            dlosses = like.expand(ignored.shape).contiguous()
        z_weight = None if self.z_weight is None else self.z_weight / peak
        scaled = replace(self, dlosses=dlosses, z_weight=z_weight)
        return scaled.each_row(lambda x: x / peak), peak


def _peak(x: Tensor, ignored: Tensor) -> Tensor:
    return x.masked_fill(ignored, 0.0).abs().amax()
