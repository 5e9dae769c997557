"""The ops on layers, rms_norm, rotary and glu: what the tests of their kernels share.

``door`` is a backend module.  A case runs both of its steps and returns all they write.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.layouts import layouts
from torch import Tensor

from fastlm.kernels.glu import tuning as glu_tuning
from fastlm.kernels.rms_norm import tuning as rms_norm_tuning
from fastlm.kernels.rotary import tuning as rotary_tuning
from fastlm.ops.glu import ACTIVATIONS
from fastlm.ops.reference import glu, rms_norm, rotary
from fastlm.testing import assert_as_accurate

Tensors = dict[str, Tensor]
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


def assert_same_bits(actual: list[Tensor], expected: list[Tensor], why: str = "") -> None:
    for place, (got, want) in enumerate(zip(actual, expected, strict=True)):
        same = got.shape == want.shape and got.dtype == want.dtype
        integers = torch.int64 if got.dtype == torch.float64 else torch.int16
        assert same and torch.equal(got.view(integers), want.view(integers)), f"{why} [{place}]"
