"""rms_norm, rotary and glu: the same bits however tensors lie, and no access outside of them."""

from __future__ import annotations

import pytest
import torch
from support import layers
from support.host_sync import no_host_sync
from support.interpreter import interpreted_only, permuted_grid
from support.layers import (
    CASES,
    FAR,
    assert_same_bits,
    check_far,
    check_many,
    force_tiny_blocks,
    relaid,
    run_guarded,
)
from support.memory import in_child
from support.poison import poisoned
from torch import Tensor

from fastlm.kernels import glu, rms_norm, rotary

pytestmark = interpreted_only
DOORS = {"rms_norm": rms_norm, "rotary": rotary, "glu": glu}
ONE_OF_EACH = ("norm of a sum", "rotary", "silu")
SIZES = (1, 15, 16, 37)


# norms also with vectors that no program holds whole; what differs little is for test-all
PLANS = [
    pytest.param(
        name, whole, id=name if whole else f"wide {name}",
        marks=[pytest.mark.slow] * (name not in ONE_OF_EACH),
    )
    for name, case in CASES.items()
    for whole in ([True, False] if case.op == "rms_norm" else [True])
]  # fmt: skip
QUICK_FAR = ("c", "h of heads", "p of angles", "b of gates")


def results(name: str, inputs: dict[str, Tensor]) -> list[Tensor]:
    case = CASES[name]
    return case.run(DOORS[case.op], inputs)


@pytest.mark.parametrize(("name", "whole"), PLANS)
def test_agrees_with_the_definition_over_several_blocks(name, whole, monkeypatch):
    force_tiny_blocks(monkeypatch, whole=whole)
    layers.judge(CASES[name], DOORS[CASES[name].op], CASES[name].inputs())


@pytest.mark.parametrize(("name", "whole"), PLANS)
def test_any_layout_has_the_bits_of_the_contiguous_one(name, whole, monkeypatch):
    force_tiny_blocks(monkeypatch, whole=whole)
    inputs = CASES[name].inputs(torch.bfloat16)
    want = results(name, inputs)
    for place in (0, 2, 4):
        assert_same_bits(results(name, relaid(inputs, place)), want, f"layout {place}")


@pytest.mark.parametrize(("name", "whole"), PLANS)
def test_order_of_programs_and_what_memory_held_change_no_bit(name, whole, monkeypatch):
    force_tiny_blocks(monkeypatch, whole=whole)
    inputs = CASES[name].inputs()
    with no_host_sync():
        want = results(name, inputs)
    with permuted_grid(1), poisoned(0x7F):
        assert_same_bits(results(name, inputs), want)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_sequence_does_not_depend_on_its_neighbours(name, monkeypatch):
    force_tiny_blocks(monkeypatch)
    inputs = CASES[name].inputs(b=5)
    of_batch = [x for x, shape in CASES[name].shapes.items() if shape[0] == "b"]
    want = results(name, inputs)
    for rows in (torch.randperm(5), torch.tensor([3])):
        picked = {**inputs, **{x: inputs[x][rows] for x in of_batch}}
        got = results(name, picked)
        pairs = [(x, y) for x, y in zip(got, want, strict=True) if y.shape[0] == 5]
        assert_same_bits([x for x, _ in pairs], [y[rows] for _, y in pairs])


@pytest.mark.parametrize("end", ["back", pytest.param("front", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "whole"), PLANS)
def test_stays_inside_its_tensors(name, whole, end, monkeypatch):
    force_tiny_blocks(monkeypatch, whole=whole)
    case = CASES[name]
    in_child(lambda: run_guarded(case, DOORS[case.op], end, SIZES))


@pytest.mark.parametrize(
    "place",
    [pytest.param(place, marks=[pytest.mark.slow] * (place not in QUICK_FAR)) for place in FAR],
)
def test_offsets_pass_2_to_the_31(place, monkeypatch):
    force_tiny_blocks(monkeypatch)
    name, far, strides = FAR[place]
    in_child(lambda: check_far(CASES[name], DOORS[CASES[name].op], far, strides))


@pytest.mark.parametrize("name", ["norm without weight", "rotary", "silu"])
def test_results_may_have_more_than_2_to_the_31_elements(name, monkeypatch):
    force_tiny_blocks(monkeypatch)

    case, few = CASES[name], CASES[name].few_tokens()

    def check() -> None:
        want = results(name, few)
        only_last(monkeypatch)
        check_many(case, DOORS[case.op], few, want, 4)

    in_child(check)


def only_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every grid interpret the last four programs alone."""
    from triton.runtime import interpreter

    def call(self, *args, **kwargs):
        builder, grid = interpreter.interpreter_builder, self.grid
        for program in range(max(grid[0] - 4, 0), grid[0]):
            self.grid = (1,)
            builder.set_grid_idx = lambda *_, p=program: setattr(builder, "grid_idx", (p, 0, 0))
            original(self, *args, **kwargs)
        del builder.set_grid_idx
        self.grid = grid

    original = interpreter.GridExecutor.__call__
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)
