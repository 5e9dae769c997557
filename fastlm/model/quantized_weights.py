"""Weights of linear layers in 8 or 4 bits, and their products with rows of activations.

The products of a few rows are torch's own operators: they take bfloat16, add in float32 and return
bfloat16.  Those of many rows are matrix products of the weight made float again, from the same
rounded rows and rounded alike, so that a prompt and its continuation see one model.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP_SIZES = (32, 64, 128, 256)
# rows of a 4-bit weight come in sixteens, columns of an 8-bit one are read sixteen at a time
_TILE = 16
# bytes from which the operators read rows with aligned vector instructions
_ALIGNMENT = 64
# Above so many rows, by bits, making the weight float again takes less time than it saves (768 x
# 3072 on one AVX2 core; 4 bits take more to unpack).
MOST_ROWS = {8: 64, 4: 128}
_TINY = torch.finfo(torch.float32).tiny


def int8_refuses(weight: Tensor) -> str | None:
    """Why ``weight`` ``(N, C)`` cannot be held in 8 bits, or None."""
    if weight.device.type == "cuda" and not _has_kernel("aten::_weight_int8pack_mm", "CUDA"):
        return "int8 weights on CUDA need a newer PyTorch"
    if weight.shape[1] % _TILE:
        return f"int8 weights need a width that {_TILE} divides, got {weight.shape[1]}"
    return _refuses(weight)


def int4_refuses(weight: Tensor, group_size: int) -> str | None:
    """Why ``weight`` ``(N, C)`` cannot be held in 4 bits, or None."""
    if weight.device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "int4 weights need a GPU of compute capability 8.0 or above"
    if weight.shape[1] % group_size:
        return (
            f"int4 weights need a width that group_size {group_size} divides, got {weight.shape[1]}"
        )
    return _refuses(weight)


def _refuses(weight: Tensor) -> str | None:
    if weight.device.type not in ("cpu", "cuda"):
        return f"quantised weights need a CPU or a CUDA device, got {weight.device.type}"
    if weight.numel() >= 2**31:
        # the operators count elements in 32 bits
        return f"quantised weights need fewer than 2^31 elements, got {weight.numel()}"
    if not weight.isfinite().all():
        return "quantised weights need finite values"
    return None


def int8_levels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Levels ``(N, C)`` int8 and steps ``(N,)`` bfloat16, so that a weight is level times step.

    To nearest, symmetric: the step is the largest magnitude of a row over 127, rounded up to
    bfloat16 before the levels are chosen, so that no weight is further than half a step away.
    """
    weight = weight.float()
    steps = _rounded_up(weight.abs().amax(dim=1) / 127)
    levels = weight.div(steps[:, None]).round_().to(torch.int8)
    return levels, steps.bfloat16()


def int8_product(rows: Tensor, levels: Tensor, steps: Tensor) -> Tensor:
    """``(R, C)`` bfloat16 to ``(R, N)``."""
    if len(rows) <= MOST_ROWS[8]:
        return torch._weight_int8pack_mm(_aligned(rows), levels, steps)
    # levels are exact in bfloat16, which a CPU multiplies slowly
    dtype = torch.float32 if rows.device.type == "cpu" else torch.bfloat16
    return F.linear(rows.to(dtype), levels.to(dtype)).mul_(steps).bfloat16()


def int4_levels(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Levels 0 to 15 ``(N, C)`` int32; steps and middles ``(C / group_size, N, 2)`` bfloat16.

    A weight is ``(level - 8) * step + middle``.  To nearest: of a group of weights from ``low`` to
    ``high`` the step is a sixteenth of their distance, and more where rounding the middle to
    bfloat16 asks for it, so that no weight is further than half a step away.
    """
    groups = weight.float().unflatten(1, (-1, group_size))
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    # of sixteen levels the middle one is half a step above the centre
    middles = (low * (15 / 32) + high * (17 / 32)).bfloat16().float()
    steps = _rounded_up(torch.maximum((middles - low) / 8.5, (high - middles) / 7.5))
    levels = (groups - middles[..., None]).div_(steps[..., None]).round_().clamp_(-8, 7).add_(8)
    pairs = torch.stack((steps, middles), dim=-1).bfloat16()
    return levels.flatten(1).to(torch.int32), pairs.transpose(0, 1).contiguous()


def int4_packed(levels: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Levels two to a byte, in the order that the product of this device and processor reads.

    N is filled up to a multiple of 16, with zeros.
    """
    missing = -len(levels) % _TILE
    levels = F.pad(levels, (0, 0, 0, missing), value=8)
    pairs = F.pad(pairs, (0, 0, 0, missing))
    if levels.device.type == "cpu":
        return torch._convert_weight_to_int4pack_for_cpu(levels, 1), pairs
    nibbles = levels.to(torch.uint8)
    packed = torch._convert_weight_to_int4pack(
        nibbles[:, ::2] << 4 | nibbles[:, 1::2], _inner_tiles(levels.shape[1])
    )
    return packed, pairs


def int4_product(rows: Tensor, packed: Tensor, pairs: Tensor) -> Tensor:
    """``(R, C)`` bfloat16 to ``(R, N)``, N as filled up."""
    group_size = rows.shape[1] // len(pairs)
    if rows.device.type != "cpu":
        return torch._weight_int4pack_mm(_aligned(rows), packed, group_size, pairs)
    # the order that levels are packed in cannot be found out while code is compiled
    if torch.compiler.is_compiling() or len(rows) <= MOST_ROWS[4]:
        return torch._weight_int4pack_mm_for_cpu(_aligned(rows), packed, group_size, pairs)
    return torch.mm(rows.float(), _float_columns(packed, pairs)).bfloat16()


def int4_unpacked(packed: Tensor, pairs: Tensor) -> Tensor:
    """The weight ``(N, C)`` that :func:`int4_product` multiplies by, N as filled up.

    float32 on a CPU; on a GPU bfloat16, in which the operator there makes it.
    """
    if packed.device.type != "cpu":
        groups, size, _ = pairs.shape
        width = packed.numel() * 8 // size
        # each element of the product with the identity is one weight, and zeros
        eye = torch.eye(width, dtype=torch.bfloat16, device=packed.device)
        return torch._weight_int4pack_mm(eye, packed, width // groups, pairs).t()
    return _float_columns(packed, pairs).t()


def _float_columns(packed: Tensor, pairs: Tensor) -> Tensor:
    """A weight packed on a CPU, ``(C, N)`` float32.

    Rows of the weight are packed in blocks of 16, 32 or 64, as the processor's vectors are wide;
    those that are left, if any, are a block by themselves.  Within a block columns follow each
    other.
    """
    size, width = packed.shape[0], packed.shape[1] * 2
    whole = size // _block_rows() * _block_rows()
    levels = [
        _level_columns(packed.flatten()[start * width // 2 : stop * width // 2], rows, width)
        for start, stop, rows in ((0, whole, _block_rows()), (whole, size, size - whole))
        if start < stop
    ]
    steps, middles = pairs.float().unsqueeze(1).unbind(dim=-1)
    # as the product of few rows has it: level * step + (middle - 8 * step)
    lowest = middles - 8 * steps
    groups = torch.cat(levels, dim=1).unflatten(0, (len(pairs), -1))
    return torch.addcmul(lowest, groups, steps).flatten(0, 1)


def _level_columns(packed: Tensor, rows: int, width: int) -> Tensor:
    """Blocks of ``rows`` rows as ``(C, N)`` float32, from 0 to 15."""
    two = packed.view(-1, width, rows // 2)
    levels = torch.cat((two & 15, two >> 4), dim=-1)
    order = _row_order(rows)
    levels = levels if order is None else levels[..., order]
    return levels.transpose(0, 1).float().flatten(1)


@functools.cache
def _block_rows() -> int:
    # of two columns the second begins after half a block, as each byte has two rows
    columns = torch.tensor([[0, 1]], dtype=torch.int32).expand(64, 2).contiguous()
    packed = torch._convert_weight_to_int4pack_for_cpu(columns, 1).flatten()
    return 2 * int(packed.argmax())


@functools.cache
def _row_order(rows: int) -> list[int] | None:
    """Where each row of a block is among its low and then its high halves; None for in order."""
    # numbers of rows, packed, show which rows a byte has
    numbers = torch.arange(rows, dtype=torch.int32)[:, None].expand(rows, 2)
    units, sixteens = (
        torch._convert_weight_to_int4pack_for_cpu(digit.contiguous(), 1).flatten()[: rows // 2]
        for digit in (numbers % 16, numbers // 16)
    )
    found = torch.cat(((units & 15) + 16 * (sixteens & 15), (units >> 4) + 16 * (sixteens >> 4)))
    order: list[int] = found.argsort().tolist()
    return None if order == sorted(order) else order


def _rounded_up(x: Tensor) -> Tensor:
    """The smallest numbers of bfloat16 that are at least ``x``, in float32; none is 0."""
    bits = x.clamp(min=_TINY).view(torch.int32)
    return ((bits + 0xFFFF) & -0x10000).view(torch.float32)


def _aligned(rows: Tensor) -> Tensor:
    rows = rows.contiguous()
    # compiled code aligns what it is given, and has no addresses while it is traced
    is_aligned = torch.compiler.is_compiling() or rows.data_ptr() % _ALIGNMENT == 0
    return rows if is_aligned else rows.clone()


def _inner_tiles(width: int) -> int:
    return next(tiles for tiles in (8, 4, 2) if width % (16 * tiles) == 0)


def _has_kernel(operator: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)
