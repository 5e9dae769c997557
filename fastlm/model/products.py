"""Matrix products of a few rows on a CPU, where reading the weight is all the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

# Of more rows than these the weight is multiplied from the right, as of a matrix of any size.
MOST_ROWS = 96
# Elements of a weight below which it fits in the cache of a core, and is left to one thread.
_FEW_ELEMENTS = 1 << 16

# Something to be done with memory that was chosen before, again and again.
Call = Callable[[], object]


class FewRows:
    """``input @ weight.T + bias`` for a few rows on a CPU, as calls on memory that stays.

    BLAS libraries give a product with a vector to one thread, which cannot draw on all of the
    memory's bandwidth.  Here the rows of the weight are divided into as many blocks as there are
    threads, without a copy: a batch of products, which they do divide.  Several vectors are
    multiplied from the right, since among threads they divide the rows of the first matrix.

    Args:
        weight: ``(N, C)``, contiguous; it is read when a product is called.
        bias: ``(N,)``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight, self._bias = weight, bias
        threads = torch.get_num_threads()
        is_divided = 1 < threads <= len(weight) and weight.numel() >= _FEW_ELEMENTS
        self._num_blocks = threads if is_divided else 1

    def into(self, input: Tensor, out: Tensor) -> list[Call]:
        """Calls that write the product of what ``input`` ``(R, C)`` holds then to ``out``.

        ``out`` is ``(R, N)``; each of its rows is contiguous.
        """
        start = None if self._bias is None else self._bias[None]
        return _calls(self._weight, self._num_blocks, input, start, out)

    def added(self, input: Tensor, total: Tensor) -> list[Call]:
        """Calls that add the product of ``input`` to ``total``, ``(R, N)``."""
        calls = _calls(self._weight, self._num_blocks, input, total, total)
        return calls if self._bias is None else [*calls, partial(total.add_, self._bias)]


def _calls(
    weight: Tensor, blocks: int, input: Tensor, start: Tensor | None, out: Tensor
) -> list[Call]:
    """The product, added to ``start`` where there is one, ``(1, N)`` or ``out`` itself."""
    rows = len(input)
    if blocks == 1 or rows > MOST_ROWS:
        if start is None:
            return [partial(torch.mm, input, weight.t(), out=out)]
        return [partial(torch.addmm, start, input, weight.t(), out=out)]
    if rows > 1:
        # it comes out the other way around
        product = weight.new_empty(len(weight), rows)
        calls: list[Call] = [partial(torch.mm, weight, input.t(), out=product)]
        if start is None:
            return [*calls, partial(out.copy_, product.t())]
        return [*calls, partial(torch.add, start, product.t(), out=out)]
    even = len(weight) // blocks * blocks
    parts = weight[:even].view(blocks, -1, weight.shape[1])

    def divided(x: Tensor) -> Tensor:
        """``(1, N)`` as ``(blocks, N / blocks, 1)``."""
        return x[:, :even].view(blocks, -1, 1)

    columns, to = input.t().expand(blocks, -1, -1), divided(out)
    if start is None:
        calls = [partial(torch.bmm, parts, columns, out=to)]
    else:
        calls = [partial(torch.baddbmm, divided(start), parts, columns, out=to)]
    if even < len(weight):
        to = out[:, even:]
        rest = to if start is out else None if start is None else start[:, even:]
        calls += _calls(weight[even:], 1, input, rest, to)
    return calls


def side_by_side(
    layers: Sequence[nn.Linear],
) -> Callable[[Tensor, Tensor], list[Call]]:
    """Like :meth:`FewRows.into`, of the products of ``layers`` side by side.

    Small weights are copied together: a call less for each is more than reading them takes.
    """
    weights = [layer.weight for layer in layers]
    biases = [layer.bias for layer in layers]
    if all(weight.numel() < _FEW_ELEMENTS for weight in weights):
        bias = None
        if any(bias is not None for bias in biases):
            bias = torch.cat([
                weight.new_zeros(len(weight)) if bias is None else bias
                for weight, bias in zip(weights, biases, strict=True)
            ])  # fmt: skip
        return FewRows(torch.cat(weights), bias).into
    products = [FewRows(weight, bias) for weight, bias in zip(weights, biases, strict=True)]

    def into(input: Tensor, out: Tensor) -> list[Call]:
        parts = out.split([len(weight) for weight in weights], dim=1)
        pairs = zip(products, parts, strict=True)
        return [call for product, part in pairs for call in product.into(input, part)]

    return into
