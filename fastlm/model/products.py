"""Matrix products of a few rows on a CPU, where reading the weight is all the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# More rows than these are a matrix product that libraries divide among threads themselves.
MOST_ROWS = 16
# Elements of a weight below which it fits in the cache of a core, and is left to one thread.
_FEW_ELEMENTS = 1 << 16


class FewRows:
    """``input @ weight.T + bias`` for a few rows on a CPU.

    BLAS libraries give a product with a vector, or with a few, to one thread, which cannot draw on
    all of the memory's bandwidth.  Here the rows of the weight are divided into as many blocks as
    there are threads, without a copy: a batch of products, which they do divide.

    Args:
        weight: ``(N, C)``, contiguous; it is read when the product is called.
        bias: ``(N,)``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._transposed, self._bias = weight.t(), bias
        size, width = weight.shape
        blocks = torch.get_num_threads()
        self._blocks: Tensor | None = None
        if blocks > 1 and size % blocks == 0 and weight.numel() >= _FEW_ELEMENTS:
            self._blocks = weight.view(blocks, size // blocks, width)

    def __call__(self, input: Tensor) -> Tensor:
        """``(R, C)`` to ``(R, N)``."""
        if self._blocks is None or input.shape[0] > MOST_ROWS:
            # one call, where F.linear makes several
            if self._bias is None:
                return torch.mm(input, self._transposed)
            return torch.addmm(self._bias, input, self._transposed)
        rows = input.shape[0]
        # transposed and not viewed as a column, with whose strides BLAS is far slower
        columns = input.t().expand(self._blocks.shape[0], -1, rows)
        out = torch.bmm(self._blocks, columns).view(-1, rows).t()
        return out if self._bias is None else out + self._bias

    def add_to(self, total: Tensor, input: Tensor) -> None:
        """Add the product to ``total`` ``(R, N)``, in place."""
        if self._blocks is None and self._bias is None:
            torch.addmm(total, input, self._transposed, out=total)
        else:
            total.add_(self(input))


def joined(layers: Sequence[nn.Linear]) -> Callable[[Tensor], Tensor]:
    """``(R, C)`` to the products of ``layers`` side by side, ``(R, N1 + N2 + ...)``.

    Small weights are copied together: a call less for each is more than reading them takes.
    """
    weights = [layer.weight for layer in layers]
    biases = [layer.bias for layer in layers]
    if all(weight.numel() < _FEW_ELEMENTS for weight in weights):
        missing = [bias is None for bias in biases]
        bias = None
        if not all(missing):
            bias = torch.cat([
                weight.new_zeros(len(weight)) if bias is None else bias
                for weight, bias in zip(weights, biases, strict=True)
            ])  # fmt: skip
        return FewRows(torch.cat(weights), bias)
    products = [FewRows(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    return lambda input: torch.cat([product(input) for product in products], dim=-1)
