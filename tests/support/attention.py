"""What the attention tests share: small blocks, inputs, and judging by the tolerance rule."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm.kernels.attention import tuning
from fastlm.ops.reference import attention as reference
from fastlm.testing import assert_as_accurate

NAMES = ("out", "lse", "dquery", "dkey", "dvalue")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def backends(*names: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """Those of ``names`` that take ``dtype`` here: torch's on a GPU takes none of 32 or 64 bits."""
    narrow_only = {"torch"} if torch.cuda.is_available() and dtype.itemsize > 2 else set()
    return [name for name in names if name not in narrow_only]


def with_dtypes(*names: str, dtypes: Sequence[torch.dtype] = DTYPES) -> list[Any]:
    """Parameters backend and dtype: every pair that :func:`backends` allows."""
    return [
        pytest.param(name, dtype, id=f"{name}-{dtype}")
        for dtype in dtypes
        for name in backends(*names, dtype=dtype)
    ]


@contextlib.contextmanager
def blocks(block_m: int, block_n: int) -> Iterator[None]:
    """Launch with blocks so small that short sequences have several."""
    row = tuning.Plan(block_m, block_n, num_warps=4, num_stages=1)
    with mock.patch.object(tuning, "plan", lambda *_: row):
        yield


def upstream(query: Tensor, value: Tensor, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random gradients of out and lse."""
    generator = torch.Generator().manual_seed(seed)
    batch, num_queries, heads, _ = query.shape
    dout = torch.randn(batch, num_queries, heads, value.shape[-1], generator=generator)
    dlse = torch.randn(batch, heads, num_queries, generator=generator)
    dtype = torch.promote_types(query.dtype, torch.float32)
    return dout.to(query), dlse.to(query.device, dtype)


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    backend: str,
    scale: float | None = None,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """out, lse and the three gradients, strides of the inputs kept."""
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    out, lse = fastlm.causal_attention(*leaves, scale=scale, return_lse=True, backend=backend)
    if dout is None:
        dout, dlse = upstream(query, value)
    if dlse is None:
        grads = torch.autograd.grad(out, leaves, dout)
    else:
        grads = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    return out.detach(), lse.detach(), *grads


Case = Sequence[Tensor]


def judge(*inputs: Tensor, backend: str, scale: float | None = None) -> None:
    """Hold forward and backward of one call to the tolerance rule."""
    for name, *results in zip(NAMES, *_three(inputs, backend, scale), strict=True):
        _judge(name, results, inputs[0].shape[-1])


def judge_pooled(
    cases: Sequence[Case], *, backend: str, scales: Sequence[float | None] | None = None
) -> None:
    """The same for calls too small to be judged one by one.

    The rule compares error norms, which of a handful of elements say little.  Outputs of all cases
    are judged together, and so are all their gradients.
    """
    scales = scales or [None] * len(cases)
    rows = [_three(case, backend, scale) for case, scale in zip(cases, scales, strict=True)]
    for name, positions in (("out", [0]), ("lse", [1]), ("gradients", [2, 3, 4])):
        pooled = [
            torch.cat([row[kind][at].flatten() for row in rows for at in positions])
            for kind in range(3)
        ]
        _judge(name, pooled, max(case[0].shape[-1] for case in cases))


def _three(inputs: Sequence[Tensor], backend: str, scale: float | None) -> list[tuple[Tensor, ...]]:
    """Actual, plain and true results."""
    query, key, value = inputs
    actual = run(query, key, value, backend=backend, scale=scale)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    rest = (*upstream(query, value), *inputs, actual[0], actual[1], factor, True, True)
    plain = (*reference.plain_forward(*inputs, factor), *reference.plain_backward(*rest))
    truth = (*reference.truth_forward(*inputs, factor), *reference.truth_backward(*rest))
    return [actual, plain, truth]


def _judge(name: str, results: Sequence[Tensor], head_dim: int) -> None:
    actual, plain, truth = results
    multiple = 3.0 if name not in ("out", "lse") and head_dim > 128 else 2.0
    assert_as_accurate(name, actual, plain=plain, truth=truth, multiple=multiple)


def assert_same_bits(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for name, got, want in zip(NAMES, actual, expected, strict=True):
        assert got.dtype == want.dtype, name
        assert torch.equal(got, want), f"{name} differs by {(got - want).abs().max().item()}"
