"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.ops._autograd import once_differentiable, tie
from fastlm.ops._checks import (
    check_dtype,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
    check_that,
)
from fastlm.ops._define import define_op

BACKENDS = {
    "triton": "fastlm.kernels.rotary",
    "cuda": "fastlm.ops.cuda.rotary",
    "torch": "fastlm.ops.eager.rotary",
    "reference": "fastlm.ops.reference.rotary",
}


def apply_rotary(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rotate pairs of channels of each query and key by the angles of their positions.

    Channels ``i`` and ``i + R/2`` form a pair, as in Llama and GPT-NeoX; with ``interleaved``
    channels ``2i`` and ``2i + 1``, as in the paper (Su et al., 2021,
    https://arxiv.org/abs/2104.09864).  Channels from R on stay as they are.  Low precision is
    computed in float32 and rounded once; the gradient is the opposite rotation, so only ``cos`` and
    ``sin`` are kept for it.

    Args:
        query: ``(B, T, H, D)``; float32, bfloat16, float16 or float64.
        key: ``(B, T, G, D)`` of the same dtype.
        cos: ``(T, R/2)``, or ``(B, T, R/2)`` for positions that differ by sequence, R <= D; any of
            these dtypes.
        sin: Shape and dtype of ``cos``.
        interleaved: Pair neighbouring channels.
        backend: ``"auto"``, ``"triton"``, ``"cuda"``, ``"torch"`` or ``"reference"``.

    Returns:
        Rotated query and key, new tensors of the same shapes and dtype.

    Raises:
        ValueError: Shapes or devices do not match, R > D, or ``cos`` or ``sin`` requires a
            gradient.
        TypeError: A dtype is not one of those above, or those of a pair differ.
        NotImplementedError: ``backend`` cannot take these inputs; the message says why.
    """
    for name, tensor in (("query", query), ("key", key), ("cos", cos), ("sin", sin)):
        check_tensor("apply_rotary", name, tensor)
        check_dtype("apply_rotary", name, tensor)
        check_same_device("apply_rotary", name, tensor, "query", query)
    check_shape("apply_rotary", "query", query, ("B", "T", "H", "D"))
    batch, length, _, head_dim = query.shape
    check_shape("apply_rotary", "key", key, (batch, length, "G", head_dim), "to match query")
    check_same_dtype("apply_rotary", "key", key, "query", query)
    leading = (batch, length) if cos.dim() == 3 else (length,)
    check_shape("apply_rotary", "cos", cos, (*leading, "R/2"), "to match query")
    check_shape("apply_rotary", "sin", sin, cos.shape, "to match cos")
    check_same_dtype("apply_rotary", "sin", sin, "cos", cos)
    pairs = cos.shape[-1]
    check_that(
        "apply_rotary", "cos", 2 * pairs <= head_dim, f"rotate at most {head_dim}", 2 * pairs
    )
    constant = not (cos.requires_grad or sin.requires_grad)
    check_that("apply_rotary", "cos and sin", constant, "be constants", "one that requires grad")
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return _ApplyRotary.apply(query, key, cos, sin, interleaved, backend)[:2]
    return _forward(query, key, cos, sin, interleaved, backend)


class _ApplyRotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tied = tie(cos)
        ctx.save_for_backward(cos, sin, tied)
        ctx.interleaved, ctx.backend = interleaved, backend
        return *_forward(query, key, cos, sin, interleaved, backend), tied

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dquery: Tensor, dkey: Tensor, dtied: Tensor
    ) -> tuple[Tensor | None, ...]:
        cos, sin, _ = ctx.saved_tensors
        grads = _backward(dquery, dkey, cos, sin, ctx.interleaved, ctx.backend)
        return *grads, None, None, None, None


def _fake(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


_forward = define_op("apply_rotary", "forward", BACKENDS, fake=_fake)
_backward = define_op("apply_rotary", "backward", BACKENDS, fake=_fake)
