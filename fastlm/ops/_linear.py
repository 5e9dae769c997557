"""What the ops on a linear layer share: checks, and casts under autocast."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops._autocast import dtype_under_autocast
from fastlm.ops._checks import (
    check_dtype,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
    check_that,
)


def check_linear(
    op: str,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    *,
    may_be_empty: bool = False,
) -> torch.dtype:
    """Check a layer for ``input``, itself checked, and return the dtype to compute in.

    A shard of a layer may have no classes.
    """
    others = {"linear_weight": linear_weight}
    if linear_bias is not None:
        others["linear_bias"] = linear_bias
    dtype = dtype_under_autocast(input)
    for name, tensor in others.items():
        check_tensor(op, name, tensor)
        check_dtype(op, name, tensor)
        check_same_device(op, name, tensor, "input", input)
        if dtype_under_autocast(tensor) != dtype:
            check_same_dtype(op, name, tensor, "input", input)
    check_shape(op, "linear_weight", linear_weight, ("V", input.shape[-1]), "to match input")
    vocab_size = linear_weight.shape[0]
    if not may_be_empty:
        check_that(op, "linear_weight", vocab_size > 0, "have at least one class", "V = 0")
    if linear_bias is not None:
        check_shape(op, "linear_bias", linear_bias, (vocab_size,), "to match linear_weight")
    return dtype


def cast_to(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [x if x is None or x.dtype == dtype else x.to(dtype) for x in tensors]
