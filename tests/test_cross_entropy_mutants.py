"""Bugs planted in the kernels of cross_entropy: each must make a short check fail."""

from __future__ import annotations

import math

import pytest
import test_cross_entropy as tests
import torch
from support.cross_entropy import BLOCK, assert_agrees, force_tiny_blocks, losses_and_gradient
from support.interpreter import interpreted_only
from support.layouts import layouts
from support.losses import OPTIONS, definition, judge, ours
from support.mutants import Mutant, killed

import fastlm
from fastlm.testing import cross_entropy_inputs

KERNEL = "kernels/cross_entropy/kernel.py"
LAUNCH = "kernels/cross_entropy/launch.py"
SHARED = "kernels/_losses.py"
OF_THE_LOSS = [
    Mutant("padding of the last block counts", SHARED,
           "tl.where(in_row, transform(logits, scale, softcap, HAS_SOFTCAP, ACC), float(\"-inf\"))",
           "transform(logits, scale, softcap, HAS_SOFTCAP, ACC)"),
    Mutant("last column is skipped", SHARED,
           "range(0, vocab_size, BLOCK_V)", "range(0, vocab_size - 1, BLOCK_V)"),
    Mutant("sum is not rescaled", SHARED,
           "running_sum * decay + e", "running_sum + e"),
    Mutant("a block of only -inf is forgotten", SHARED,
           'pivot = tl.where(new_max == float("-inf"), 0.0, new_max)', "pivot = new_max"),
    Mutant("NaN is swallowed", SHARED,
           "new_max = tl.maximum(running_max, x)",
           "x = tl.where(x != x, 0.0, x)\n        new_max = tl.maximum(running_max, x)"),
    Mutant("ignored rows keep their loss", KERNEL,
           "tl.store(losses_ptr + row, tl.where(ignored,",
           "tl.store(losses_ptr + row, tl.where(False,"),
    Mutant("ignored rows keep their gradient", KERNEL,
           "dx = tl.where(ignored,", "dx = tl.where(False,"),
    Mutant("no row has a target", SHARED, "tl.where(is_target, 1.0, 0.0)", "0.0"),
    Mutant("one upstream gradient for all", KERNEL,
           "tl.load(dlosses_ptr + row)", "tl.load(dlosses_ptr)"),
    Mutant("stride of the vocabulary is one", SHARED,
           "logits_ptr + cols * stride, mask=in_row", "logits_ptr + cols, mask=in_row"),
    Mutant("outer stride takes the inner one's place", KERNEL,
           "(row // inner) * stride_outer + (row % inner) * stride_inner\n    target",
           "(row // inner) * stride_inner + (row % inner) * stride_outer\n    target"),
    Mutant("parts of lse are added before they are used", KERNEL,
           "x, x - maximum - log_sum,", "x, x - (maximum + log_sum),"),
    Mutant("the gradient is rounded before the one is taken off", SHARED,
           "(p - tl.where(is_target, 1.0, 0.0))",
           "(p.to(tl.float16).to(tl.float32) - tl.where(is_target, 1.0, 0.0))"),
    Mutant("a target out of range is a class", KERNEL,
           'tl.where(valid, dx, float("nan"))', "dx"),
    Mutant("incoming gradient is read by the wrong stride", LAUNCH,
           "        dlosses.contiguous(),", "        dlosses,"),
    Mutant("float64 is computed in float32", LAUNCH,
           "is not None,\n        BLOCK_V=plan.block_v, ACC=accumulator(input.dtype)",
           "is not None,\n        BLOCK_V=plan.block_v, ACC=accumulator(torch.float32)"),
]  # fmt: skip
OF_OPTIONS = [
    Mutant("the sum of p (x - maximum) does not follow the maximum", SHARED,
           "decay * (moment - rise * running_sum)", "decay * moment"),
    Mutant("that sum is not moved when lanes are combined", SHARED,
           "shares * (moment + fall * running_sum)", "shares * moment"),
    Mutant("the last of the largest is predicted", SHARED,
           "tl.where(x > running_max, start", "tl.where(x >= running_max, start"),
    Mutant("the softcap has no slope", SHARED, "dx *= 1.0 - ratio * ratio", "dx *= 1.0"),
    Mutant("the logit scale is not in the gradient", SHARED,
           "return dx * tl.full((), scale, ACC)", "return dx"),
    Mutant("a small tanh cancels", SHARED, "tl.where(size < 0.625, near, far)", "far"),
    Mutant("the smoothed loss forgets the class weights", SHARED,
           "difference *= tl.load(weight_ptr", "difference += 0.0 * tl.load(weight_ptr"),
    Mutant("the target is not smoothed", SHARED,
           "of_target *= 1.0 - smoothing", "of_target *= 1.0"),
    Mutant("the gradient of lse is lost", KERNEL,
           "of_all += tl.load(dlse_ptr + row).to(ACC)", "of_all += 0.0"),
    Mutant("the entropy's gradient has the wrong sign", SHARED,
           "dx -= p * tl.where(p == 0", "dx += p * tl.where(p == 0"),
]  # fmt: skip


def check_loss() -> None:
    logits, _ = cross_entropy_inputs(2, 40)
    losses, gradient = losses_and_gradient(logits, torch.tensor([40, 3]))
    assert losses.isnan().tolist() == [True, False]
    assert gradient.isnan().all(-1).tolist() == [True, False]
    tests.test_takes_any_incoming_gradient(False, "triton", "cpu")
    tests.test_ignored_rows_have_no_loss_and_no_gradient(0, "triton", "cpu")
    with pytest.MonkeyPatch.context() as monkeypatch:
        force_tiny_blocks(monkeypatch)
        tests.test_huge_logits_do_not_overflow("triton", "cpu", None)
        for value in (-math.inf, math.nan):
            tests.test_values_that_are_not_finite_do_what_they_do_in_torch(
                value, torch.float32, "triton", "cpu", None
            )
        for dtype in (torch.float32, torch.float64):
            logits, targets = cross_entropy_inputs(6, 2 * BLOCK + 1, dtype)
            targets[0] = 2 * BLOCK
            logits, targets = logits.view(2, 3, -1), targets.view(2, 3)
            for name, view in layouts(logits):
                if name in ("every second", "transposed 0, 1"):
                    assert_agrees(view, targets, "triton", reduction="none")


def check_options() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        force_tiny_blocks(monkeypatch)
        for reduction in ("mean", "none"):
            arguments = cross_entropy_inputs(6, 2 * BLOCK + 3)
            judge(ours, definition, arguments, "triton", {**OPTIONS, "reduction": reduction})
        # a loss of small logits under a large cap
        logits = torch.randn(6, 8) * 1e-3
        judge(ours, definition, (logits, torch.arange(6)), "triton", {"softcap": 50.0})
        logits = torch.zeros(2, 2 * BLOCK)
        logits[:, [3, 3 + BLOCK]] = 1.0
        _, stats = fastlm.cross_entropy(
            logits, torch.tensor([0, 1]), return_stats=True, backend="triton"
        )
        assert stats.predictions.tolist() == [3, 3]


@interpreted_only
@pytest.mark.parametrize("mutant", OF_THE_LOSS, ids=str)
def test_a_bug_in_the_loss_is_found(mutant):
    assert killed(mutant, check_loss)


@interpreted_only
@pytest.mark.parametrize("mutant", OF_OPTIONS, ids=str)
def test_a_bug_in_an_option_is_found(mutant):
    assert killed(mutant, check_options)
