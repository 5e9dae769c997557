"""cross_entropy held to torch's: what its test files share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm
from fastlm.kernels import cross_entropy as kernels
from fastlm.kernels.cross_entropy import tuning
from fastlm.testing import assert_all_as_accurate, run

BACKENDS = ["triton", "cuda", "torch", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCK = 16  # of the tiny plan
# weight, ignore_index, label_smoothing, softcap, logit_scale
NO_OPTIONS = (None, -100, 0.0, None, 1.0)


def force_tiny_blocks(monkeypatch: pytest.MonkeyPatch, block_v: int = BLOCK) -> None:
    plan = tuning.Plan(block_v=block_v, num_warps=1)
    monkeypatch.setattr(tuning, "plan", lambda step, vocab_size, **kwargs: plan)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def torch_loss(
    logits: Tensor, targets: Tensor, *, reduction: str = "mean", ignore_index: int = -100
) -> Tensor:
    """What we agree with: F.cross_entropy, here with classes last."""
    flat = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).long(),
        reduction=reduction, ignore_index=ignore_index,
    )  # fmt: skip
    return flat.view(targets.shape) if reduction == "none" else flat


def assert_agrees(logits: Tensor, targets: Tensor, backend: str, **kwargs: Any) -> list[Tensor]:
    """Loss and gradient are as close to float64 as torch's on logits upcast to float32."""
    actual = run(fastlm.cross_entropy, logits, targets, backend=backend, **kwargs)
    plain = run(torch_loss, logits, targets, dtype=wide(logits.dtype), **kwargs)
    truth = run(torch_loss, logits, targets, dtype=torch.float64, **kwargs)
    assert actual[0].dtype == wide(logits.dtype)
    assert actual[1].dtype == logits.dtype
    assert_all_as_accurate("cross_entropy", actual, plain=plain, truth=truth)
    return actual


def bits(results: list[Tensor]) -> list[Tensor]:
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return [x.contiguous().view(integers[x.itemsize]) for x in results]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor], why: str = "") -> None:
    for got, want in zip(bits(actual), bits(expected), strict=True):
        assert torch.equal(got, want), why


def kernels_forward(x: Tensor, targets: Tensor, door: Any = kernels) -> tuple[Tensor, ...]:
    """Losses, maximum and log_sum by the kernel itself."""
    return door.forward(x, targets, *NO_OPTIONS, False)[:3]


def kernels_backward(
    dlosses: Tensor,
    x: Tensor,
    targets: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    door: Any = kernels,
) -> Tensor:
    weight, *options = NO_OPTIONS
    return door.backward(
        dlosses, None, None, None, x, targets, weight, maximum, log_sum, log_sum, *options
    )


def losses_and_gradient(
    logits: Tensor, targets: Tensor, backend: str = "triton", **kwargs: Any
) -> list[Tensor]:
    return run(fastlm.cross_entropy, logits, targets, reduction="none", backend=backend, **kwargs)
