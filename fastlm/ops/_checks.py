"""Argument checks shared by the public ops.  Messages read ``op: argument must ..., got ...``."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.nn import Parameter

PLAIN = (Tensor, Parameter)
_NOT_ASKED = torch._C._disabled_torch_function_impl
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32,
)  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(op: str, name: str, value: object, *, like: object = None) -> None:
    """Refuse what is no plain strided tensor: lists, sparse, quantized, nested, distributed.

    Where ``like``, another of its tensors, is a DTensor, it must be one too.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_quantized:
        kind = "quantized" if value.is_quantized else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{op}: {name} must be a dense tensor, got {kind}")
    if is_distributed(value) and not is_distributed(like):
        raise TypeError(f"{op}: {name} must be a local tensor, got DTensor")
    if is_distributed(like) and not is_distributed(value):
        raise TypeError(f"{op}: {name} must be a DTensor like the others, got a local tensor")


def is_distributed(tensor: object) -> bool:
    """Whether it is a DTensor; by its name, whose module takes long to import."""
    return type(tensor).__name__ == "DTensor"


def check_dtype(
    op: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...] = FLOAT_DTYPES
) -> None:
    if tensor.dtype not in allowed:
        names = ", ".join(_name(dtype) for dtype in allowed)
        raise TypeError(f"{op}: {name} must be one of {names}, got {_name(tensor.dtype)}")


def check_same_dtype(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype:
        raise TypeError(
            f"{op}: {name} must have the dtype of {other_name}, {_name(other.dtype)}, "
            f"got {_name(tensor.dtype)}"
        )


def check_same_device(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{op}: {name} must be on the device of {other_name}, {other.device}, "
            f"got {tensor.device}"
        )


def check_shape(
    op: str, name: str, tensor: Tensor, shape: Iterable[int | str], why: str = ""
) -> None:
    """``shape`` mixes required sizes and names of sizes that may be anything."""
    shape = tuple(shape)
    fits = len(shape) == tensor.dim() and all(
        isinstance(want, str) or want == got for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
        because = f" {why}" if why else ""
        raise ValueError(
            f"{op}: {name} must have shape {wanted}{because}, got {tuple(tensor.shape)}"
        )


def check_choice(op: str, name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(allowed)}, got {value!r}")


def check_integer(op: str, name: str, value: object) -> None:
    """Not a bool, which Python calls an integer."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}")


def check_real(op: str, name: str, value: object) -> None:
    """A number, or one that a compiler traces; not a tensor, whose gradient would be lost."""
    if type(value) is not float and not isinstance(value, Real | torch.SymFloat | torch.SymInt):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")


def within_float32(softcap: float) -> float:
    """A checked softcap; beyond 2**-100 and 2**100 no score that matters would change, only that
    float32 cannot divide by it."""
    return min(max(float(softcap), 2.0**-100), 2.0**100)


def check_that(op: str, name: str, holds: bool, requirement: str, got: object) -> None:
    """The general form, for requirements that no other check words."""
    if not holds:
        raise ValueError(f"{op}: {name} must {requirement}, got {got}")


def overrides_torch(tensor: Tensor) -> bool:
    """Whether torch's functions ask the class of ``tensor``, which may stand for something else.

    ``torch.overrides.has_torch_function`` says so of any tensor in a mode, ``torch.device`` say.
    """
    kind = type(tensor)
    return kind not in PLAIN and kind.__torch_function__ is not _NOT_ASKED
