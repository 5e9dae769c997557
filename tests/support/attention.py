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
from fastlm.ops.cuda import attention as of_cuda
from fastlm.ops.reference import attention as reference
from fastlm.testing import assert_as_accurate

NAMES = ("out", "lse", "dquery", "dkey", "dvalue", "dsinks")
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
    """Launch with blocks so small that short sequences have several.

    In CUDA C++ it is warps that a block can have fewer of: with these 64 or 32 rows, 16, and 8.
    """
    row = tuning.Plan(block_m, block_n, num_warps=4, num_stages=1)
    with (
        mock.patch.object(tuning, "plan", lambda *_: row),
        mock.patch.object(of_cuda, "MOST_WARPS", {2: 2, 4: 4, 8: 4}),
    ):
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
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    sinks: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """out, lse and the gradients of the three, and of the sinks; strides of the inputs kept."""
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    if sinks is not None:
        options["sinks"] = sinks.detach().requires_grad_()
        leaves.append(options["sinks"])
    out, lse = fastlm.causal_attention(*leaves[:3], return_lse=True, backend=backend, **options)
    if dout is None:
        dout, dlse = upstream(query, value)
    if dlse is None:
        grads = torch.autograd.grad(out, leaves, dout)
    else:
        grads = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    return out.detach(), lse.detach(), *grads


def forward_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    scale: float | None = None,
    window_size: int | None = None,
    softcap: float | None = None,
) -> tuple[Any, ...]:
    """What the forward step of a backend takes."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    sequences = (cu_seqlens_q, cu_seqlens_k, key_start, key_end)
    return query, key, value, sinks, *sequences, scale, window_size, softcap


def backward_arguments(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *inputs: Tensor, **options: Any
) -> tuple[Any, ...]:
    """What the backward step of a backend takes, all gradients needed."""
    arguments = forward_arguments(*inputs, **options)
    needs = (True, True, options.get("sinks") is not None)
    return dout, dlse, *arguments[:8], out, lse, *arguments[8:], *needs


Case = Sequence[Tensor]


def judge(*inputs: Tensor, backend: str, **options: Any) -> None:
    """Hold forward and backward of one call to the tolerance rule."""
    names = NAMES if options.get("sinks") is not None else NAMES[:-1]
    for name, *results in zip(names, *_three(inputs, backend, options), strict=True):
        _judge(name, results, _is_hard(inputs, options))


def judge_pooled(
    cases: Sequence[Case],
    *,
    backend: str,
    scales: Sequence[float | None] | None = None,
    options: Sequence[dict[str, Any]] | None = None,
) -> None:
    """The same for calls too small to be judged one by one.

    The rule compares error norms, which of a handful of elements say little.  Outputs of all cases
    are judged together, and so are all their gradients.
    """
    scales = scales or [None] * len(cases)
    options = options or [{}] * len(cases)
    rows = [
        _three(case, backend, {"scale": scale, **more})
        for case, scale, more in zip(cases, scales, options, strict=True)
    ]
    hard = any(_is_hard(case, more) for case, more in zip(cases, options, strict=True))
    for name, positions in (("out", [0]), ("lse", [1]), ("gradients", [2, 3, 4])):
        pooled = [
            torch.cat([row[kind][at].flatten() for row in rows for at in positions])
            for kind in range(3)
        ]
        _judge(name, pooled, hard)


def _is_hard(inputs: Sequence[Tensor], options: dict[str, Any]) -> bool:
    """Whether the rule allows gradients thrice torch's error."""
    return inputs[0].shape[-1] > 128 or options.get("softcap") is not None


def _three(
    inputs: Sequence[Tensor], backend: str, options: dict[str, Any]
) -> list[tuple[Tensor, ...]]:
    """Actual, plain and true results."""
    query, key, value = inputs
    actual = run(query, key, value, backend=backend, **options)
    forward = forward_arguments(*inputs, **options)
    backward = backward_arguments(*upstream(query, value), *actual[:2], *inputs, **options)
    if options.get("sinks") is not None:
        # for each query: their sum says little
        rows = torch.ops.fastlm.causal_attention_backward(*backward, backend)[3]
        actual = (*actual[:-1], rows)
    count = len(actual)
    plain = (*reference.plain_forward(*forward), *reference.plain_backward(*backward))
    truth = (*reference.truth_forward(*forward), *reference.truth_backward(*backward))
    return [actual, plain[:count], truth[:count]]


def _judge(name: str, results: Sequence[Tensor], hard: bool) -> None:
    actual, plain, truth = results
    multiple = 3.0 if name not in ("out", "lse") and hard else 2.0
    assert_as_accurate(name, actual, plain=plain, truth=truth, multiple=multiple)


def assert_same_bits(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(actual) == len(expected)
    for name, got, want in zip(NAMES, actual, expected, strict=False):
        assert got.dtype == want.dtype, name
        assert torch.equal(got, want), f"{name} differs by {(got - want).abs().max().item()}"
