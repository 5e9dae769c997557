"""Tensors as the launchers of the ops on layers take them: rows by their strides."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastlm.ops.cuda._extension import address, dtype_of, kernels


def rows_of(tensor: Tensor, strides: tuple[int, int]) -> Any:
    """The rows of a tensor, of :func:`fastlm.kernels._rows.joint_layout`."""
    stride_outer, stride_inner = strides
    return kernels().Rows(
        elements=address(tensor),
        dtype=dtype_of(tensor),
        stride_outer=stride_outer,
        stride_inner=stride_inner,
        stride_col=tensor.stride(-1),
    )


def no_rows(like: Tensor) -> Any:
    """In place of a tensor that is not there."""
    nothing = dict.fromkeys(("elements", "stride_outer", "stride_inner", "stride_col"), 0)
    return kernels().Rows(dtype=dtype_of(like), **nothing)
