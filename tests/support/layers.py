"""The ops on layers, rms_norm, rotary and glu: what the tests of their kernels share.

``door`` is a backend module.  A case runs both of its steps and returns all they write.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.layouts import layouts
from support.memory import guarded, sparse
from torch import Tensor

from fastlm.kernels.glu import tuning as glu_tuning
from fastlm.kernels.rms_norm import tuning as rms_norm_tuning
from fastlm.kernels.rotary import tuning as rotary_tuning
from fastlm.ops.glu import ACTIVATIONS
from fastlm.ops.reference import glu, rms_norm, rotary
from fastlm.testing import assert_as_accurate

Tensors = dict[str, Tensor]
_HUGE = 2**30 + 64
REFERENCES = {"rms_norm": rms_norm, "rotary": rotary, "glu": glu}


@dataclass(frozen=True)
class Case:
    """A way of calling an op.

    Attributes:
        op: Its name.
        shapes: Of each tensor: letters for sizes, ``"btc"``.
        run: Calls the steps of a door.
    """

    op: str
    shapes: dict[str, str]
    run: Callable[[Any, Tensors], list[Tensor]]

    def inputs(self, dtype: torch.dtype = torch.float32, **sizes: int) -> Tensors:
        """Random tensors; sizes that are not given are small, and several blocks of a tiny plan."""
        sizes = {"b": 2, "t": 3, "h": 3, "g": 2, "d": 14, "p": 5, "c": 37, **sizes}
        tensors = {
            name: torch.randn([sizes[letter] for letter in shape], dtype=torch.float64).to(dtype)
            for name, shape in self.shapes.items()
        }
        if "weight" in tensors:
            tensors["weight"] += 1
        return tensors

    def few_tokens(self) -> Tensors:
        """Four, of 16 elements."""
        return self.inputs(torch.float16, b=1, t=4, h=1, g=1, d=16, c=16)


def _normalised(door: Any, x: Tensors, *, weight_offset: float = 0.5) -> list[Tensor]:
    weight, residual = x.get("weight"), x.get("residual")
    offset = 0.0 if weight is None else weight_offset
    out, total, rstd = door.forward(x["input"], weight, residual, 1e-3, offset)
    vectors = x["input"] if residual is None else total
    needs = (True, weight is not None)
    grads = door.backward(x["dout"], x.get("dtotal"), vectors, weight, rstd, offset, *needs)
    return [out, total, rstd, *grads]


def _rotated(door: Any, x: Tensors, *, interleaved: bool) -> list[Tensor]:
    angles = (x["cos"], x["sin"], interleaved)
    forward = door.forward(x["query"], x["key"], *angles)
    return [*forward, *door.backward(x["query"], x["key"], *angles)]


def _gated(door: Any, x: Tensors, *, activation: str) -> list[Tensor]:
    out = door.forward(x["gate"], x["up"], activation)
    return [out, *door.backward(x["dout"], x["gate"], x["up"], activation)]


def _rotary_case(angles: str, *, interleaved: bool) -> Case:
    shapes = {"query": "bthd", "key": "btgd", "cos": angles, "sin": angles}
    return Case("rotary", shapes, lambda door, x: _rotated(door, x, interleaved=interleaved))


_VECTORS = {"input": "btc", "dout": "btc"}
_RESIDUAL = {"residual": "btc", "dtotal": "btc"}
CASES = {
    "norm": Case("rms_norm", {**_VECTORS, "weight": "c"}, _normalised),
    "norm without weight": Case("rms_norm", _VECTORS, _normalised),
    "norm of a sum": Case("rms_norm", {**_VECTORS, **_RESIDUAL, "weight": "c"}, _normalised),
    "rotary": _rotary_case("tp", interleaved=False),
    "rotary of neighbours": _rotary_case("btp", interleaved=True),
    **{
        activation: Case(
            "glu",
            {"gate": "btc", "up": "btc", "dout": "btc"},
            lambda door, x, activation=activation: _gated(door, x, activation=activation),
        )
        for activation in ACTIVATIONS
    },
}


def judge(case: Case, door: Any, inputs: Tensors) -> None:
    """Hold what the door computes to the definition in float64."""
    reference = REFERENCES[case.op]
    truth = SimpleNamespace(forward=reference.truth_forward, backward=reference.truth_backward)
    results = (case.run(x, inputs) for x in (door, reference, truth))
    for place, (got, plain, want) in enumerate(zip(*results, strict=True)):
        assert_as_accurate(f"{case.op}[{place}]", got, plain=plain, truth=want)


def force_tiny_blocks(monkeypatch: pytest.MonkeyPatch, *, whole: bool = True) -> None:
    """Several programs along each axis; ``whole``: of a norm's vectors, each in one block."""
    for_weight = rms_norm_tuning.Plan(block_rows=2, block_c=16, num_warps=1, rows=4)
    block_c = 64 if whole else 16
    plan = rms_norm_tuning.Plan(2, block_c, num_warps=1, is_whole=whole, rows=4)
    monkeypatch.setattr(
        rms_norm_tuning, "plan", lambda step, size: for_weight if "weight" in step else plan
    )
    for_heads = rotary_tuning.Plan(block_rows=4, block_p=4, num_warps=1)
    monkeypatch.setattr(rotary_tuning, "plan", lambda pairs: for_heads)
    for_rows = glu_tuning.Plan(block=16, num_warps=1)
    monkeypatch.setattr(glu_tuning, "plan", lambda step, size: for_rows)


def relaid(inputs: Tensors, place: int) -> Tensors:
    """The same values in other layouts, two neighbours never in the same."""
    ways = [layouts(x) for x in inputs.values()]
    return {
        name: views[(place + number) % len(views)][1]
        for number, (name, views) in enumerate(zip(inputs, ways, strict=True))
    }


# each tensor alone with elements beyond 2**31, by each of its strides
FAR = {
    "b": ("norm of a sum", ("input", "residual", "dout"), (2 * _HUGE, 37, 1)),
    "t": ("norm of a sum", ("input", "residual", "dout"), (111, _HUGE, 1)),
    "c": ("norm of a sum", ("input", "residual", "dout"), (111, 37, 2**26 + 3)),
    "b of heads": ("rotary", ("query", "key"), (2 * _HUGE, 42, 14, 1)),
    "t of heads": ("rotary", ("query", "key"), (126, _HUGE, 14, 1)),
    "h of heads": ("rotary of neighbours", ("query", "key"), (126, 42, 2 * _HUGE, 1)),
    "d of heads": ("rotary of neighbours", ("query", "key"), (126, 42, 14, 2**28 + 3)),
    "t of angles": ("rotary", ("cos", "sin"), (_HUGE, 1)),
    "p of angles": ("rotary", ("cos", "sin"), (5, 2**29 + 3)),
    "b of angles": ("rotary of neighbours", ("cos", "sin"), (2 * _HUGE, 5, 1)),
    "b of gates": ("silu", ("gate", "up", "dout"), (2 * _HUGE, 37, 1)),
    "t of gates": ("silu", ("gate", "up", "dout"), (111, _HUGE, 1)),
    "c of gates": ("silu", ("gate", "up", "dout"), (111, 37, 2**26 + 3)),
}

# tokens of 16 elements: more than 2**31
MANY_TOKENS = 2**27 + 4


def run_guarded(case: Case, door: Any, end: str, sizes: Sequence[int]) -> None:
    """Every tensor, those that are made as well, at a protected page."""
    make = torch.empty
    for size, place in [*((size, 0) for size in sizes), (sizes[-1], 2), (sizes[-1], 4)]:
        inputs = case.inputs(b=1, c=size, d=size, p=size // 2)
        views = relaid(inputs, place)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", lambda *a, **k: guarded(make(*a, **k), end))
            made = case.run(door, {x: guarded(view, end) for x, view in views.items()})
        assert all(x.isfinite().all() for x in made)


def check_far(case: Case, door: Any, far: Sequence[str], strides: Sequence[int]) -> None:
    """Elements that are far apart count like those of a tensor without gaps."""
    inputs = case.inputs(torch.float16)
    want = case.run(door, inputs)
    for name in far:
        values = inputs[name]
        view = sparse(values.shape, strides, values.dtype).copy_(values)
        assert sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True)) > 2**31
        assert_same_bits(case.run(door, {**inputs, name: view}), want, name)


def check_many(case: Case, door: Any, few: Tensors, wanted: list[Tensor], last: int) -> None:
    """The ``last`` tokens of more than 2**31 elements; no memory lies before them.

    They are those of ``few``.  The caller sees to it that these alone are computed.
    """

    def many(x: Tensor, shape: str) -> Tensor:
        if "t" not in shape:
            return x
        at = shape.index("t")
        sizes = (*x.shape[:at], MANY_TOKENS, *x.shape[at + 1 :])
        tokens = _without_memory(sizes, dtype=x.dtype)
        tokens.narrow(at, MANY_TOKENS - 4, 4).copy_(x)
        return tokens

    inputs = {name: many(few[name], shape) for name, shape in case.shapes.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", _without_memory)
        results = case.run(door, inputs)
    for got, want in zip(results, wanted, strict=True):
        if want.dim() > 1:
            assert got.shape[1] == MANY_TOKENS
            assert_same_bits([got[:, -last:].contiguous()], [want[:, -last:].contiguous()])


def _without_memory(*shape: Any, dtype: torch.dtype, device: Any = None) -> Tensor:
    sizes = torch.Size(shape if isinstance(shape[0], int) else shape[0])
    steps = [math.prod(sizes[at + 1 :]) for at in range(len(sizes))]
    return sparse(sizes, steps, dtype)


def assert_same_bits(actual: list[Tensor], expected: list[Tensor], why: str = "") -> None:
    for place, (got, want) in enumerate(zip(actual, expected, strict=True)):
        same = got.shape == want.shape and got.dtype == want.dtype
        integers = torch.int64 if got.dtype == torch.float64 else torch.int16
        assert same and torch.equal(got.view(integers), want.view(integers)), f"{why} [{place}]"
