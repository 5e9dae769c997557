"""Causal attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.ops._autograd import once_differentiable
from fastlm.ops._checks import (
    FLOAT_DTYPES,
    PLAIN,
    check_dtype,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
    check_that,
)
from fastlm.ops._define import define_op

MAX_HEAD_DIM = 256
BACKENDS = {
    "triton": "fastlm.kernels.attention",
    "torch": "fastlm.ops.eager.attention",
    "reference": "fastlm.ops.reference.attention",
}


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which each query sees the keys up to its own position.

    Agrees with :func:`torch.nn.functional.scaled_dot_product_attention` with ``is_causal=True`` on
    transposed tensors where T == S.  Elsewhere the ends are aligned, not the beginnings: query t
    sees the keys s <= t + S - T, so that one query over a cache sees all of it.  A query that sees
    no key (T > S) has out 0, lse -inf and gradient 0.  Scores are never stored (Dao, 2023,
    https://arxiv.org/abs/2307.08691).  The triton backend copies no input and gives the same bits
    in every run; the torch backend copies what torch's kernels cannot read: 16-bit inputs on CPUs
    without instructions for them, values whose head_dim is not query's.  On CPU it also allocates a
    ``(T, S)`` mask of scores where T != S and T > 1.  A NaN or infinity may also spoil positions
    that do not see it, 0 * NaN being NaN: with reference none, with triton no lse and nothing 256
    positions away or further, with torch any.

    Args:
        query: ``(B, T, H, D)``; float32, bfloat16, float16 or float64; D from 1 to 256.
        key: ``(B, S, G, D)``, dtype of query; H must be a multiple of G, and query head h reads key
            and value head ``h // (H // G)``.
        value: ``(B, S, G, Dv)``, dtype of query; Dv from 1 to 256.
        scale: Factor of the scores, any float; None for ``1 / sqrt(D)``.
        return_lse: Also return the log-sum-exp of each query's scaled scores.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``out`` ``(B, T, H, Dv)`` in the dtype of query; with ``return_lse`` also ``lse``
        ``(B, H, T)``, natural log, float32, float64 for float64 inputs.  Both are differentiable.

    Raises:
        ValueError: Shapes or devices do not match, or a head_dim is out of range.
        TypeError: A dtype is not one of those above, or they differ.
        NotImplementedError: ``backend`` cannot take these inputs; the message says why.
    """
    _check_arguments(query, key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    ):
        out, lse = _CausalAttention.apply(query, key, value, scale, backend)
    else:
        out, lse = _forward(query, key, value, scale, backend)
    return (out, lse) if return_lse else out


def _check_arguments(query: Tensor, key: Tensor, value: Tensor) -> None:
    if _is_usual(query, key, value):
        return
    op = "causal_attention"
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(op, name, x)
    check_dtype(op, "query", query)
    check_shape(op, "query", query, ("B", "T", "H", "D"))
    batch, _, heads, head_dim = query.shape
    check_shape(op, "key", key, (batch, "S", "G", head_dim), "to match query")
    _, num_keys, kv_heads, _ = key.shape
    check_shape(op, "value", value, (batch, num_keys, kv_heads, "Dv"), "to match key")
    for name, x in (("key", key), ("value", value)):
        check_same_dtype(op, name, x, "query", query)
        check_same_device(op, name, x, "query", query)
    for name, x in (("query", query), ("value", value)):
        fits = 1 <= x.shape[-1] <= MAX_HEAD_DIM
        check_that(op, name, fits, f"have a head_dim of 1 to {MAX_HEAD_DIM}", x.shape[-1])
    divides = kv_heads > 0 and heads > 0 and heads % kv_heads == 0
    requirement = "have a number of heads that divides query's"
    check_that(op, "key", divides, requirement, f"{kv_heads} for {heads}")


def _is_usual(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """All of the checks in one look, where head_dims agree: one by one they take longer."""
    if not (type(query) in PLAIN and type(key) in PLAIN and type(value) in PLAIN):
        return False
    shape, kv_shape, dtype = query.shape, key.shape, query.dtype
    return (
        len(shape) == len(kv_shape) == 4
        and value.shape == kv_shape
        and shape[0] == kv_shape[0]
        and 1 <= shape[3] == kv_shape[3] <= MAX_HEAD_DIM
        and shape[2] > 0
        and kv_shape[2] > 0
        and shape[2] % kv_shape[2] == 0
        and dtype in FLOAT_DTYPES
        and dtype == key.dtype == value.dtype
        and query.device == key.device == value.device
        and query.layout == key.layout == value.layout == torch.strided
    )


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, backend: str
    ) -> tuple[Tensor, Tensor]:
        out, lse = _forward(query, key, value, scale, backend)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scale, ctx.backend = scale, backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        query, key, value, out, lse = ctx.saved_tensors
        if dout is None:
            dout = out.new_zeros(()).expand(out.shape)
        need_dquery, *need_rest = ctx.needs_input_grad[:3]
        dquery, dkey, dvalue = _backward(
            dout, dlse, query, key, value, out, lse,
            ctx.scale, need_dquery, any(need_rest), ctx.backend,
        )  # fmt: skip
        need_dkey, need_dvalue = need_rest
        return (
            dquery if need_dquery else None,
            dkey if need_dkey else None,
            dvalue if need_dvalue else None,
            None,
            None,
        )


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, num_queries, heads, _ = query.shape
    out = query.new_empty((batch, num_queries, heads, value.shape[-1]))
    dtype = torch.promote_types(query.dtype, torch.float32)
    return out, query.new_empty((batch, heads, num_queries), dtype=dtype)


def _backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    need_dquery: bool,
    need_dkey_dvalue: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dquery = query.new_empty(query.shape if need_dquery else 0)
    if need_dkey_dvalue:
        return dquery, key.new_empty(key.shape), value.new_empty(value.shape)
    return dquery, key.new_empty(0), value.new_empty(0)


_forward = define_op("causal_attention", "forward", BACKENDS, fake=_forward_fake)
_backward = define_op("causal_attention", "backward", BACKENDS, fake=_backward_fake)
