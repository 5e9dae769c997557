"""Causal attention by the CUDA C++ kernels of ``csrc/attention_*.cuh``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.kernels._runtime import device_of
from fastlm.ops.cuda._extension import address, dtype_of, kernels, place, refuses_device

MAX_HEAD_DIM = 256
# Warps of a block, fewer where they do not fit its shared memory: of 16-bit dtypes each has 16 or
# 32 rows, else 4 or 2.  From ahead-of-time compilation (no spills); not yet measured on a GPU.
MOST_WARPS = {2: 4, 4: 8, 8: 8}
# What heads that run together read, so that they meet in the L2 cache; not yet measured on a GPU.
SECTION_BYTES = 32 * 2**20
FORWARD, BACKWARD = ("forward",), ("dkdv", "dq")


def _refuses(steps: tuple[str, ...], query: Tensor, key: Tensor, value: Tensor) -> str | None:
    reason = refuses_device(query, "query")
    if reason is not None:
        return reason
    for name, x in (("query", query), ("key", key), ("value", value)):
        # the stride of a dimension of size 1 is never used
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            return f"the last dimension of {name} has stride {x.stride(-1)}: it must be contiguous"
        if x.shape[-1] > MAX_HEAD_DIM:
            return f"{name} has a head_dim of {x.shape[-1]}, the kernels end at {MAX_HEAD_DIM}"
    module, device = kernels(), device_of(query)
    for step in steps:
        fits = module.attention_fits(
            step=getattr(module.AttentionStep, step),
            dtype=dtype_of(query),
            head_dim=query.shape[-1],
            value_dim=value.shape[-1],
            shared_limit=device.shared_memory,
        )
        if not fits:
            dtype = str(query.dtype).removeprefix("torch.")
            return (
                f"tiles of head_dim {query.shape[-1]} and {value.shape[-1]} in {dtype} do not fit "
                f"the {device.shared_memory // 1024} KiB of shared memory of sm_{device.arch}"
            )
    return None


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
    batch, num_queries, heads, _ = query.shape
    out = query.new_empty((batch, num_queries, heads, value.shape[-1]))
    dtype = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_empty((batch, heads, num_queries), dtype=dtype)
    sinks = None if sinks is None else sinks.to(dtype).contiguous()
    sequences = (cu_seqlens_q, cu_seqlens_k, key_start, key_end)
    kernels().attention_forward(
        dtype=dtype_of(query),
        inputs=_inputs(query, key, value, *sequences, scale, window_size, softcap),
        sinks=address(sinks),
        out=address(out),
        lse=address(lse),
        plan=_plan(query),
        **place(query),
    )
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
    module = kernels()
    dout = dout if dout.shape[-1] == 1 or dout.stride(-1) == 1 else dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    out, lse = out.contiguous(), lse.contiguous()
    delta = torch.empty_like(lse)
    sequences = (cu_seqlens_q, cu_seqlens_k, key_start, key_end)
    options = (*sequences, scale, window_size, softcap)
    inputs = _inputs(query, key, value, *options)
    upstream = module.AttentionUpstream(
        dout=address(dout), dout_strides=dout.stride()[:3], lse=address(lse), delta=address(delta)
    )
    common = {"dtype": dtype_of(query), "upstream": upstream, **place(query)}
    module.attention_delta(
        inputs=inputs, out=address(out), dlse=address(dlse), delta=address(delta), **common
    )

    dquery, dkey, dvalue, dsinks = (x.new_empty(0) for x in (query, key, value, lse))
    if need_dkey_dvalue:
        # keys that are padding belong to no sequence, and nothing else writes theirs
        is_padded = key_start is not None or key_end is not None
        new = torch.zeros if is_padded else torch.empty
        dkey, dvalue = (new(x.shape, dtype=x.dtype, device=x.device) for x in (key, value))
        module.attention_dkdv(
            inputs=_inputs(query, key, value, *options, by_key_heads=True),
            dkey=address(dkey),
            dvalue=address(dvalue),
            plan=_plan(query),
            **common,
        )
    if need_dquery:
        dquery = query.new_empty(query.shape)
        module.attention_dq(inputs=inputs, dquery=address(dquery), plan=_plan(query), **common)
    if need_dsinks and sinks is not None:
        # of a key without value: its probability times -delta, for each query
        dsinks = (sinks.to(lse.dtype)[:, None] - lse).exp_().mul_(delta).neg_()
        dsinks.masked_fill_(lse == -torch.inf, 0.0)
    return dquery, dkey, dvalue, dsinks


def _inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    scale: float,
    window_size: int | None,
    softcap: float | None,
    by_key_heads: bool = False,
) -> Any:
    """What all kernels are told of a call; it holds addresses and keeps nothing alive.

    A grid has the query heads, or the key heads that walk over queries.
    """
    batch, num_queries, heads, head_dim = query.shape
    num_keys, kv_heads, value_dim = value.shape[1:]
    group_size = heads // kv_heads
    row_bytes = (head_dim + value_dim) * key.element_size()
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    return kernels().AttentionInputs(
        query=address(query),
        key=address(key),
        value=address(value),
        query_strides=query.stride()[:3],
        key_strides=key.stride()[:3],
        value_strides=value.stride()[:3],
        batch=batch,
        heads=heads,
        group_size=group_size,
        num_queries=num_queries,
        num_keys=num_keys,
        head_dim=head_dim,
        value_dim=value_dim,
        bounds_q=address(cu_seqlens_q),
        bounds_k=address(cu_seqlens_k),
        key_start=address(key_start),
        key_end=address(key_end),
        num_documents=0 if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1,
        # in 32 bits: more than there is makes no difference
        window=0 if window_size is None else max(1, min(window_size, num_queries + num_keys)),
        heads_per_section=(
            _section(1, num_queries * group_size * row_bytes)
            if by_key_heads
            else _section(group_size, num_keys * row_bytes)
        ),
        scale=scale,
        softcap=softcap or 0.0,
    )


def _section(group_size: int, bytes_per_group: int) -> int:
    """Heads that walk over what they share at the same time: whole groups of them."""
    return group_size * max(1, SECTION_BYTES // max(1, bytes_per_group))


def _plan(query: Tensor) -> Any:
    return kernels().AttentionPlan(
        most_warps=MOST_WARPS[query.element_size()], shared_limit=device_of(query).shared_memory
    )
