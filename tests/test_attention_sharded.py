"""causal_attention of DTensors: rows and heads split over processes give what one process gives."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch._dynamo  # once, and not in every child
from support.attention import NAMES, backward_arguments, blocks, upstream
from support.interpreter import interpreted_only
from support.ranks import Ranks
from torch import Tensor
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

import fastlm
from fastlm.testing import attention_inputs

ROWS, TOKENS, HEADS, WHOLE, PART = Shard(0), Shard(1), Shard(2), Replicate(), Partial()
PADDED = {"key_start": torch.tensor([0, 3, 1]), "key_end": torch.tensor([9, 7, 2])}
PACKED = {"cu_seqlens_q": torch.tensor([0, 4, 8])}
SINKS = {"sinks": torch.tensor([0.7, -1.2, 0.1, 0.4], dtype=torch.float64)}
MORE = {**SINKS, "window_size": 3, "softcap": 2.0}


def attend(leaves: list[Tensor], grads: list[Tensor], **options: Any) -> list[Tensor]:
    """out, lse and all gradients; a fourth leaf is the sinks."""
    if len(leaves) > 3:
        options["sinks"] = leaves[3]
    outputs = fastlm.causal_attention(*leaves[:3], return_lse=True, **options)
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]


Placements = list[Placement]


def judge(
    sizes: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    given: tuple[Placements, Placements],
    options: dict[str, Any],
    backend: str = "torch",
) -> list[tuple[Placement, ...]]:
    """Compare with the definition on one process, and return how out, lse and gradients are placed.

    Args:
        sizes: B, T, S, H, G, D.
        mesh_shape: Processes.
        given: Placements of query and of key and value.  Other tensors are replicated.
        options: Of the call, float64.
        backend: Of the call.
    """
    mesh = init_device_mesh("cpu", mesh_shape)
    everywhere = [WHOLE] * len(mesh_shape)
    leaves = list(attention_inputs(*sizes, torch.float64))
    grads = upstream(leaves[0], leaves[2])
    options = dict(options)
    if "sinks" in options:
        leaves.append(options.pop("sinks"))
    want = attend([x.requires_grad_() for x in leaves], grads, backend="reference", **options)
    placements = [given[0], given[1], given[1], everywhere]
    shards = [
        distribute_tensor(x.detach(), mesh, p).requires_grad_()
        for x, p in zip(leaves, placements, strict=False)
    ]
    replicas = {
        name: distribute_tensor(x, mesh, everywhere) if isinstance(x, Tensor) else x
        for name, x in options.items()
    }
    grads = [distribute_tensor(x, mesh, everywhere) for x in grads]
    with blocks(16, 16):
        got = attend(shards, grads, backend=backend, **replicas)
    for name, a, b in zip(NAMES, got, want, strict=False):
        assert isinstance(a, DTensor)
        torch.testing.assert_close(a.full_tensor(), b, msg=lambda m, name=name: f"{name}: {m}")
    return [x.placements for x in got]


def spread(*placements: Placement) -> list[tuple[Placement, ...]]:
    return [(x,) for x in placements]


# the rules are those of the operators, whatever runs inside: the interpreter can wait
INTERPRETED = pytest.param("triton", marks=[interpreted_only, pytest.mark.slow])


@pytest.mark.parametrize("backend", ["torch", INTERPRETED])
def test_rows_and_heads_are_attended_where_they_are(backend, two):
    for sizes, given, options, expected in (
        ((2, 9, 9, 4, 2, 8), (ROWS, ROWS), {}, spread(*5 * [ROWS])),
        # two rows here and one there; each knows a part of what the sinks get
        ((3, 9, 9, 4, 2, 8), (ROWS, ROWS), {**MORE, **PADDED}, spread(*5 * [ROWS], PART)),
        (
            (3, 9, 9, 4, 2, 8), (HEADS, HEADS), {**MORE, **PADDED},
            spread(HEADS, Shard(1), HEADS, HEADS, HEADS, Shard(0)),
        ),
        (
            (1, 9, 9, 4, 4, 8), (HEADS, HEADS), {**MORE, **PACKED},
            spread(HEADS, Shard(1), HEADS, HEADS, HEADS, Shard(0)),
        ),
        # one key head for all query heads: each knows a part of its gradient
        ((2, 5, 9, 4, 1, 8), (HEADS, WHOLE), {}, spread(HEADS, Shard(1), HEADS, PART, PART)),
    ):  # fmt: skip
        for found in two.run(judge, sizes, (2,), tuple([x] for x in given), options, backend):
            assert found == expected


def test_what_is_placed_in_two_ways_is_moved_first(two):
    sizes = (2, 9, 9, 4, 2, 8)
    heads = spread(HEADS, Shard(1), HEADS, HEADS, HEADS)
    rows = spread(*5 * [ROWS])
    for given, expected in (
        ((HEADS, WHOLE), heads),
        ((WHOLE, HEADS), heads),
        ((ROWS, WHOLE), rows),
        ((WHOLE, ROWS), rows),
    ):
        for found in two.run(judge, sizes, (2,), tuple([x] for x in given), {}):
            assert found == expected
    for given in ((ROWS, HEADS), (TOKENS, TOKENS), (Shard(3), HEADS)):
        two.run(judge, sizes, (2,), tuple([x] for x in given), {})


def test_what_divides_unevenly_is_brought_together(two):
    whole = spread(*5 * [WHOLE])
    for sizes, given in (
        ((1, 9, 9, 6, 3, 8), HEADS),  # three query heads here, two key heads
        ((1, 9, 9, 3, 1, 8), HEADS),
        ((1, 9, 9, 3, 3, 8), HEADS),
        ((1, 9, 9, 4, 2, 8), ROWS),
    ):
        for found in two.run(judge, sizes, (2,), ([given], [WHOLE]), {}):
            assert found == whole


def test_a_mesh_of_two_dimensions_splits_both(four):
    expected = [
        (ROWS, HEADS), (ROWS, Shard(1)), *3 * [(ROWS, HEADS)], (PART, Shard(0))
    ]  # fmt: skip
    both = ([ROWS, HEADS], [ROWS, HEADS])
    for found in four.run(judge, (3, 9, 9, 4, 2, 8), (2, 2), both, {**MORE, **PADDED}):
        assert found == expected
    # six key heads divide by each of the two, but not by four
    heads = ([HEADS, HEADS], [HEADS, HEADS])
    for out, *_ in four.run(judge, (1, 9, 9, 12, 6, 8), (2, 2), heads, {}):
        assert out != (HEADS, HEADS)
    for out, *_ in four.run(judge, (1, 9, 9, 8, 4, 8), (2, 2), heads, {}):
        assert out == (HEADS, HEADS)


def any_subset() -> None:
    mesh = init_device_mesh("cpu", (2,))
    inputs = [*attention_inputs(2, 9, 9, 4, 2, 8, torch.float64), SINKS["sinks"]]
    grad = torch.ones_like(inputs[0])
    for needs in ((True, False, False, False), (False, True, False, True), (False,) * 4):
        results = []
        for shard in (lambda x: x, lambda x: distribute_tensor(x, mesh, [WHOLE])):
            leaves = [
                shard(x.detach().clone()).requires_grad_(n)
                for x, n in zip(inputs, needs, strict=True)
            ]
            rows = leaves[0] if shard(grad) is grad else leaves[0].redistribute(mesh, [HEADS])
            out = fastlm.causal_attention(rows, *leaves[1:3], sinks=leaves[3])
            if any(needs):
                out.backward(shard(grad))
            results.append([out.detach(), *(x.grad for x in leaves)])
        for one, many in zip(*results, strict=True):
            assert (one is None) == (many is None)
            if one is not None:
                torch.testing.assert_close(many.full_tensor(), one)
    # what is not needed is empty, on the mesh too
    query, key, value = (distribute_tensor(x, mesh, [HEADS]) for x in inputs[:3])
    out, lse = fastlm.causal_attention(query, key, value, return_lse=True)
    arguments = backward_arguments(out, None, out, lse, query, key, value)[:-3]
    backward = torch.ops.fastlm.causal_attention_backward
    dquery, dkey, _, dsinks = backward(*arguments, False, True, False, "torch")
    assert dkey.full_tensor().shape == key.shape
    assert dquery.full_tensor().shape == dsinks.full_tensor().shape == (0,)


def test_any_subset_of_gradients(two):
    two.run(any_subset)


def refuses_local() -> None:
    mesh = init_device_mesh("cpu", (2,))
    inputs = attention_inputs(2, 9, 9, 4, 2, 8)
    query, key, value = (distribute_tensor(x, mesh, [ROWS]) for x in inputs)
    for arguments, options, message in (
        ((query, inputs[1], value), {}, "key must be a DTensor like the others, got a local"),
        ((inputs[0], key, inputs[2]), {}, "key must be a local tensor, got DTensor"),
        ((query, key, value), {"sinks": torch.zeros(4)}, "sinks must be a DTensor like the others"),
        ((query, key, value), {"key_end": torch.tensor([9, 9])}, "key_end must be a DTensor like"),
    ):
        with pytest.raises(TypeError, match=f"causal_attention: {message}"):
            fastlm.causal_attention(*arguments, **options)


def test_tensors_are_all_distributed_or_none(two):
    two.run(refuses_local)


def checked_and_explained() -> None:
    mesh = init_device_mesh("cpu", (2,))
    inputs = [
        distribute_tensor(x, mesh, [HEADS]).requires_grad_()
        for x in attention_inputs(2, 9, 9, 4, 2, 8, torch.bfloat16)
    ]
    with fastlm.checked():
        fastlm.causal_attention(*inputs).sum().backward()
    explanation = fastlm.explain("causal_attention", *inputs)
    assert {step: choice.backend for step, choice in explanation.steps.items()} == {
        "forward": "torch", "backward": "torch",
    }  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        wide = [x.detach().float() for x in inputs]
        out = fastlm.causal_attention(*wide)
    assert torch.equal(out.full_tensor(), fastlm.causal_attention(*inputs).full_tensor())


def test_is_checked_explained_and_cast_like_any_call(two):
    two.run(checked_and_explained)


def compiles(backend: str, first: bool) -> None:
    mesh = init_device_mesh("cpu", (2,))
    inputs = [*attention_inputs(2, 9, 9, 4, 2, 8, torch.float64), SINKS["sinks"]]

    def step(call: Any) -> list[Tensor]:
        leaves = [
            distribute_tensor(x.detach(), mesh, [p]).requires_grad_()
            for x, p in zip(inputs, (HEADS, WHOLE, HEADS, WHOLE), strict=True)
        ]
        out, lse = call(*leaves)
        grads = torch.autograd.grad(out.square().sum() + lse.sum(), leaves)
        return [x.full_tensor() for x in (out, lse, *grads)]

    def function(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Any:
        return fastlm.causal_attention(
            query, key, value, sinks=sinks, window_size=3, return_lse=True, backend=backend
        )

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    calls = (compiled, function) if first else (function, compiled)
    torch.testing.assert_close(*map(step, calls))


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False], ids=["compiled first", "eager first"])
def test_compiles_without_a_graph_break(first):
    ranks = Ranks(2)  # which have not seen a DTensor
    try:
        ranks.run(compiles, "torch", first)
    finally:
        ranks.close()


def test_a_call_without_dtensors_does_not_import_them():
    code = """
import sys, torch, fastlm
fastlm.causal_attention(*torch.randn(3, 1, 2, 1, 8, requires_grad=True)).sum().backward()
assert "fastlm.ops._attention_sharding" not in sys.modules
assert "torch.distributed.tensor" not in sys.modules
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
