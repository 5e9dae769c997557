"""Forced sizes and oracle for the tests of linear_top_k."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from support.linear_cross_entropy import inputs
from support.losses import transformed
from torch import Tensor

import fastlm
from fastlm.kernels.linear_top_k import tuning
from fastlm.testing import assert_as_accurate

MODULES = ("fastlm.kernels.linear_top_k.launch", "fastlm.ops.eager.linear_top_k")
OPTIONS = {"softcap": 3.0, "logit_scale": -0.7}


@contextlib.contextmanager
def forced(*, rows: int | None = None, block_v: int = 16, block_lane: int = 2) -> Iterator[None]:
    """Chunks of ``rows`` rows, and kernels of ``block_v`` lanes."""
    plan = tuning.Plan(block_v=block_v, block_lane=block_lane, num_warps=1)
    with contextlib.ExitStack() as stack:
        if rows is not None:
            for module in MODULES:
                patch = mock.patch(f"{module}.rows_per_chunk", lambda *shapes: rows)
                stack.enter_context(patch)
        stack.enter_context(mock.patch.object(tuning, "FORWARD", ((1 << 62, plan),)))
        yield


def layer(
    rows: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and bias."""
    x, weight, bias, _ = inputs(rows, hidden_size, vocab_size, dtype, device, seed=seed)
    return x, weight, bias


def integers(
    rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Input and weight whose products are exact, and often equal."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-3, 4, (rows, hidden_size), generator=generator)
    weight = torch.randint(-2, 3, (vocab_size, hidden_size), generator=generator)
    return x.to(device, dtype), weight.to(device, dtype)


def all_logprobs(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, **options: float
) -> Tensor:
    wide = [None if t is None else t.to(dtype) for t in (x, weight, bias)]
    return transformed(F.linear(*wide), options).log_softmax(-1)


def judge(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    *,
    backend: str,
    **options: float,
) -> fastlm.ops.linear_top_k.TopK:
    """The values, the values of the classes named, and that no class is named twice."""
    top = fastlm.linear_top_k(x, weight, k, linear_bias=bias, backend=backend, **options)
    wide = torch.promote_types(x.dtype, torch.float32)
    plain = all_logprobs(x, weight, bias, wide, **options)
    truth = all_logprobs(x, weight, bias, torch.float64, **options)
    assert top.logprobs.shape == top.indices.shape == (*x.shape[:-1], k)
    assert (top.logprobs.dtype, top.indices.dtype) == (wide, torch.int64)
    assert top.indices.sort(-1).values.diff(dim=-1).gt(0).all(), "a class is named twice"
    for usual, want in (
        (plain.topk(k).values, truth.topk(k).values),
        (plain.gather(-1, top.indices), truth.gather(-1, top.indices)),
    ):
        assert_as_accurate(backend, top.logprobs, plain=usual, truth=want)
    return top
