"""cross_entropy: no access outside its tensors, at any stride, for any target."""

from __future__ import annotations

import pytest
import torch
from support.cross_entropy import kernels_backward, kernels_forward
from support.interpreter import interpreted_only
from support.layouts import layouts
from support.memory import guarded, in_child, sparse
from support.mutants import Mutant, killed

from fastlm.kernels.cross_entropy import tuning
from fastlm.testing import assert_as_accurate, cross_entropy_inputs

pytestmark = interpreted_only

BLOCK = 16
BAD_TARGETS = [-1, 3 * BLOCK + 3, 4 * BLOCK + 2, -(2**63), 2**32 + 3]


@pytest.fixture(autouse=True)
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tuning.Plan(block_v=BLOCK, num_warps=1)
    monkeypatch.setattr(tuning, "plan", lambda step, vocab_size, **kwargs: plan)


def run_guarded(end: str) -> None:
    """Both kernels, every tensor they are given and every one they make at a protected page."""
    make = torch.empty
    for vocab_size in (1, BLOCK - 1, BLOCK, 2 * BLOCK + 1):
        logits, targets = cross_entropy_inputs(4, vocab_size)
        targets[0] = vocab_size - 1
        for _, view in layouts(logits):
            with pytest.MonkeyPatch.context() as monkeypatch:
                monkeypatch.setattr(torch, "empty", lambda *a, **k: guarded(make(*a, **k), end))
                monkeypatch.setattr(torch, "empty_like", lambda x: guarded(make(x.shape), end))
                x, y = guarded(view, end), guarded(targets, end)
                losses, *saved = kernels_forward(x, y)
                upstream = guarded(torch.ones(4), end)
                gradient = kernels_backward(upstream, x, y, *saved)
            assert losses.isfinite().all()
            assert gradient.isfinite().all()


@pytest.mark.parametrize("end", ["back", "front"])
def test_stays_inside_its_tensors(end):
    in_child(lambda: run_guarded(end))


def test_an_access_outside_would_be_seen():
    unmasked = Mutant(
        "no mask on the last block", "kernels/_losses.py",
        """    in_row = cols < vocab_size
    logits = tl.load(logits_ptr + cols * stride, mask=in_row""",
        """    in_row = cols < vocab_size
    logits = tl.load(logits_ptr + cols * stride, mask=cols < vocab_size + 1""",
    )  # fmt: skip
    assert killed(unmasked, lambda: run_guarded("back"))


@pytest.mark.parametrize("bad", BAD_TARGETS)
@pytest.mark.parametrize("end", ["back", "front"])
def test_a_target_out_of_range_makes_its_row_nan_and_nothing_else(bad, end):
    def check() -> None:
        logits, _ = cross_entropy_inputs(3, 3 * BLOCK + 3)
        good = torch.tensor([1, 2, 3])
        x, y = guarded(logits, end), guarded(torch.tensor([1, bad, 3]), end)
        losses, *saved = kernels_forward(x, y)
        gradient = kernels_backward(torch.ones(3), x, y, *saved)
        want, *want_saved = kernels_forward(x, good)
        want_gradient = kernels_backward(torch.ones(3), x, good, *want_saved)
        assert losses.isnan().tolist() == [False, True, False]
        assert gradient.isnan().all(-1).tolist() == [False, True, False]
        for row in (0, 2):
            assert torch.equal(losses[row], want[row])
            assert torch.equal(gradient[row], want_gradient[row])

    in_child(check)


HUGE = 2**30 + 64


@pytest.mark.parametrize("shape, strides", [
    ((3, 40), (HUGE, 1)),
    ((3, 2, 40), (HUGE, 40, 1)),
    ((2, 3, 40), (40, HUGE, 1)),
    ((2, 3), (3, HUGE)),
    ((2, 40), (1, 2**26 + 3)),
], ids=["rows", "outer", "inner", "few classes", "many classes"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_offsets_pass_2_to_the_31(shape, strides, dtype):
    def check() -> None:
        values = torch.randn(shape).to(dtype)
        targets = torch.randint(shape[-1], shape[:-1])
        x = sparse(shape, strides, dtype).copy_(values)
        assert 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) > 2**31
        losses, *saved = kernels_forward(x, targets)
        gradient = kernels_backward(torch.ones_like(losses), x, targets, *saved)
        want, *want_saved = kernels_forward(values, targets)
        assert torch.equal(losses, want)
        want_gradient = kernels_backward(torch.ones_like(want), values, targets, *want_saved)
        assert torch.equal(gradient, want_gradient)

    in_child(check)


def test_the_gradient_may_have_more_than_2_to_the_31_elements(monkeypatch):
    """Rows at both ends of a gradient of 2**31 + 20 elements, which takes no memory in between."""
    rows, vocab_size = 2**27 + 2, 16
    make = torch.empty

    def check() -> None:
        logits = torch.randn(1, vocab_size).half().expand(rows, vocab_size)
        targets = torch.zeros(1, dtype=torch.int64).expand(rows)
        ends = [0, rows - 1]
        made = sparse((rows, vocab_size), (vocab_size, 1), torch.float16)
        monkeypatch.setattr(torch, "empty", lambda *a, **k: made)
        only_ends(monkeypatch, ends)
        per_row = sparse((rows,), (1,), torch.float32)
        maximum, log_sum = (sparse((rows,), (1,), torch.float32) for _ in range(2))
        for row in ends:
            per_row[row] = 1.0
            maximum[row] = logits[0].max()
            log_sum[row] = (logits[0].float() - logits[0].max()).exp().sum().log()
        targets = sparse((rows,), (1,), torch.int64)
        gradient = kernels_backward(per_row, logits, targets, maximum, log_sum)
        torch.empty = make
        exact = torch.softmax(logits[0].double(), -1)
        exact[0] -= 1
        for row in ends:
            assert_as_accurate("row", gradient[row], plain=exact.half(), truth=exact)

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
