"""cross_entropy: no access outside its tensors, at any stride, for any target."""

from __future__ import annotations

import pytest
import torch
from support.interpreter import interpreted_only
from support.loss_addresses import (
    FAR,
    MANY_ROWS,
    check_bad_target,
    check_far,
    check_far_gradient,
    run_guarded,
)
from support.memory import in_child
from support.mutants import Mutant, killed

from fastlm.kernels import cross_entropy as kernels
from fastlm.kernels.cross_entropy import tuning

pytestmark = interpreted_only

BLOCK = 16
BAD_TARGETS = [-1, 3 * BLOCK + 3, 4 * BLOCK + 2, -(2**63), 2**32 + 3]


@pytest.fixture(autouse=True)
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tuning.Plan(block_v=BLOCK, num_warps=1)
    monkeypatch.setattr(tuning, "plan", lambda step, vocab_size, **kwargs: plan)


def guarded_kernels(end: str) -> None:
    run_guarded(kernels, end, torch.float32, (1, BLOCK - 1, BLOCK, 2 * BLOCK + 1))


@pytest.mark.parametrize("end", ["back", "front"])
def test_stays_inside_its_tensors(end):
    in_child(lambda: guarded_kernels(end))


def test_an_access_outside_would_be_seen():
    unmasked = Mutant(
        "no mask on the last block", "kernels/_losses.py",
        """    in_row = cols < vocab_size
    logits = tl.load(logits_ptr + cols * stride, mask=in_row""",
        """    in_row = cols < vocab_size
    logits = tl.load(logits_ptr + cols * stride, mask=cols < vocab_size + 1""",
    )  # fmt: skip
    assert killed(unmasked, lambda: guarded_kernels("back"))


@pytest.mark.parametrize("bad", BAD_TARGETS)
@pytest.mark.parametrize("end", ["back", "front"])
def test_a_target_out_of_range_makes_its_row_nan_and_nothing_else(bad, end):
    in_child(lambda: check_bad_target(kernels, bad, end, 3 * BLOCK + 3))


@pytest.mark.parametrize("place", FAR)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_offsets_pass_2_to_the_31(place, dtype):
    in_child(lambda: check_far(kernels, *FAR[place], dtype))


def test_the_gradient_may_have_more_than_2_to_the_31_elements(monkeypatch):
    ends = [0, MANY_ROWS - 1]

    def check() -> None:
        only_ends(monkeypatch, ends)
        check_far_gradient(kernels, ends)

    in_child(check)


def only_ends(monkeypatch: pytest.MonkeyPatch, programs: list[int]) -> None:
    """Interpret these programs of a grid alone."""
    from triton.runtime import interpreter

    def call(self, *args, **kwargs):
        builder, grid = interpreter.interpreter_builder, self.grid
        for program in programs:
            self.grid = (1,)
            builder.set_grid_idx = lambda *_, p=program: setattr(builder, "grid_idx", (p, 0, 0))
            original(self, *args, **kwargs)
        del builder.set_grid_idx
        self.grid = grid

    original = interpreter.GridExecutor.__call__
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)
