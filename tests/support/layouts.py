"""Every way a tensor of the same values can lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def layouts(tensor: Tensor, *, last_contiguous: bool = False) -> list[tuple[str, Tensor]]:
    """Views with the values of ``tensor`` and other strides or offsets, each in storage of its own.

    What lies between the elements is NaN, or the largest integer: reading it shows.

    Args:
        tensor: Any shape.
        last_contiguous: Leave out views whose last dimension has a stride other than 1.
    """
    views = [("contiguous", tensor.detach().clone(memory_format=torch.contiguous_format))]
    views.append(("offset", _inside(tensor, (tensor.numel() + 3,), 3)))
    if tensor.dim() == 0:
        return views
    shape = tuple(tensor.shape)
    views.append(("padded rows", _sliced(tensor, (*shape[:-1], shape[-1] + 5), 2)))
    if not last_contiguous:
        views.append(("every second", _strided_last(tensor)))
    if tensor.dim() > 1:
        views.append(("padded outside", _sliced(tensor, (shape[0], shape[1] + 3, *shape[2:]), 0)))
        for a in range(tensor.dim() - 1):
            b = a + 1
            if not (last_contiguous and b == tensor.dim() - 1):
                views.append((f"transposed {a}, {b}", _transposed(tensor, a, b)))
    for dim in range(tensor.dim() - last_contiguous):
        first = tensor.detach().narrow(dim, 0, min(1, shape[dim]))
        if shape[dim] > 1 and tensor.numel() and torch.equal(first.expand(shape), tensor):
            views.append((f"stride 0 in {dim}", first.clone().expand(shape)))
    return views


def _filled(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    dtype = tensor.dtype
    value = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max
    return torch.full(shape, value, dtype=dtype, device=tensor.device)


def _inside(tensor: Tensor, shape: tuple[int, ...], offset: int) -> Tensor:
    view = _filled(tensor, shape)[offset : offset + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor.detach())


def _sliced(tensor: Tensor, shape: tuple[int, ...], start: int) -> Tensor:
    index = tuple(slice(None, size) for size in tensor.shape)
    if start:
        index = (*index[:-1], slice(start, start + tensor.shape[-1]))
    return _filled(tensor, shape)[index].copy_(tensor.detach())


def _strided_last(tensor: Tensor) -> Tensor:
    return _filled(tensor, (*tensor.shape, 2))[..., 0].copy_(tensor.detach())


def _transposed(tensor: Tensor, a: int, b: int) -> Tensor:
    shape = list(tensor.shape)
    shape[a], shape[b] = shape[b], shape[a]
    return _filled(tensor, tuple(shape)).transpose(a, b).copy_(tensor.detach())
