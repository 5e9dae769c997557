"""The kernel of linear_top_k: memory, order, problems nobody chose, and bugs planted in it."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.host_sync import no_host_sync
from support.interpreter import interpreted_only, permuted_grid
from support.linear_top_k import OPTIONS, all_logprobs, forced, integers, judge, layer
from support.memory import guarded, in_child, sparse
from support.mutants import Mutant, killed
from support.poison import poisoned
from torch import Tensor

import fastlm
from fastlm.kernels._launch import recorded
from fastlm.kernels.linear_top_k.launch import launch_top_k


def top_k(x: Tensor, weight: Tensor, bias: Tensor | None, k: int, **options: float) -> Any:
    return fastlm.linear_top_k(x, weight, k, linear_bias=bias, backend="triton", **options)


def assert_same(actual: Any, expected: Any) -> None:
    assert torch.equal(actual.logprobs, expected.logprobs)
    assert torch.equal(actual.indices, expected.indices)


@interpreted_only
@pytest.mark.parametrize("end", ["back", "front"])
def test_touches_nothing_outside_its_tensors(end):
    x, weight, bias = layer(2, 4, 37)

    def run():
        for dtype in (torch.float32, torch.float64):
            logits = guarded((x @ weight.t()).to(dtype), end)
            logprobs = guarded(torch.zeros(2, 3, dtype=dtype), end)
            indices = guarded(torch.zeros(2, 3, dtype=torch.int64), end)
            for block_v, block_lane in ((16, 1), (16, 8), (64, 2)):
                with forced(block_v=block_v, block_lane=block_lane):
                    launch_top_k(logits, guarded(bias, end), 3.0, 0.5, logprobs, indices)

    in_child(run)


@interpreted_only
@pytest.mark.slow
def test_logits_of_a_chunk_may_pass_2_31_elements():
    # program 16 of 17 alone; the whole would take minutes
    vocab_size, row = 2**27 + 64, 16
    builder = triton.runtime.interpreter.interpreter_builder
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx

    def run():
        logits = sparse((17, vocab_size), (vocab_size, 1), torch.float32)
        logits[row, 5], logits[row, -1] = 2.0, 1.0
        logprobs, indices = torch.zeros(17, 3), torch.zeros(17, 3, dtype=torch.int64)
        with (
            forced(block_v=2**20, block_lane=64),
            mock.patch.object(builder, "set_grid_dim", lambda *grid: set_dim(row + 1, 1, 1)),
            mock.patch.object(builder, "set_grid_idx", lambda *index: set_index(row, 0, 0)),
        ):
            launch_top_k(logits[:1], None, None, 1.0, logprobs, indices)
        lse = math.log(vocab_size - 2 + math.exp(2) + math.e)
        assert indices[row].tolist() == [5, vocab_size - 1, 0]
        torch.testing.assert_close(logprobs[row], torch.tensor([2 - lse, 1 - lse, -lse]))

    in_child(run, seconds=300)


@interpreted_only
def test_the_order_of_programs_does_not_matter():
    x, weight, bias = layer(4, 5, 40, torch.bfloat16)
    with forced(rows=3):
        expected = top_k(x, weight, bias, 2, **OPTIONS)
        for seed in range(2):
            with permuted_grid(seed):
                assert_same(top_k(x, weight, bias, 2, **OPTIONS), expected)


def test_what_was_in_memory_does_not_matter(device):
    arguments = (*layer(4, 5, 40, torch.bfloat16, device), 2)
    with forced(rows=3):
        expected = top_k(*arguments)
        with poisoned(0x7F):
            assert_same(top_k(*arguments), expected)
        assert_same(top_k(*arguments), expected)


def test_a_row_does_not_depend_on_the_others(device):
    # integers: a product of other rows is the same
    x, weight = integers(4, 5, 40, torch.float32, device)
    order = torch.tensor([2, 0, 3, 1], device=device)
    with forced():
        straight, permuted = top_k(x, weight, None, 3), top_k(x[order], weight, None, 3)
    assert torch.equal(permuted.indices, straight.indices[order])
    assert torch.equal(permuted.logprobs, straight.logprobs[order])


def test_does_not_wait_for_the_device(device):
    tensors = layer(9, 5, 40, torch.bfloat16, device)
    with recorded(run=device == "cuda") as log, no_host_sync(), forced(rows=4):
        top_k(*tensors, 3, **OPTIONS)
    assert [(call.name, call.grid) for call in log] == [
        ("top_k_kernel", (4,)), ("top_k_kernel", (4,)), ("top_k_kernel", (1,)),
    ]  # fmt: skip


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    vocab_size = draw(st.integers(1, 70))
    return dict(
        rows=draw(st.integers(0, 2)),
        hidden_size=draw(st.integers(1, 9)),
        vocab_size=vocab_size,
        k=draw(st.integers(1, min(vocab_size, 5))),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])),
        has_bias=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, 0.5, 20.0])),
        logit_scale=draw(st.sampled_from([1.0, 3.0, -0.4])),
        chunk=draw(st.integers(1, 4)),
        block_v=draw(st.sampled_from([4, 16, 64])),
        block_lane=draw(st.sampled_from([1, 4])),
        seed=draw(st.integers(0, 2**31)),
    )


def check_problem(problem: dict[str, Any], device: str) -> None:
    """As torch, a part of one, without the last the same, and of integers the lowest first."""
    sizes = (problem["rows"], problem["hidden_size"], problem["vocab_size"])
    k, dtype, scale = problem["k"], problem["dtype"], problem["logit_scale"]
    x, weight, bias = layer(*sizes, dtype, device, seed=problem["seed"])
    given = bias if problem["has_bias"] else None
    options = dict(softcap=problem["softcap"], logit_scale=scale)
    with forced(
        rows=problem["chunk"], block_v=problem["block_v"], block_lane=problem["block_lane"]
    ):
        got = top_k(x, weight, given, k, **options)
        if dtype == torch.float64:
            # the rule's root mean square says nothing of the few values there may be here
            every = all_logprobs(x, weight, given, dtype, **options)
            wanted = [every.topk(k).values, every.gather(-1, got.indices)]
            torch.testing.assert_close([got.logprobs] * 2, wanted, atol=1e-9, rtol=1e-9)
        assert got.indices.sort(-1).values.diff(dim=-1).gt(0).all()
        assert got.logprobs.exp().sum(-1).le(1 + 1e-6).all()
        if k > 1:
            fewer = top_k(x, weight, given, k - 1, **options)
            assert torch.equal(fewer.logprobs, got.logprobs[:, :-1])
            assert torch.equal(fewer.indices, got.indices[:, :-1])
        x, weight = integers(*sizes, dtype, device)
        logits = scale * (x @ weight.t()).double()
        want = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(top_k(x, weight, None, k, **options).indices, want)


FUZZ = dict(deadline=None, suppress_health_check=list(HealthCheck), database=None)


@given(problem=problems())
@settings(max_examples=15, derandomize=True, **FUZZ)
def test_any_problem(problem, device):
    check_problem(problem, device)


@pytest.mark.slow
@given(problem=problems())
@settings(max_examples=200, **FUZZ)
def test_two_hundred_problems(problem, device):
    check_problem(problem, device)


KERNEL = "kernels/linear_top_k/kernel.py"
LAUNCH = "kernels/linear_top_k/launch.py"
MUTANTS = [
    Mutant("of equals in a lane the last is kept", KERNEL,
           "key > keys, start", "key >= keys, start"),
    Mutant("of equal lanes the last is taken", KERNEL,
           "found = tl.min(tl.where(keys == best, classes, _NONE), 0)",
           "found = tl.max(tl.where(keys == best, classes, -1), 0)"),
    Mutant("what was found is found again", KERNEL, "(cols > found)", "(cols >= found)"),
    Mutant("equals of what was found are lost", KERNEL,
           "((key < best) | ((key == best) & (cols > found)))", "(key < best)"),
    Mutant("a lane has one element", KERNEL,
           "keys = tl.where(is_lane, next_key, keys)",
           'keys = tl.where(is_lane, float("-inf"), keys)'),
    Mutant("the lane keeps its class", KERNEL,
           "classes = tl.where(is_lane, next_class, classes)", "classes = classes"),
    Mutant("a negative scale does not turn the order", LAUNCH,
           "SCALE_IS_NEGATIVE=logit_scale < 0", "SCALE_IS_NEGATIVE=False"),
    Mutant("the key of a negative scale is taken for the logit", KERNEL,
           "u = -best if SCALE_IS_NEGATIVE else best", "u = best"),
    Mutant("columns beyond the row are classes", KERNEL,
           'float("inf")), float("-inf"))', 'float("inf")), 3e38)'),
    Mutant("columns beyond the row have a probability", KERNEL,
           'HAS_SOFTCAP, ACC), float("-inf"))', "HAS_SOFTCAP, ACC), 0.0)"),
    Mutant("NaN is no largest", KERNEL, 'key, float("inf"))', 'key, float("-inf"))'),
    Mutant("the bias is forgotten when a lane is read again", KERNEL,
           "u += tl.load(bias_ptr + cols, mask=in_row, other=0.0).to(ACC)",
           "u += tl.load(bias_ptr + cols, mask=in_row & (cols.shape[0] != 2), other=0.0).to(ACC)"),
    Mutant("a lane beyond one block is not searched", KERNEL,
           "range(0, vocab_size, BLOCK_LANE * BLOCK_V)", "range(0, 1)"),
    Mutant("sums keep their old maximum", KERNEL,
           "running_sum * tl.exp(running_max - pivot)", "running_sum"),
    Mutant("a lane of -inf alone makes the sum NaN", KERNEL,
           'tl.where(new_max == float("-inf"), 0.0, new_max)', "new_max"),
    Mutant("lanes are summed without their maxima", KERNEL,
           "running_sum * tl.exp(running_max - origin)", "running_sum"),
    Mutant("the likely class is judged by a rounded lse", KERNEL,
           "(x - maximum) - log_sum", "x - (maximum + log_sum)"),
]  # fmt: skip


def _check() -> None:
    x, weight, bias = layer(2, 4, 37, torch.float64)
    with forced(rows=1):
        judge(x, weight, bias, 5, backend="triton", **OPTIONS)
    x, weight = integers(1, 2, 40, torch.float32)
    want = (x @ weight.t()).sort(dim=-1, descending=True, stable=True).indices
    with forced(block_v=8):
        assert torch.equal(top_k(x, weight, None, 6).indices, want[:, :6])
        bias = torch.zeros(20)
        bias[:16] = -torch.inf
        impossible = top_k(torch.zeros(1, 4), torch.zeros(20, 4), bias, 5)
        assert impossible.indices.tolist() == [[16, 17, 18, 19, 0]]
        bias = torch.zeros(20)
        bias[9] = torch.nan
        assert top_k(torch.zeros(1, 4), torch.zeros(20, 4), bias, 1).indices.item() == 9
    bias = torch.full((40,), 1000.0)
    bias[7] = 1012.0
    likely = top_k(torch.zeros(1, 4), torch.zeros(40, 4), bias, 1).logprobs
    assert likely.item() == pytest.approx(-math.log1p(39 * math.exp(-12)), abs=1e-6)


@interpreted_only
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_planted_bug_is_noticed(mutant):
    assert killed(mutant, _check)
