"""Every pair of things a loss can be told, inputs of every dtype and autocast among them.

A few calls are chosen so that each two values of different options meet in one of them.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.linear_cross_entropy import forced, inputs
from support.losses import OPTIONS, definition, flattened, weights
from torch import Tensor

import fastlm
from fastlm import testing
from fastlm.testing import cross_entropy_inputs

BATCH, STEPS, WIDTH, VOCAB_SIZE = 3, 6, 8, 150

# option -> its values, None where it is not given
SHARED: dict[str, list[Any]] = {
    "backend": ["triton", "torch"],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "autocast": [None, True],
    "reduction": ["mean", "sum", "none"],
    "ignore_index": [-100, 1],
    "return_stats": [None, True],
    **{
        name: [None, OPTIONS[name]]
        for name in ("weight", "label_smoothing", "softcap", "logit_scale", "z_loss")
    },
}
LAYER = {
    **SHARED,
    "bias": [None, True],
    "shift": [None, 2],
    "num_items": [None, "int", "tensor"],
    "needs": ["everything", "input", "layer"],
}
Call = dict[str, Any]


def may_be_told(call: Call) -> bool:
    """Nothing else is refused."""
    return not (call.get("reduction") == "none" and call.get("num_items") is not None)


def pairs_of(call: Call) -> set[tuple[Any, ...]]:
    told = [(name, str(value)) for name, value in call.items()]
    return set(itertools.combinations(told, 2))


def wanted_pairs(options: dict[str, list[Any]]) -> set[tuple[Any, ...]]:
    found = set()
    for (first, values), (second, others) in itertools.combinations(options.items(), 2):
        for value, other in itertools.product(values, others):
            if may_be_told({first: value, second: other}):
                found |= pairs_of({first: value, second: other})
    return found


def covering(options: dict[str, list[Any]]) -> list[Call]:
    """Calls in which every pair occurs: each takes, option by option, what meets most new ones."""
    missing, calls = wanted_pairs(options), list[Call]()
    while missing:
        (first, second), *_ = sorted(missing)
        call: Call = {}
        for name, value in (first, second):
            call[name] = next(x for x in options[name] if str(x) == value)
        for name, values in options.items():
            if name in call:
                continue
            possible = [x for x in values if may_be_told({**call, name: x})]
            call[name] = max(possible, key=lambda x: len(missing & met(call, name, x, options)))
        call = {name: call[name] for name in options}
        missing -= pairs_of(call)
        calls.append(call)
    return calls


def met(call: Call, name: str, value: Any, options: dict[str, list[Any]]) -> set[tuple[Any, ...]]:
    told = {**call, name: value}
    return pairs_of({key: told[key] for key in options if key in told})


def named(call: Call) -> str:
    return "-".join(f"{name}={value}" for name, value in call.items() if value is not None)


# and all of them at once, with the one reduction that divides by two different counts
AT_ONCE = [
    {**{name: values[-1] for name, values in LAYER.items()}, "dtype": torch.float32,
     "reduction": "mean", "num_items": None, "needs": "everything", "backend": backend}
    for backend in LAYER["backend"]
]  # fmt: skip
LOGITS_CALLS, LAYER_CALLS = covering(SHARED), [*covering(LAYER), *AT_ONCE]


@pytest.mark.parametrize("options, calls", [(SHARED, LOGITS_CALLS), (LAYER, LAYER_CALLS)])
def test_every_pair_is_among_the_calls(options, calls):
    met_pairs = set().union(*map(pairs_of, calls))
    assert met_pairs >= wanted_pairs(options)
    assert all(map(may_be_told, calls))
    assert len(calls) < 30


def options_of(call: Call, device: str) -> dict[str, Any]:
    """As the functions take them."""
    names = ("reduction", "ignore_index", "return_stats", "label_smoothing", "softcap",
             "logit_scale", "z_loss", "shift", "backend")  # fmt: skip
    options = {name: call[name] for name in names if call.get(name) is not None}
    if call["weight"]:
        options["weight"] = weights(VOCAB_SIZE, device)
    if call.get("num_items"):
        options["num_items"] = 7 if call["num_items"] == "int" else torch.tensor(7, device=device)
    return options


def by_torch(logits: Tensor, targets: Tensor, call: Call) -> tuple[Tensor, ...]:
    """The same by torch, of the positions that predict something."""
    shift = call.get("shift") or 0
    kept = logits[:, : STEPS - shift].flatten(0, 1)
    targets = targets[:, shift:].flatten()
    targets = torch.where(targets == call["ignore_index"], -100, targets)
    given = {name: call[name] for name in OPTIONS if call[name] is not None}
    if call.get("num_items"):
        given["reduction"] = "sum"
    loss, *stats = definition(kept, targets, **given)
    if call.get("num_items"):
        loss = loss / 7
    if loss.dim():
        loss = loss.view(BATCH, -1)
    return loss, *(F.pad(x.view(BATCH, -1), (0, shift)) for x in stats)


def targets_of(targets: Tensor, call: Call) -> Tensor:
    targets = torch.where(targets == -100, call["ignore_index"], targets).view(BATCH, STEPS)
    targets[:, STEPS // 2] = 3
    return targets


def autocast(call: Call, device: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device, torch.bfloat16, enabled=bool(call["autocast"]))


@pytest.mark.parametrize("call", LOGITS_CALLS, ids=named)
def test_logits(call, device):
    rows = BATCH * STEPS
    logits, targets = cross_entropy_inputs(rows, VOCAB_SIZE, call["dtype"], device)
    logits, targets = logits.view(BATCH, STEPS, -1), targets_of(targets, call)
    before = logits.clone()

    def ours(x: Tensor) -> tuple[Tensor, ...]:
        with autocast(call, device):
            return flattened(fastlm.cross_entropy(x, targets, **options_of(call, device)))

    with forced(block_v=64):
        actual = testing.run(ours, logits)
    assert actual[-1].dtype == call["dtype"]
    assert actual[0].dtype == torch.float32
    assert torch.equal(logits, before)
    plain, truth = (
        testing.run(lambda x: by_torch(x, targets, call), logits, dtype=dtype)
        for dtype in (torch.float32, torch.float64)
    )
    testing.assert_all_as_accurate(named(call), actual, plain=plain, truth=truth)


@pytest.mark.parametrize("call", LAYER_CALLS, ids=named)
def test_layer(call, device):
    dtype = torch.bfloat16 if call["autocast"] else call["dtype"]
    x, matrix, bias, targets = inputs(BATCH * STEPS, WIDTH, VOCAB_SIZE, dtype, device, seed=1)
    x, targets = x.view(BATCH, STEPS, WIDTH), targets_of(targets, call)
    if call["autocast"]:
        # parameters of another dtype, with values that the cast leaves as they are
        x, matrix, bias = x.to(call["dtype"]), matrix.float(), bias.float()
    params = [x, matrix, bias if call["bias"] else None]
    if call["needs"] == "input":
        frozen = [None, *params[1:]]
    else:
        frozen = [x if call["needs"] == "layer" else None, None, None]
    before = [None if t is None else t.clone() for t in params]

    def called(function: Any, dtype: torch.dtype | None) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and gradients."""
        leaves = [
            None if t is None else t.detach().to(dtype or t.dtype).requires_grad_(f is None)
            for t, f in zip(params, frozen, strict=True)
        ]
        outputs = function(*leaves)
        generator = torch.Generator().manual_seed(0)
        upstream = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
        needing = [t for t in leaves if t is not None and t.requires_grad]
        gradients = torch.autograd.grad(outputs, needing, upstream)
        for gradient, leaf in zip(gradients, needing, strict=True):
            assert gradient.dtype == leaf.dtype
        return [o.detach() for o in outputs], list(gradients)

    def ours(x: Tensor, matrix: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        with autocast(call, device):
            return flattened(
                fastlm.linear_cross_entropy(
                    x, matrix, targets, linear_bias=bias, **options_of(call, device)
                )
            )

    def torchs(x: Tensor, matrix: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        return by_torch(F.linear(x, matrix, bias), targets, call)

    with forced(rows=7, block_v=64):
        outputs, gradients = called(ours, None)
    assert outputs[0].dtype == torch.float32
    for tensor, was in zip(params, before, strict=True):
        assert tensor is was is None or torch.equal(tensor, was)
    plain, plain_gradients = called(torchs, torch.float32)
    truth, true_gradients = called(torchs, torch.float64)
    testing.assert_all_as_accurate(named(call), outputs, plain=plain, truth=truth)
    if call["autocast"]:
        # the products of autocast are in bfloat16 on a GPU, whatever the parameters are
        plain_gradients = [gradient.bfloat16() for gradient in plain_gradients]
        # and yet a float32 parameter's gradient is not rounded to bfloat16 at last
        wide = [gradient for gradient in gradients if gradient.dtype == torch.float32]
        assert all((gradient.bfloat16() != gradient).any() for gradient in wide)
    testing.assert_all_as_accurate(
        named(call), gradients, plain=plain_gradients, truth=true_gradients
    )
