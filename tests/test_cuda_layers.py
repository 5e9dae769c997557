"""The CUDA C++ kernels of rms_norm, rotary and glu, run on a CPU: addresses, races, bits.

What they compute is tested with the other backends, in test_rms_norm.py and its like.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from support.cuda_host import (
    HOST,
    host_module,
    in_place_of_the_extension,
    only_block,
    ordered,
    program,
    run,
)
from support.host_sync import no_host_sync
from support.interpreter import interpreted_only
from support.layers import (
    CASES,
    FAR,
    MANY_TOKENS,
    assert_same_bits,
    check_far,
    check_many,
    judge,
    relaid,
    run_guarded,
)
from support.memory import in_child
from support.poison import poisoned
from torch import Tensor

from fastlm.ops.cuda import glu, rms_norm, rotary

pytestmark = interpreted_only  # on a GPU the kernels run there

DOORS: dict[str, Any] = {"rms_norm": rms_norm, "rotary": rotary, "glu": glu}
# threads of a block and of a team, and rows of a team: a warp has a row, or a block has
TEAMS = {"warps": (64, 32, 2), "blocks": (64, 64, 2)}
PLANS = [
    pytest.param(name, team, id=f"{name} by {team}" if case.op == "rms_norm" else name)
    for name, case in CASES.items()
    for team in (TEAMS if case.op == "rms_norm" else ["warps"])
]
ONE_OF_EACH = ("norm of a sum", "rotary of neighbours", "silu")
SIZE = 600  # several rounds of a team


@pytest.fixture(scope="module", autouse=True)
def extension() -> Iterator[ModuleType]:
    with in_place_of_the_extension(host_module()) as module:
        yield module


@pytest.fixture(autouse=True)
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    force_few_threads(monkeypatch)


def force_few_threads(monkeypatch: pytest.MonkeyPatch, team: str = "warps") -> None:
    monkeypatch.setattr(rms_norm, "PLANS", ((1 << 62, TEAMS[team]),))
    monkeypatch.setattr(rotary, "THREADS", 32)
    monkeypatch.setattr(glu, "THREADS", 32)


def results(name: str, inputs: dict[str, Tensor]) -> list[Tensor]:
    return CASES[name].run(DOORS[CASES[name].op], inputs)


@pytest.mark.parametrize("variant", ["plain", pytest.param("asan", marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", ["rms_norm", "rotary", "glu"])
def test_stays_inside_its_blocks_of_memory(op, variant):
    for order in ("forward", "random"):
        done = run(program(HOST / f"check_{op}.cpp", variant), order)
        assert (done.returncode, done.stderr) == (0, "")
        assert "launches, 0 failures" in done.stdout


@pytest.mark.slow
def test_has_no_races():
    done = run(program(HOST / "check_rms_norm.cpp", "tsan"), "small")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("size", [1, 7, 8, 9, SIZE])
@pytest.mark.parametrize(("name", "team"), PLANS)
def test_agrees_with_the_definition(name, team, size, monkeypatch):
    force_few_threads(monkeypatch, team)
    judge(CASES[name], DOORS[CASES[name].op], CASES[name].inputs(c=size, d=size, p=size // 2))


@pytest.mark.parametrize("team", TEAMS)
def test_sums_of_vectors_too_wide_for_shared_memory(team, monkeypatch):
    force_few_threads(monkeypatch, team)
    case = CASES["norm of a sum"]
    judge(case, rms_norm, case.inputs(b=1, c=13_000))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "team"), PLANS)
def test_any_layout_has_the_bits_of_the_contiguous_one(name, team, dtype, monkeypatch):
    force_few_threads(monkeypatch, team)
    # sizes of whole 16 bytes, which are read at once where they are not moved off
    inputs = CASES[name].inputs(dtype, c=SIZE, d=72, p=24)
    want = results(name, inputs)
    for place in range(6):
        assert_same_bits(results(name, relaid(inputs, place)), want, f"layout {place}")


@pytest.mark.parametrize(("name", "team"), PLANS)
def test_order_and_what_memory_held_change_no_bit(name, team, extension, monkeypatch):
    force_few_threads(monkeypatch, team)
    inputs = CASES[name].inputs(c=SIZE)
    with no_host_sync():
        want = results(name, inputs)
    for order in ("reverse", "random"):
        with ordered(extension, order, 1), poisoned(0x7F):
            assert_same_bits(results(name, inputs), want, order)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_sequence_does_not_depend_on_its_neighbours(name):
    inputs = CASES[name].inputs(b=5)
    of_batch = [x for x, shape in CASES[name].shapes.items() if shape[0] == "b"]
    want = results(name, inputs)
    rows = torch.tensor([3, 1])
    got = results(name, {**inputs, **{x: inputs[x][rows] for x in of_batch}})
    for x, y in zip(got, want, strict=True):
        if y.shape[0] == 5:
            assert_same_bits([x], [y[rows]])


@pytest.mark.parametrize("end", ["back", "front"])
@pytest.mark.parametrize(("name", "team"), PLANS)
def test_stays_inside_its_tensors(name, team, end, monkeypatch):
    force_few_threads(monkeypatch, team)
    case = CASES[name]
    in_child(lambda: run_guarded(case, DOORS[case.op], end, (1, 7, 8, 9, SIZE)))


@pytest.mark.parametrize("place", FAR)
def test_offsets_pass_2_to_the_31(place):
    name, far, strides = FAR[place]
    in_child(lambda: check_far(CASES[name], DOORS[CASES[name].op], far, strides))


@pytest.mark.parametrize(
    ("name", "rows"), [("norm without weight", 2), ("rotary", 16), ("silu", 16)]
)
def test_results_may_have_more_than_2_to_the_31_elements(name, rows, extension, monkeypatch):
    """The last block alone runs, of ``rows`` tokens of 16 elements at most."""
    monkeypatch.setattr(rms_norm, "PLANS", ((1 << 62, (64, 32, 1)),))
    case, last = CASES[name], (MANY_TOKENS - 1) % rows + 1

    def check() -> None:
        few = case.few_tokens()
        want = case.run(DOORS[case.op], few)
        with only_block(extension, (MANY_TOKENS - 1) // rows):
            check_many(case, DOORS[case.op], few, want, last)

    in_child(check)


def test_a_launch_that_fails_says_what_and_why(monkeypatch):
    monkeypatch.setattr(glu, "THREADS", 2_048)
    with pytest.raises(RuntimeError, match="glu did not start: invalid configuration argument"):
        results("silu", CASES["silu"].inputs())
