"""Causal attention by torch's own kernels, or by its operators, block by block.

torch fuses causal attention without options.  Windows, documents and padding cut it into blocks of
queries with the keys they see, which the CPU's kernel fuses one by one.  What no kernel takes, a
softcap anywhere and most options on CUDA, is written out a block at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlm.ops.eager._flash import (
    added_band,
    dtype_of,
    finish,
    flash,
    flash_backward,
    flash_plain,
    flash_plain_backward,
    flash_plain_out,
    is_plain,
    ready,
    width_of,
)
from fastlm.ops.eager._written import attend, attend_backward
from fastlm.ops.reference._key_ranges import Sequences, key_ranges, read_boundaries, read_padding

# Queries of a block that is fused with a mask: twice as many, which torch multiplies faster, where
# that adds few keys to those that most of them see.  Scores of a block that is written out.  Scores
# of a row of the batch that takes less time than a call of its own.
_FUSED_QUERIES = 128
_WRITTEN_SCORES = 1 << 19
_SMALL_SCORES = 1 << 16
_TINY = torch.finfo(torch.float32).tiny


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
    sequences = (cu_seqlens_q, cu_seqlens_k, key_start, key_end)
    if (
        cu_seqlens_q is key_start is key_end is window_size is softcap is sinks is None
        and is_plain(query, key, value)
        and _fuses_causal(scale)
    ):
        return flash_plain(query, key, value, scale)
    value_dim = value.shape[-1]
    width = width_of(query.shape[-1], value_dim, query)
    fused = _is_fused(query, width, sequences, scale, window_size, softcap)
    blocks = _blocks(query, key, sequences, scale, window_size, fused)
    q, k, v = (_heads(x, width, fused) for x in (query, key, value))
    if (only := _only(blocks, query, key)) is not None:
        out, lse = _attend(only, q, k, v, scale, softcap, fused)
        out, lse = finish(out, query, value_dim), lse.contiguous()
    else:
        batch, num_queries, heads, _ = query.shape
        out = query.new_zeros((batch, num_queries, heads, value_dim))
        dtype = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_full((batch, heads, num_queries), -torch.inf, dtype=dtype)
        for block in blocks:
            inputs = (q[block.queries], k[block.keys], v[block.keys])
            part, lse[block.queries] = _attend(block, *inputs, scale, softcap, fused)
            out.transpose(1, 2)[block.queries] = part[..., :value_dim]
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    return out, lse


def with_torchs_graph(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    scale: float,
    window_size: int | None,
) -> Tensor | None:
    """out with torch's own node behind it, where on a CPU one call of its kernel is all there is.

    Elsewhere None.  A node of ours is Python, which takes longer than a small call itself.
    """
    cu_seqlens_q, cu_seqlens_k, key_start, key_end = sequences
    is_divided = not (cu_seqlens_q is cu_seqlens_k is key_start is key_end is None)
    if window_size is None and not is_divided and is_plain(query, key, value):
        return flash_plain_out(query, key, value, scale) if _fuses_causal(scale) else None
    if not query.is_cpu or query.itemsize == 2 or query.shape[3] != value.shape[3]:
        return None
    if is_divided:
        if not _is_one_call(query, key):
            return None
        # a query that sees nothing gets 0 from torch, and gives 0
        only = _Block(_ALL, _ALL, added=_padded_mask(query, key, key_start, key_end, window_size))
    else:
        if query.shape[1] > _fused_queries(window_size):
            return None
        blocks = _blocks(query, key, sequences, scale, window_size, True)
        if (found := _only(blocks, query, key)) is None:
            return None
        only = found
    q, k, v = (ready(x, query.shape[3]) for x in (query, key, value))
    out, _ = flash(q, k, v, scale, causal=only.causal, added=only.added)
    return finish(out, query)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """out ``(B, T, H, Dv)`` and lse ``(B, H, T)`` with one more key, which has no value."""
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    share = (lse - total).exp_().masked_fill_(lse == -torch.inf, 0.0)
    return (out * share.transpose(1, 2)[..., None]).to(out.dtype), total


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
    """One operator gives all three gradients, so leaving one out would save no time."""
    sequences = (cu_seqlens_q, cu_seqlens_k, key_start, key_end)
    if (
        cu_seqlens_q is key_start is key_end is window_size is softcap is sinks is dlse is None
        and need_dquery
        and need_dkey_dvalue
        and is_plain(query, key, value)
        and _fuses_causal(scale)
    ):
        grads = flash_plain_backward(dout, query, key, value, out, lse, scale)
        return *grads, lse.new_empty(0)
    value_dim = value.shape[-1]
    width = width_of(query.shape[-1], value_dim + (dlse is not None), query)
    fused = _is_fused(query, width, sequences, scale, window_size, softcap)
    if dlse is not None and dtype_of(query) == torch.float16:
        fused = False  # of a scaled loss dlse, and what the kernel makes of it, passes 65,504
    blocks = _blocks(query, key, sequences, scale, window_size, fused)
    q, k, v, do, o = (_heads(x, width, fused) for x in (query, key, value, dout, out))
    if dlse is not None and fused:
        # a value column of ones adds dlse to each dout value^T, which is what the lse asks for;
        # in out that column is zero, so the row sums of dout out stay as they were
        v[..., value_dim] = 1.0
        do[..., value_dim] = dlse.masked_fill(lse == -torch.inf, 0.0).to(do.dtype)

    def of_block(block: _Block) -> tuple[Tensor, Tensor, Tensor]:
        at, seen = block.queries, block.keys
        tensors = (do[at], None if dlse is None else dlse[at], q[at], k[seen], v[seen], o[at])
        return _attend_backward(block, *tensors, lse[at], scale, softcap, fused)

    if (only := _only(blocks, query, key)) is not None:
        grads = of_block(only)
    else:
        grads = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
        for block in blocks:
            dq, dk, dv = of_block(block)
            grads[0][block.queries] = dq
            grads[1][block.keys] += dk
            grads[2][block.keys] += dv
    empty = query.new_empty(0)
    dquery = finish(grads[0], query) if need_dquery else empty
    dkey = finish(grads[1], key) if need_dkey_dvalue else empty.clone()
    dvalue = finish(grads[2], value) if need_dkey_dvalue else empty.clone()
    dsinks = lse.new_empty(0)
    if need_dsinks and sinks is not None:
        delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(1, 2)
        if dlse is not None:
            delta = delta - dlse
        dsinks = (sinks.to(lse.dtype)[:, None] - lse).exp_().mul_(delta).neg_()
        dsinks.masked_fill_(lse == -torch.inf, 0.0)
    return dquery, dkey, dvalue, dsinks


def _is_fused(
    query: Tensor,
    width: int,
    sequences: Sequences,
    scale: float,
    window_size: int | None,
    softcap: float | None,
) -> bool:
    """Whether torch has a kernel for it."""
    if softcap is not None:
        return False
    if not query.is_cuda:
        return query.is_cpu
    has_options = window_size is not None or any(x is not None for x in sequences)
    return query.itemsize == 2 and _fuses_causal(scale) and width <= 256 and not has_options


def _fuses_causal(scale: float) -> bool:
    """torch's causal kernels mask scores before they scale them, and -inf times 0 is NaN."""
    return scale >= _TINY


def _heads(x: Tensor, width: int, fused: bool) -> Tensor:
    """``(B, heads, T, dim)``, as what computes with it wants it."""
    if fused:
        return ready(x, width)
    return x.to(torch.promote_types(x.dtype, torch.float32)).transpose(1, 2)


def _attend(
    block: _Block,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float | None,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    if fused:
        out, lse = flash(q, k, v, scale, causal=block.causal, added=block.added)
        return out, lse if block.blind is None else lse.masked_fill(block.blind, -torch.inf)
    return attend(q, k, v, scale, softcap, block.seen)


def _attend_backward(
    block: _Block,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if fused:
        if block.blind is not None:
            lse = lse.masked_fill(block.blind, 0.0)  # -inf - -inf is NaN
        causal, added = block.causal, block.added
        return flash_backward(dout, q, k, v, out, lse, scale, causal=causal, added=added)
    return attend_backward(dout, dlse, q, k, v, out, lse, scale, softcap, block.seen)


# ---- blocks


@dataclass(frozen=True)
class _Block:
    """Queries, and the keys that at least one of them sees.

    Attributes:
        queries: Where they are in ``(B, heads, T, ...)``.
        keys: Where they are in ``(B, heads, S, ...)``.
        causal: Each query sees the keys up to its own end; otherwise all but those masked.
        seen: Bool, broadcasts to ``(B, 1, T, S)`` of the block; for what is written out.
        added: The same as 0 and -inf; for what is fused.
        blind: Bool, broadcasts to ``(B, H, T)``: queries that see no key; None if all see one.
    """

    queries: tuple[slice, slice, slice]
    keys: tuple[slice, slice, slice]
    causal: bool = False
    seen: Tensor | None = None
    added: Tensor | None = None
    blind: Tensor | None = None

    def covers(self, query: Tensor, key: Tensor) -> bool:
        return self.queries is _ALL or all(
            at[0] == slice(0, x.shape[0]) and at[2] == slice(0, x.shape[1])
            for at, x in ((self.queries, query), (self.keys, key))
        )


_ALL = (slice(None), slice(None), slice(None))
_SQUARE = _Block(_ALL, _ALL, causal=True)
_ROW = _Block(_ALL, _ALL)


def _only(blocks: Iterable[_Block], query: Tensor, key: Tensor) -> _Block | None:
    """The block that is all there is, if one is."""
    if isinstance(blocks, list) and len(blocks) == 1 and blocks[0].covers(query, key):
        return blocks[0]
    return None


def _blocks(
    query: Tensor,
    key: Tensor,
    sequences: Sequences,
    scale: float,
    window_size: int | None,
    fused: bool,
) -> Iterable[_Block]:
    cu_seqlens_q, _, key_start, key_end = sequences
    is_divided = not (cu_seqlens_q is key_start is key_end is None)
    (batch, num_queries, _, _), num_keys = query.shape, key.shape[1]
    fuses_causal = fused and _fuses_causal(scale)
    if window_size is None and not is_divided and batch > 0:
        # what most calls are, and where each microsecond counts
        if fuses_causal and num_queries == num_keys > 1:
            return [_SQUARE]
        if fused and num_queries == 1 and num_keys > 0:
            return [_ROW]
    if is_divided and not query.is_cpu:
        return _unread_blocks(query, key, sequences, window_size)
    if fused and is_divided and _is_one_call(query, key):
        added = _padded_mask(query, key, key_start, key_end, window_size)
        return [_Block(_ALL, _ALL, added=added, blind=added.amax(-1) == -torch.inf)]
    masks: dict[tuple[int, ...], Tensor] = {}
    return [
        block
        for sequence in _sequences(query, key, sequences)
        for block in _blocks_of(sequence, query, window_size, fused, fuses_causal, masks)
    ]


def _is_one_call(query: Tensor, key: Tensor) -> bool:
    """Whether padded rows take less time together, with a mask, than one by one."""
    batch, num_queries, heads, _ = query.shape
    return batch > 1 and 0 < heads * num_queries * key.shape[1] <= _SMALL_SCORES


def _padded_mask(
    query: Tensor,
    key: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    window_size: int | None,
) -> Tensor:
    """``(B, 1, T, S)``, 0 and -inf: of all rows at once, each with its padding."""
    num_queries, num_keys = query.shape[1], key.shape[1]
    width = num_keys if window_size is None else window_size
    added = added_band(num_queries, num_keys, num_keys - num_queries, width, query)
    keys = torch.arange(num_keys)
    for bound, hides in ((key_start, torch.lt), (key_end, torch.ge)):
        if bound is not None:
            hidden = torch.where(hides(keys, bound[:, None]), -torch.inf, 0.0)
            added = added + hidden[:, None].to(added.dtype)
    return added[:, None]


def _fused_queries(window_size: int | None) -> int:
    """How many of a block that is fused with a mask."""
    is_narrow = window_size is not None and window_size < 4 * _FUSED_QUERIES
    return _FUSED_QUERIES if is_narrow else 2 * _FUSED_QUERIES


@dataclass(frozen=True)
class _Sequence:
    """Some rows of the batch, and in them the queries and keys that belong together.

    Its query t sees the keys s <= t + offset.
    """

    rows: slice
    first_query: int
    num_queries: int
    first_key: int
    num_keys: int
    offset: int

    def block(self, start: int, stop: int, low: int, high: int, **mask: Any) -> _Block:
        every = slice(None)
        queries = slice(self.first_query + start, self.first_query + stop)
        keys = slice(self.first_key + low, self.first_key + high)
        return _Block((self.rows, every, queries), (self.rows, every, keys), **mask)


def _sequences(query: Tensor, key: Tensor, sequences: Sequences) -> Iterator[_Sequence]:
    """Read on the host, where it has them."""
    cu_seqlens_q, cu_seqlens_k, key_start, key_end = sequences
    batch, num_queries, num_keys = query.shape[0], query.shape[1], key.shape[1]
    if cu_seqlens_q is not None:
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        q_bounds = read_boundaries("cu_seqlens_q", cu_seqlens_q, num_queries)
        k_bounds = read_boundaries("cu_seqlens_k", cu_seqlens_k, num_keys)
        for (q, q_end), (k, k_end) in zip(
            itertools.pairwise(q_bounds), itertools.pairwise(k_bounds), strict=True
        ):
            if q == q_end:
                continue  # there may be thousands: cu_seqlens of fixed size end in them
            offset = k_end - k - (q_end - q)
            yield _Sequence(slice(0, 1), q, q_end - q, k, k_end - k, offset)
        return
    row = 0
    padding = read_padding(key_start, key_end, batch, num_keys)
    for (start, end), alike in itertools.groupby(padding):
        rows = slice(row, row + len(list(alike)))
        offset = num_keys - num_queries - start
        yield _Sequence(rows, 0, num_queries, start, end - start, offset)
        row = rows.stop


def _blocks_of(
    sequence: _Sequence,
    query: Tensor,
    window_size: int | None,
    fused: bool,
    fuses_causal: bool,
    masks: dict[tuple[int, ...], Tensor],
) -> Iterator[_Block]:
    num_queries, num_keys, offset = sequence.num_queries, sequence.num_keys, sequence.offset
    first = max(0, -offset)  # the queries before it see no key
    if first >= num_queries or num_keys == 0:
        return
    if window_size is None or window_size >= num_queries + offset:
        window_size = num_queries + offset
        if query.is_cuda and fused and fuses_causal and offset + num_queries == num_keys:
            yield sequence.block(first, num_queries, 0, num_keys, causal=num_queries - first > 1)
            return
        if query.is_cpu and fused and fuses_causal and offset <= 0:
            # a square, and below it what follows padding on the right
            middle = min(num_queries, first + num_keys)
            yield sequence.block(first, middle, 0, middle - first, causal=middle - first > 1)
            if middle < num_queries:
                yield sequence.block(middle, num_queries, 0, num_keys)
            return
    # the queries after it see no key any more
    num_queries = min(num_queries, num_keys - 1 + window_size - offset)
    step = _fused_queries(window_size)
    if not fused:
        rows = len(range(query.shape[0])[sequence.rows]) * query.shape[2]
        step = max(16, _WRITTEN_SCORES // (rows * min(num_keys, window_size)))
    for start in range(first, num_queries, step):
        stop = min(start + step, num_queries)
        low, high = max(0, start + offset + 1 - window_size), min(stop + offset, num_keys)
        diagonal = start + offset - low
        if diagonal >= high - low - 1 and stop + offset - window_size <= low:
            yield sequence.block(start, stop, low, high)
            continue
        shape = (stop - start, high - low, diagonal, window_size)
        if shape not in masks:
            masks[shape] = (added_band if fused else _seen_band)(*shape, query)
        yield sequence.block(start, stop, low, high, **{"added" if fused else "seen": masks[shape]})


def _seen_band(num_queries: int, num_keys: int, diagonal: int, width: int, query: Tensor) -> Tensor:
    """Bool; query t sees the last ``width`` keys up to t + diagonal."""
    seen = torch.ones((num_queries, num_keys), dtype=torch.bool, device=query.device)
    return seen.tril_(diagonal).triu_(diagonal + 1 - width)


def _unread_blocks(
    query: Tensor, key: Tensor, sequences: Sequences, window_size: int | None
) -> Iterator[_Block]:
    """With all keys, where the host does not know which of them are seen."""
    (batch, num_queries, heads, _), num_keys = query.shape, key.shape[1]
    first, end = key_ranges(num_queries, num_keys, *sequences, window_size, query.device)
    keys = torch.arange(num_keys, device=query.device)
    step = max(16, _WRITTEN_SCORES // max(1, batch * heads * num_keys))
    whole = _Sequence(slice(0, batch), 0, num_queries, 0, num_keys, 0)
    for start in range(0, num_queries, step):
        stop = min(start + step, num_queries)
        low, high = first[:, start:stop, None], end[:, start:stop, None]
        seen = ((keys >= low) & (keys < high))[:, None]
        yield whole.block(start, stop, 0, num_keys, seen=seen)


def forward_refuses(*args: object) -> None:
    return None


backward_refuses = forward_refuses
