"""Matrix products of a few rows on a CPU, where reading the weight is all the work."""

from __future__ import annotations

import torch
from torch import Tensor

# More rows than these are a matrix product that libraries divide among threads themselves.
MOST_ROWS = 16
# Elements of a weight below which waking a second thread takes longer than it saves.
_FEW_ELEMENTS = 1 << 16


def few_rows(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input @ weight.T + bias`` for a few rows on a CPU.

    BLAS libraries give a product with a vector, or with a few, to one thread, which cannot draw on
    all of the memory's bandwidth.  Here the rows of the weight are divided into as many blocks as
    there are threads, without a copy: a batch of products, which they do divide.

    Args:
        input: ``(R, C)``.
        weight: ``(N, C)``, contiguous.
        bias: ``(N,)``.

    Returns:
        ``(R, N)``.
    """
    blocks = torch.get_num_threads()
    size, width = weight.shape
    rows = input.shape[0]
    if rows > MOST_ROWS or size % blocks or blocks == 1 or weight.numel() < _FEW_ELEMENTS:
        return torch.nn.functional.linear(input, weight, bias)
    columns = input.t().expand(blocks, width, rows)
    out = torch.bmm(weight.view(blocks, size // blocks, width), columns)
    out = out.view(size, rows).t()
    return out if bias is None else out + bias
