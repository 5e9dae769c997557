"""Causal attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastlm.ops._autocast import dtype_under_autocast
from fastlm.ops._autograd import once_differentiable
from fastlm.ops._checks import (
    FLOAT_DTYPES,
    PLAIN,
    check_dtype,
    check_integer,
    check_real,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
    check_that,
    is_distributed,
    within_float32,
)
from fastlm.ops._define import define_op, may_be_left_to
from fastlm.ops.eager.attention import with_torchs_graph
from fastlm.ops.reference._key_ranges import Sequences

MAX_HEAD_DIM = 512
_INT32_MAX = 2**31 - 1
BACKENDS = {
    "triton": "fastlm.kernels.attention",
    "cuda": "fastlm.ops.cuda.attention",
    "torch": "fastlm.ops.eager.attention",
    "reference": "fastlm.ops.reference.attention",
    # last, so that auto never gets to it
    "gluon": "fastlm.kernels.attention.gluon",
}


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    window_size: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which each query sees the keys up to its own position.

    Agrees with :func:`torch.nn.functional.scaled_dot_product_attention` with ``is_causal=True`` on
    transposed tensors where T == S.  Elsewhere the ends are aligned, not the beginnings: query t
    sees the keys s <= t + S - T, so that one query over a cache sees all of it.  A query that sees
    no key has out 0, lse -inf and gradient 0.  Scores are never stored (Dao, 2023,
    https://arxiv.org/abs/2307.08691).  The triton and cuda backends copy no input and give the same
    bits in every run, and a sequence the same bits whatever is packed, padded or batched with it;
    the torch backend copies what torch's kernels cannot read: 16-bit inputs on CPUs without
    instructions for them, values whose head_dim is not query's.  A NaN or infinity may also spoil
    positions that do not see it, 0 * NaN being NaN: with reference none, with triton and cuda no
    lse and nothing 256 positions away or further, with torch any.  The triton backend refuses a
    head_dim whose tiles do not fit the GPU's shared memory, which none up to 256 does in 32 or 16
    bits; the cuda backend one above 256, and what docs/cuda.md lists.  float32 products on a GPU
    are in tf32 where ``torch.backends.cuda.matmul.fp32_precision`` says so, but with cuda never.

    Under autocast query, key and value are cast as for torch's attention.  DTensors of one mesh are
    attended where they are if split along rows (dim 0) or heads (dim 2), key heads evenly, and else
    moved first; then all tensors must be DTensors.

    Args:
        query: ``(B, T, H, D)``; float32, bfloat16, float16 or float64; D from 1 to 512.
        key: ``(B, S, G, D)``, dtype of query; H must be a multiple of G, and query head h reads key
            and value head ``h // (H // G)``.
        value: ``(B, S, G, Dv)``, dtype of query; Dv from 1 to 512.
        scale: Factor of the scores, any float; None for ``1 / sqrt(D)``.
        window_size: How many of the latest keys each query sees, that of its own position included
            (Beltagy et al., 2020, https://arxiv.org/abs/2004.05150); at least 1.
        softcap: Positive: scores become ``softcap * tanh(score / softcap)`` (Gemma 2,
            https://arxiv.org/abs/2408.00118, section 2).
        sinks: ``(H,)``, any float dtype, below infinity: the score of one more key, whose value is
            0, for every query of a head; learnable (Agarwal et al., 2025, https://arxiv.org/abs/2508.10925).
        cu_seqlens_q: ``(documents + 1,)`` int32 or int64, on the device, for B == 1: document d has
            the queries from ``cu_seqlens_q[d]`` to ``cu_seqlens_q[d + 1]``, and sees its own keys
            alone, aligned at their ends.  Begins with 0, never falls, and ends by T; documents may
            be empty.  The queries after the last see nothing.  Nothing is read on the host, and
            lengths are no part of what is compiled.  See
            :func:`fastlm.cu_seqlens_from_position_ids`.
        cu_seqlens_k: The same of the keys; None if they are divided like the queries.
        key_start: ``(B,)`` int32 or int64, on the device: the keys of row b before
            ``key_start[b]`` are padding, which no query sees.
        key_end: ``(B,)``: so are those from ``key_end[b]`` on.
        return_lse: Also return the log-sum-exp of each query's scores, its sink included.
        backend: ``"auto"``, ``"triton"``, ``"cuda"``, ``"torch"`` or ``"reference"``; also
            ``"gluon"``, the kernel for Hopper, which takes no options and has run on no GPU yet.

    Returns:
        ``out`` ``(B, T, H, Dv)`` in the dtype of query; with ``return_lse`` also ``lse``
        ``(B, H, T)``, natural log, float32, float64 for float64 inputs.  Both are differentiable.

    Raises:
        ValueError: Shapes or devices do not match, a number is out of range, or boundaries on a CPU
            are none.  On a GPU boundaries are not looked at: wrong ones give wrong results, but
            reach no memory beyond the tensors.
        TypeError: A dtype is not one of those above, or they differ.
        NotImplementedError: ``backend`` cannot take these inputs; the message says why.
    """
    if torch._C._is_any_autocast_enabled():
        query, key, value = _cast(query, key, value)
    _check_arguments(query, key, value)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    else:
        check_real("causal_attention", "scale", scale)
        scale = float(scale)
    sequences: Sequences = (cu_seqlens_q, cu_seqlens_k, key_start, key_end)
    if not (cu_seqlens_q is cu_seqlens_k is key_start is key_end is None):
        sequences = _check_sequences(query, key, *sequences)
    if window_size is not None or softcap is not None or sinks is not None:
        _check_options(query, window_size, softcap, sinks)
    if window_size is not None:
        window_size = min(int(window_size), _INT32_MAX)
    if softcap is not None:
        softcap = within_float32(softcap)
    is_fused = softcap is sinks is None and not return_lse
    if is_fused and may_be_left_to("torch", BACKENDS, backend, (query, key, value, *sequences)):
        alone = with_torchs_graph(query, key, value, sequences, scale, window_size)
        if alone is not None:
            return alone
    if torch.is_grad_enabled() and (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or (sinks is not None and sinks.requires_grad)
    ):
        # the compiler takes no tensor twice
        if value is key or value is query:
            value = value.view_as(value)
        if key is query:
            key = key.view_as(key)
        out, lse = _CausalAttention.apply(
            query, key, value, sinks, *sequences, scale, window_size, softcap, backend
        )
    else:
        out, lse = _forward(
            query, key, value, sinks, *sequences, scale, window_size, softcap, backend
        )
    return (out, lse) if return_lse else out


def _cast(*tensors: Tensor) -> list[Tensor]:
    """Under autocast, as torch casts the inputs of its attention."""
    return [
        x.to(dtype_under_autocast(x)) if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in tensors
    ]


def _check_arguments(query: Tensor, key: Tensor, value: Tensor) -> None:
    if _is_usual(query, key, value):
        return
    op = "causal_attention"
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(op, name, x, like=query)
    if is_distributed(query):
        from fastlm.ops import _attention_sharding  # noqa: F401
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


def _check_options(
    query: Tensor, window_size: int | None, softcap: float | None, sinks: Tensor | None
) -> None:
    op = "causal_attention"
    if window_size is not None:
        check_integer(op, "window_size", window_size)
        check_that(op, "window_size", window_size >= 1, "be at least 1", window_size)
    if softcap is not None:
        check_real(op, "softcap", softcap)
        is_cap = 0 < softcap < math.inf
        check_that(op, "softcap", is_cap, "be positive and finite", softcap)
    if sinks is not None:
        check_tensor(op, "sinks", sinks, like=query)
        check_dtype(op, "sinks", sinks)
        check_shape(op, "sinks", sinks, query.shape[2:3], "to match query")
        check_same_device(op, "sinks", sinks, "query", query)


def _check_sequences(
    query: Tensor,
    key: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
) -> Sequences:
    """Check what divides rows, and return it in int32."""
    op, batch = "causal_attention", query.shape[0]
    bounds = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    padding = {"key_start": key_start, "key_end": key_end}
    for name, x in (bounds | padding).items():
        if x is not None:
            check_tensor(op, name, x, like=query)
            check_dtype(op, name, x, (torch.int32, torch.int64))
            check_same_device(op, name, x, "query", query)
    for name, x in padding.items():
        if x is not None:
            check_shape(op, name, x, (batch,), "to match query")
            check_that(op, name, cu_seqlens_q is None, "be None with cu_seqlens_q", "a tensor")
    if cu_seqlens_q is None:
        check_that(op, "cu_seqlens_k", cu_seqlens_k is None, "come with cu_seqlens_q", "it alone")
    else:
        check_that(op, "query", batch == 1, "have B == 1 with cu_seqlens_q", batch)
        has_start = cu_seqlens_q.dim() == 1 and cu_seqlens_q.shape[0] > 0
        requirement, shape = "have shape (documents + 1,)", tuple(cu_seqlens_q.shape)
        check_that(op, "cu_seqlens_q", has_start, requirement, shape)
        if cu_seqlens_k is None:
            check_shape(op, "key", key, query.shape[:2] + key.shape[2:], "without cu_seqlens_k")
        else:
            check_shape(op, "cu_seqlens_k", cu_seqlens_k, shape, "to match cu_seqlens_q")
    if cu_seqlens_k is cu_seqlens_q:
        cu_seqlens_k = None  # the compiler takes no tensor twice
    cu_seqlens_q, cu_seqlens_k, key_start, key_end = (
        None if x is None else x.clamp(-_INT32_MAX, _INT32_MAX).int().contiguous()
        for x in (cu_seqlens_q, cu_seqlens_k, key_start, key_end)
    )
    return cu_seqlens_q, cu_seqlens_k, key_start, key_end


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        key_start: Tensor | None,
        key_end: Tensor | None,
        scale: float,
        window_size: int | None,
        softcap: float | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        inputs = (query, key, value, sinks, cu_seqlens_q, cu_seqlens_k, key_start, key_end)
        out, lse = _forward(*inputs, scale, window_size, softcap, backend)
        ctx.save_for_backward(*inputs, out, lse)
        ctx.options, ctx.backend = (scale, window_size, softcap), backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: activation checkpointing hands them out no more than that
        if dout is None:
            out = saved[-2]
            dout = out.new_zeros(()).expand(out.shape)
        need_dquery, need_dkey, need_dvalue, need_dsinks = ctx.needs_input_grad[:4]
        dquery, dkey, dvalue, dsinks = _backward(
            dout, dlse, *saved, *ctx.options,
            need_dquery, need_dkey or need_dvalue, need_dsinks, ctx.backend,
        )  # fmt: skip
        return (
            dquery if need_dquery else None,
            dkey if need_dkey else None,
            dvalue if need_dvalue else None,
            dsinks.sum((0, 2)).to(saved[3].dtype) if need_dsinks else None,
            None, None, None, None, None, None, None, None,
        )  # fmt: skip


def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    scale: float,
    window_size: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
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
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window_size: int | None,
    softcap: float | None,
    need_dquery: bool,
    need_dkey_dvalue: bool,
    need_dsinks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs = (need_dquery, need_dkey_dvalue, need_dkey_dvalue, need_dsinks)
    dquery, dkey, dvalue, dsinks = (
        x.new_empty(x.shape if need else 0)
        for x, need in zip((query, key, value, lse), needs, strict=True)
    )
    return dquery, dkey, dvalue, dsinks


_forward = define_op("causal_attention", "forward", BACKENDS, fake=_forward_fake)
_backward = define_op("causal_attention", "backward", BACKENDS, fake=_backward_fake)
