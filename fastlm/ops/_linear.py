"""What the ops on a linear layer share: checks, casts under autocast, shifted targets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops._autocast import dtype_under_autocast
from fastlm.ops._checks import (
    PLAIN,
    check_dtype,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
    check_that,
)
from fastlm.ops.cross_entropy import check_loss_arguments, is_usual_loss


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


def check_linear_loss(
    op: str,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    group: str,
) -> torch.dtype:
    """Check the tensors, and return the dtype to compute in."""
    if _is_usual_loss(input, linear_weight, target, linear_bias):
        return input.dtype
    check_loss_arguments(op, "input", input, target)
    return check_linear(op, input, linear_weight, linear_bias, may_be_empty=group != "")


def _is_usual_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None
) -> bool:
    """All of the checks in one look, without bias and autocast: one by one they take longer."""
    return (
        type(input) in PLAIN
        and type(linear_weight) in PLAIN
        and linear_bias is None
        and not torch._C._is_any_autocast_enabled()
        and is_usual_loss(input, target)
        and linear_weight.dim() == 2
        and linear_weight.shape[1] == input.shape[-1]
        and linear_weight.shape[0] > 0
        and linear_weight.dtype == input.dtype
        and linear_weight.device == input.device
        and linear_weight.layout == torch.strided
    )


def shifted(op: str, target: Tensor, shift: int, ignore_index: int) -> Tensor:
    """The target of each position; the last ``shift`` have none."""
    if shift == 0:
        return target
    steps = target.shape[-1] if target.dim() > 0 else 0
    if not 0 <= shift <= steps:  # written out only then: a traced length stays symbolic
        check_that(op, "shift", False, f"be in [0, {steps}]", shift)
    return F.pad(target[..., shift:], (0, shift), value=ignore_index)
