"""Allocate outputs and launch.  Arguments are already checked by the caller."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .._launch import accumulator, launch
from .._runtime import device_of, refuses_device
from . import gluon_tuning, tuning
from .backward import delta_kernel, dkdv_kernel, dq_kernel
from .forward import forward_kernel

# The kernels of each step, as tuning names them.
FORWARD, BACKWARD = ("forward",), ("delta", "dkdv", "dq")


def _refuses(steps: tuple[str, ...], query: Tensor, key: Tensor, value: Tensor) -> str | None:
    reason = refuses_device(query, "query")
    if reason is not None:
        return reason
    for name, x in (("query", query), ("key", key), ("value", value)):
        # the stride of a dimension of size 1 is never used
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            return f"the last dimension of {name} has stride {x.stride(-1)}: it must be contiguous"
        if x.shape[-1] > tuning.MAX_HEAD_DIM:
            return (
                f"{name} has a head_dim of {x.shape[-1]}, the kernels end at {tuning.MAX_HEAD_DIM}"
            )
    return too_wide(steps, query, value)


def too_wide(steps: tuple[str, ...], query: Tensor, value: Tensor) -> str | None:
    """Why one of these kernels does not fit the device of ``query``, or None."""
    head_dim, value_dim, device = query.shape[-1], value.shape[-1], device_of(query)
    # neither a window nor tf32 makes a difference: both have the rows without as a last resort
    if all(tuning.plan(x, head_dim, value_dim, query.dtype, device) for x in steps):
        return None
    dtype, limit = str(query.dtype).removeprefix("torch."), device.shared_memory // 1024
    return (
        f"tiles of head_dim {head_dim} and {value_dim} in {dtype} do not fit the {limit} KiB "
        f"of shared memory of sm_{device.arch}"
    )


def forward_refuses(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> str | None:
    return _refuses(FORWARD, query, key, value)


def backward_refuses(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: object,
) -> str | None:
    return _refuses(BACKWARD, query, key, value)


def forward(
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
    if gluon_tuning.is_proven(query.shape[-1], query.dtype):
        # here and not above: it imports what is for Hopper alone
        from . import gluon

        arguments = (
            query, key, value, sinks, cu_seqlens_q, cu_seqlens_k, key_start, key_end,
            scale, window_size, softcap,
        )  # fmt: skip
        if gluon.forward_refuses(*arguments) is None:
            return gluon.forward(*arguments)
    batch, num_queries, heads, _ = query.shape
    num_keys, kv_heads, value_dim = value.shape[1:]
    out = query.new_empty((batch, num_queries, heads, value_dim))
    lse = query.new_empty(
        (batch, heads, num_queries), dtype=torch.promote_types(query.dtype, torch.float32)
    )
    sequences = _Sequences(cu_seqlens_q, cu_seqlens_k, key_start, key_end)
    sinks = None if sinks is None else sinks.contiguous()
    options = _options(query, value, window_size, softcap)
    plan = _plan("forward", query, value, options["HAS_WINDOW"])
    launch(
        forward_kernel, (sequences.query_blocks(num_queries, plan.block_m) * batch * heads,),
        query, key, value, out, lse, sinks, *sequences.tensors,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        batch * heads, heads, heads // kv_heads, num_queries, num_keys,
        sequences.documents, _window(window_size, query, key),
        section(query, key, value), scale, softcap or 1.0,
        HAS_SINKS=sinks is not None, **sequences.flags,
        BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, **options,
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    return out, lse


def backward(
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
    batch, num_queries, heads, _ = query.shape
    num_keys, kv_heads, value_dim = value.shape[1:]
    group_size = heads // kv_heads
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    out, lse = out.contiguous(), lse.contiguous()
    delta = _delta(dout, dlse, out, lse, query)

    sequences = _Sequences(cu_seqlens_q, cu_seqlens_k, key_start, key_end)
    dquery, dkey, dvalue, dsinks = (x.new_empty(0) for x in (query, key, value, lse))
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *dout.stride()[:3])
    sizes = (num_queries, num_keys, sequences.documents, _window(window_size, query, key))
    options = {**sequences.flags, **_options(query, value, window_size, softcap)}
    if need_dkey_dvalue:
        # keys that are padding belong to no sequence, and nothing else writes theirs
        new = torch.zeros if sequences.is_padded else torch.empty
        dkey, dvalue = (new(x.shape, dtype=x.dtype, device=x.device) for x in (key, value))
        plan = _plan("dkdv", query, value)
        query_bytes = num_queries * group_size * (query.shape[-1] + value_dim) * query.itemsize
        launch(
            dkdv_kernel, (sequences.key_blocks(num_keys, plan.block_n) * batch * kv_heads,),
            query, key, value, dout, lse, delta, dkey, dvalue, *sequences.tensors, *strides,
            batch * kv_heads, kv_heads, group_size, *sizes,
            tuning.heads_per_section(batch * kv_heads, 1, query_bytes), scale, softcap or 1.0,
            SKIPS_BLIND=sequences.is_divided or num_queries > num_keys,
            BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, **options,
            num_warps=plan.num_warps, num_stages=plan.num_stages,
        )  # fmt: skip
    if need_dquery:
        dquery = query.new_empty(query.shape)
        plan = _plan("dq", query, value)
        launch(
            dq_kernel, (sequences.query_blocks(num_queries, plan.block_m) * batch * heads,),
            query, key, value, dout, lse, delta, dquery, *sequences.tensors, *strides,
            batch * heads, heads, group_size, *sizes,
            section(query, key, value), scale, softcap or 1.0,
            BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, **options,
            num_warps=plan.num_warps, num_stages=plan.num_stages,
        )  # fmt: skip
    if need_dsinks and sinks is not None:
        # of a key without value: its probability times -delta, for each query
        dsinks = (sinks.to(lse.dtype)[:, None] - lse).exp_().mul_(delta).neg_()
        dsinks.masked_fill_(lse == -torch.inf, 0.0)
    return dquery, dkey, dvalue, dsinks


def _delta(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, query: Tensor) -> Tensor:
    batch, num_queries, heads, value_dim = out.shape
    delta = torch.empty_like(lse)
    plan = _plan("delta", query, out)
    launch(
        delta_kernel, (triton.cdiv(num_queries, plan.block_m) * batch * heads,),
        out, dout, lse, None if dlse is None else dlse.contiguous(), delta,
        *dout.stride()[:3], heads, num_queries,
        VALUE_DIM=value_dim, BLOCK_M=plan.block_m, BLOCK_V=tuning.block(value_dim),
        ACC=accumulator(query.dtype), HAS_DLSE=dlse is not None,
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    return delta


class _Sequences:
    """How rows are divided: documents in one row, padding around one sequence, or neither."""

    def __init__(
        self,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        key_start: Tensor | None,
        key_end: Tensor | None,
    ) -> None:
        if cu_seqlens_k is None:
            cu_seqlens_k = cu_seqlens_q
        self.tensors = (cu_seqlens_q, cu_seqlens_k, key_start, key_end)
        self.documents = 0 if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        self.is_padded = key_start is not None or key_end is not None
        self.is_divided = cu_seqlens_q is not None or key_start is not None
        self.flags = {
            "PACKED": cu_seqlens_q is not None,
            "HAS_START": key_start is not None,
            "HAS_END": key_end is not None,
        }

    def query_blocks(self, num_queries: int, size: int) -> int:
        """Programs of a head, as ``place_queries`` counts them."""
        return self.key_blocks(num_queries, size) + self.flags["HAS_START"]

    def key_blocks(self, num_keys: int, size: int) -> int:
        """The same of ``place_keys``."""
        if self.flags["PACKED"]:
            return num_keys // size + self.documents + 1
        return triton.cdiv(num_keys, size)


def _plan(step: str, query: Tensor, value: Tensor, has_window: bool = False) -> tuning.Plan:
    plan = tuning.plan(
        step, query.shape[-1], value.shape[-1], query.dtype, device_of(query),
        has_window, uses_tf32(query),
    )  # fmt: skip
    assert plan is not None, "refused before"
    return plan


def uses_tf32(query: Tensor) -> bool:
    """What torch's own products would do; "none" there inherits, and so does this reading."""
    return query.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _precision(query: Tensor, value: Tensor) -> str:
    """Of products; where tf32 would leave too few registers for the addresses, full."""
    is_wide = max(query.shape[-1], value.shape[-1]) > 256
    is_spilling = is_wide and tuning.is_ragged(query.shape[-1], value.shape[-1], query.dtype)
    return "tf32" if uses_tf32(query) and not is_spilling else "ieee"


def _options(
    query: Tensor, value: Tensor, window_size: int | None, softcap: float | None
) -> dict[str, Any]:
    """The compile-time values that are neither in the plan nor about sequences."""
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    return {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        # whatever the lengths are, so that they change no bit of a document
        "HAS_WINDOW": window_size is not None,
        "HAS_SOFTCAP": softcap is not None,
        # where its error stays below what a score is rounded to
        "FAST_CAP": softcap is not None and softcap <= 128.0 and query.itemsize == 2,
        "PRECISION": _precision(query, value),
        "BLOCK_D": tuning.block(head_dim),
        "BLOCK_V": tuning.block(value_dim),
        "ACC": accumulator(query.dtype),
    }


def _window(window_size: int | None, query: Tensor, key: Tensor) -> int:
    """In 32 bits: more than there is makes no difference."""
    return 0 if window_size is None else min(window_size, query.shape[1] + key.shape[1])


def section(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Query heads that walk over their keys at the same time."""
    batch, _, heads, head_dim = query.shape
    _, num_keys, kv_heads, value_dim = value.shape
    key_bytes = num_keys * (head_dim + value_dim) * key.itemsize
    return tuning.heads_per_section(batch * heads, heads // kv_heads, key_bytes)
