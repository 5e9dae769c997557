"""Which keys a query sees: always neighbours, so a range for each query.

Causality, window, packed documents and padding all cut ranges; their intersection is one again.
"""

from __future__ import annotations

import torch
from torch import Tensor

_OP = "causal_attention"

# cu_seqlens_q, cu_seqlens_k, key_start, key_end
Sequences = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def key_ranges(
    num_queries: int,
    num_keys: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    window_size: int | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """``(first, end)``, each ``(B or 1, T)`` int64: query t sees the keys in [first[t], end[t]).

    Without ``cu_seqlens_k`` keys are divided like queries.

    Raises:
        ValueError: Boundaries on CPU are no boundaries.
    """
    tokens = torch.arange(num_queries, device=device)
    if cu_seqlens_q is not None:
        if cu_seqlens_k is None:
            cu_seqlens_k = cu_seqlens_q
        if cu_seqlens_q.is_cpu:  # where looking costs nothing
            read_boundaries("cu_seqlens_q", cu_seqlens_q, num_queries)
            read_boundaries("cu_seqlens_k", cu_seqlens_k, num_keys)
        q_bounds, k_bounds = (
            # the tokens after the last document are one more, without keys
            torch.cat([x.long(), x[-1:].long()])
            for x in (cu_seqlens_q, cu_seqlens_k)
        )
        document = torch.searchsorted(q_bounds[1:-1].contiguous(), tokens, right=True)
        low, high = k_bounds[document], k_bounds[document + 1]
        # aligned at the ends
        diagonal = high - (q_bounds[document + 1] - tokens)
    else:
        low, high = torch.zeros_like(tokens), torch.full_like(tokens, num_keys)
        diagonal = tokens + (num_keys - num_queries)
    first, end = low[None], (diagonal + 1).minimum(high)[None]
    if window_size is not None:
        first = first.maximum(diagonal + 1 - window_size)
    if key_start is not None:
        first = first.maximum(key_start.long()[:, None])
    if key_end is not None:
        end = end.minimum(key_end.long()[:, None])
    end = end.clamp(0, num_keys)
    first, end = torch.broadcast_tensors(first.clamp(min=0), end)
    return first.minimum(end), end


def read_boundaries(name: str, bounds: Tensor, num_tokens: int) -> list[int]:
    """Those of documents, from a CPU.

    Raises:
        ValueError: They begin elsewhere than at 0, fall, or end beyond the tokens.
    """
    values = bounds.tolist()
    if values[0] != 0 or sorted(values) != values or values[-1] > num_tokens:
        raise ValueError(
            f"{_OP}: {name} must begin with 0, never fall and end by {num_tokens}, got {values}"
        )
    return values


def read_padding(
    key_start: Tensor | None, key_end: Tensor | None, batch: int, num_keys: int
) -> list[tuple[int, int]]:
    """The keys of each row that are no padding, first and end, from a CPU."""
    starts = [0] * batch if key_start is None else key_start.clamp(0, num_keys).tolist()
    ends = [num_keys] * batch if key_end is None else key_end.clamp(0, num_keys).tolist()
    return [(start, max(start, end)) for start, end in zip(starts, ends, strict=True)]
