"""linear_cross_entropy: problems nobody chose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.layouts import layouts
from support.linear_cross_entropy import definition, forced, inputs, ours
from torch import Tensor

from fastlm import testing


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    steps = draw(st.integers(1, 7))
    vocab_size = draw(st.integers(1, 70))
    return dict(
        batch=draw(st.integers(1, 3)),
        steps=steps,
        hidden_size=draw(st.integers(1, 20)),
        vocab_size=vocab_size,
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        has_bias=draw(st.booleans()),
        ignored=draw(st.sampled_from([0.0, 0.3, 1.0])),
        ignore_index=draw(st.sampled_from([-100, 0, vocab_size - 1])),
        shift=draw(st.integers(0, steps)),
        reduction=draw(st.sampled_from(["mean", "sum", "none"])),
        num_items=draw(st.sampled_from([None, 1, 7])),
        chunk=draw(st.integers(1, 9)),
        block_v=draw(st.sampled_from([16, 32, 128])),
        layout=draw(st.integers(0, 4)),
        seed=draw(st.integers(0, 2**31)),
    )


def check_problem(problem: dict[str, Any], device: str) -> None:
    """Loss and gradients against torch's on sliced tensors, by the tolerance rule."""
    batch, steps, shift = problem["batch"], problem["steps"], problem["shift"]
    x, weight, bias, targets = inputs(
        batch * steps, problem["hidden_size"], problem["vocab_size"], problem["dtype"], device,
        ignored=problem["ignored"], seed=problem["seed"],
    )  # fmt: skip
    ignore_index, reduction = problem["ignore_index"], problem["reduction"]
    targets[targets == -100] = ignore_index
    targets = targets.view(batch, steps)
    _, x = layouts(x.view(batch, steps, -1))[problem["layout"]]
    num_items = None if reduction == "none" else problem["num_items"]
    bias = bias if problem["has_bias"] else None

    def sliced(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        used, y = x[:, : steps - shift], targets[:, shift:]
        options = dict(ignore_index=ignore_index)
        if num_items is None:
            return definition(used, weight, bias, y, reduction=reduction, **options)
        return definition(used, weight, bias, y, reduction="sum", **options) / num_items

    def called(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return ours(
            x, weight, bias, targets, reduction=reduction, ignore_index=ignore_index,
            shift=shift, num_items=num_items, backend="triton",
        )  # fmt: skip

    with forced(rows=problem["chunk"], block_v=problem["block_v"]):
        actual = testing.run(called, x, weight, bias)
    truth = testing.run(sliced, x, weight, bias, dtype=torch.float64)
    if problem["dtype"] == torch.float64:
        torch.testing.assert_close(actual, truth, equal_nan=True)
        return
    plain = testing.run(sliced, x, weight, bias, dtype=torch.float32)
    testing.assert_all_as_accurate(str(problem), actual, plain=plain, truth=truth)


FUZZ = dict(deadline=None, suppress_health_check=list(HealthCheck), database=None)


@given(problem=problems())
@settings(max_examples=15, derandomize=True, **FUZZ)
def test_any_problem_is_as_accurate_as_torch(problem, device):
    check_problem(problem, device)


@pytest.mark.slow
@given(problem=problems())
@settings(max_examples=300, **FUZZ)
def test_three_hundred_problems_are_right_in_float64(problem, device):
    # the rule's root mean square says nothing of one element, and a loss is one
    check_problem({**problem, "dtype": torch.float64}, device)
