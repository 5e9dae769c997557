"""rms_norm, rotary and glu: the same bits however tensors lie, and no access outside of them."""

from __future__ import annotations

import pytest
import torch
from support import layers
from support.host_sync import no_host_sync
from support.interpreter import interpreted_only, permuted_grid
from support.layers import CASES, assert_same_bits, force_tiny_blocks, relaid
from support.memory import guarded, in_child, sparse
from support.poison import poisoned
from torch import Tensor

from fastlm.kernels import glu, rms_norm, rotary

pytestmark = interpreted_only
DOORS = {"rms_norm": rms_norm, "rotary": rotary, "glu": glu}
ONE_OF_EACH = ("norm of a sum", "rotary", "silu")
HUGE = 2**30 + 64


# norms also with vectors that no program holds whole; what differs little is for test-all
PLANS = [
    pytest.param(
        name, whole, id=name if whole else f"wide {name}",
        marks=[pytest.mark.slow] * (name not in ONE_OF_EACH),
    )
    for name, case in CASES.items()
    for whole in ([True, False] if case.op == "rms_norm" else [True])
]  # fmt: skip
# each tensor alone with elements beyond 2**31, by each of its strides
FAR = {
    "b": ("norm of a sum", ("input", "residual", "dout"), (HUGE * 2, 37, 1)),
    "t": ("norm of a sum", ("input", "residual", "dout"), (111, HUGE, 1)),
    "c": ("norm of a sum", ("input", "residual", "dout"), (111, 37, 2**26 + 3)),
    "b of heads": ("rotary", ("query", "key"), (HUGE * 2, 42, 14, 1)),
    "t of heads": ("rotary", ("query", "key"), (126, HUGE, 14, 1)),
    "h of heads": ("rotary of neighbours", ("query", "key"), (126, 42, HUGE * 2, 1)),
    "d of heads": ("rotary of neighbours", ("query", "key"), (126, 42, 14, 2**28 + 3)),
    "t of angles": ("rotary", ("cos", "sin"), (HUGE, 1)),
    "p of angles": ("rotary", ("cos", "sin"), (5, 2**29 + 3)),
    "b of angles": ("rotary of neighbours", ("cos", "sin"), (HUGE * 2, 5, 1)),
    "b of gates": ("silu", ("gate", "up", "dout"), (HUGE * 2, 37, 1)),
    "t of gates": ("silu", ("gate", "up", "dout"), (111, HUGE, 1)),
    "c of gates": ("silu", ("gate", "up", "dout"), (111, 37, 2**26 + 3)),
}

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


def run_guarded(name: str, end: str) -> None:
    """Every tensor, those that are made as well, at a protected page."""
    make = torch.empty
    for size, place in [
        *((size, 0) for size in (1, 15, 16)),
        *((37, place) for place in (0, 2, 4)),
    ]:
        inputs = CASES[name].inputs(b=1, c=size, d=size, p=size // 2)
        views = relaid(inputs, place)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", lambda *a, **k: guarded(make(*a, **k), end))
            made = results(name, {x: guarded(view, end) for x, view in views.items()})
        assert all(x.isfinite().all() for x in made)


@pytest.mark.parametrize("end", ["back", pytest.param("front", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "whole"), PLANS)
def test_stays_inside_its_tensors(name, whole, end, monkeypatch):
    force_tiny_blocks(monkeypatch, whole=whole)
    in_child(lambda: run_guarded(name, end))


@pytest.mark.parametrize(
    "place",
    [pytest.param(place, marks=[pytest.mark.slow] * (place not in QUICK_FAR)) for place in FAR],
)
def test_offsets_pass_2_to_the_31(place, monkeypatch):
    force_tiny_blocks(monkeypatch)
    name, far, strides = FAR[place]

    def check() -> None:
        inputs = CASES[name].inputs(torch.float16)
        want = results(name, inputs)
        for tensor in far:
            values = inputs[tensor]
            view = sparse(values.shape, strides, values.dtype).copy_(values)
            ends = ((n - 1) * s for n, s in zip(values.shape, strides, strict=True))
            assert sum(ends) > 2**31
            assert_same_bits(results(name, {**inputs, tensor: view}), want, tensor)

    in_child(check)


@pytest.mark.parametrize("name", ["norm without weight", "rotary", "silu"])
def test_results_may_have_more_than_2_to_the_31_elements(name, monkeypatch):
    """Of 2**27 + 4 tokens of 16 elements the first and the last; no memory lies in between."""
    force_tiny_blocks(monkeypatch)
    case, tokens = CASES[name], 2**27 + 4
    few = case.inputs(torch.float16, b=1, t=4, h=1, g=1, d=16, c=16)
    small = results(name, few)
    rows = [0, 1, 2, 3]

    def stretched(x: Tensor, shape: str) -> Tensor:
        """The last tokens are those of the few."""
        if "t" not in shape:
            return x
        at = shape.index("t")
        sizes = [tokens if i == at else n for i, n in enumerate(x.shape)]
        steps = [1] * len(sizes)
        for i in reversed(range(len(sizes) - 1)):
            steps[i] = steps[i + 1] * sizes[i + 1]
        big = sparse(sizes, steps, x.dtype)
        big.narrow(at, tokens - 4, 4).copy_(x)
        return big

    def made(*shape, dtype=None, device=None):
        sizes = list(torch.Size(shape[0]) if not isinstance(shape[0], int) else shape)
        steps = [1] * len(sizes)
        for i in reversed(range(len(sizes) - 1)):
            steps[i] = steps[i + 1] * sizes[i + 1]
        return sparse(sizes, steps, dtype)

    def check() -> None:
        monkeypatch.setattr(torch, "empty", made)
        only_last(monkeypatch)
        inputs = {x: stretched(few[x], shape) for x, shape in case.shapes.items()}
        for big, want in zip(results(name, inputs), small, strict=True):
            if big.dim() > 1:
                assert big.numel() > 2**27
                assert_same_bits([big[:, -4:].contiguous()], [want[:, rows].contiguous()])

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
