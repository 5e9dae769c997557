"""Root-mean-square normalisation, optionally of a residual sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.ops._autograd import once_differentiable
from fastlm.ops._checks import (
    check_dtype,
    check_same_device,
    check_shape,
    check_tensor,
    check_that,
)
from fastlm.ops._define import define_op

BACKENDS = {
    "triton": "fastlm.kernels.rms_norm",
    "cuda": "fastlm.ops.cuda.rms_norm",
    "torch": "fastlm.ops.eager.rms_norm",
    "reference": "fastlm.ops.reference.rms_norm",
}


def rms_norm(
    input: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scale each vector to root mean square 1, then by ``weight_offset + weight``.

    Agrees with :func:`torch.nn.functional.rms_norm` over the last dimension, except that low
    precision is computed in float32 throughout and rounded once.  With ``residual`` the vectors are
    ``input + residual``, and that sum is returned too: the shape of a pre-norm transformer block.
    Keeps one number per vector for the gradient (Zhang and Sennrich, 2019,
    https://arxiv.org/abs/1910.07467).

    Args:
        input: ``(..., C)``; float32, bfloat16, float16 or float64.
        weight: ``(C,)``, any of these dtypes; None for ones.
        eps: Added to the mean square.
        weight_offset: Added to ``weight``; 1.0 for models that store the difference from one.
        residual: Shape of ``input``.  The sum has the wider of the two dtypes.
        backend: ``"auto"``, ``"triton"``, ``"cuda"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``(..., C)`` in the dtype of ``input``; with ``residual`` the pair ``(out, sum)``, both in
        the dtype of the sum.

    Raises:
        ValueError: Shapes or devices do not match, C = 0, ``eps`` is negative or NaN, or
            ``weight_offset`` comes without ``weight``.
        TypeError: A dtype is not one of those above.
        NotImplementedError: ``backend`` cannot take these inputs; the message says why.
    """
    check_tensor("rms_norm", "input", input)
    check_dtype("rms_norm", "input", input)
    has_vectors = input.dim() > 0 and input.shape[-1] > 0
    check_that("rms_norm", "input", has_vectors, "end in C > 0", tuple(input.shape))
    check_that("rms_norm", "eps", eps >= 0, "be at least 0", eps)
    if weight is None:
        check_that(
            "rms_norm", "weight_offset", not weight_offset, "be 0 without weight", weight_offset
        )
    else:
        _check_beside("weight", weight, input, input.shape[-1:])
    if residual is not None:
        _check_beside("residual", residual, input, input.shape)
    # compiled with dynamic=True a float is symbolic, and torch 2.13 fails to trace an
    # autograd.Function that gets the same symbol twice; float() makes it a constant
    eps, weight_offset = float(eps), float(weight_offset)
    tensors = (input, weight, residual)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        out, total = _RMSNorm.apply(*tensors, eps, weight_offset, backend)
    else:
        out, total, _ = _forward(*tensors, eps, weight_offset, backend)
    return out if residual is None else (out, total)


def _check_beside(name: str, tensor: Tensor, input: Tensor, shape: torch.Size) -> None:
    check_tensor("rms_norm", name, tensor)
    check_dtype("rms_norm", name, tensor)
    check_shape("rms_norm", name, tensor, shape, "to match input")
    check_same_device("rms_norm", name, tensor, "input", input)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        residual: Tensor | None,
        eps: float,
        weight_offset: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        out, total, rstd = _forward(input, weight, residual, eps, weight_offset, backend)
        ctx.save_for_backward(input if residual is None else total, weight, rstd)
        ctx.weight_offset, ctx.backend = weight_offset, backend
        ctx.dtypes = (input.dtype, None if residual is None else residual.dtype)
        if residual is None:
            ctx.mark_non_differentiable(total)
        return out, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        vectors, weight, rstd = ctx.saved_tensors
        dtype, residual_dtype = ctx.dtypes
        needs_input, needs_weight, needs_residual = ctx.needs_input_grad[:3]
        dvectors, dweight = _backward(
            dout,
            None if residual_dtype is None else dtotal,
            vectors,
            weight,
            rstd,
            ctx.weight_offset,
            needs_input or needs_residual,
            needs_weight,
            ctx.backend,
        )
        return (
            dvectors.to(dtype) if needs_input else None,
            dweight if needs_weight else None,
            dvectors.to(residual_dtype) if needs_residual else None,
            None,
            None,
            None,
        )


def _forward_fake(
    input: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = input.dtype if residual is None else torch.promote_types(input.dtype, residual.dtype)
    out = input.new_empty(input.shape, dtype=dtype)
    total = out.new_empty(0) if residual is None else torch.empty_like(out)
    rstd = input.new_empty(input.shape[:-1], dtype=torch.promote_types(dtype, torch.float32))
    return out, total, rstd


def _backward_fake(
    dout: Tensor,
    dtotal: Tensor | None,
    vectors: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    weight_offset: float,
    needs_vectors: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    dvectors = vectors.new_empty(vectors.shape if needs_vectors else 0)
    if weight is None or not needs_weight:
        return dvectors, vectors.new_empty(0)
    return dvectors, weight.new_empty(weight.shape)


_forward = define_op("rms_norm", "forward", BACKENDS, fake=_forward_fake)
_backward = define_op("rms_norm", "backward", BACKENDS, fake=_backward_fake)
