"""linear_top_k with its classes split over processes: what one process would return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo  # once, and not in every child
import torch.distributed as dist
from support.interpreter import interpreted_only
from support.linear_top_k import OPTIONS, forced, integers, judge, layer
from support.mutants import Mutant, killed
from support.ranks import Ranks
from support.vocab_parallel import part, whole_dtensor
from torch import Tensor
from torch.distributed.tensor import DTensor

import fastlm
from fastlm.ops import _shards

TRITON = pytest.param("triton", marks=interpreted_only)
BACKENDS = ["torch", "reference", TRITON]
FAST = ["torch", TRITON]


def by_group(x: Tensor, matrix: Tensor, k: int, bias: Tensor | None = None, **options: Any) -> Any:
    """Of the whole layer, as the shard of each rank."""
    here = part(len(matrix))
    return fastlm.linear_top_k(
        x, matrix[here], k, linear_bias=None if bias is None else bias[here],
        process_group=dist.group.WORLD, **options,
    )  # fmt: skip


def by_mesh(x: Tensor, matrix: Tensor, k: int, bias: Tensor | None = None, **options: Any) -> Any:
    vector = None if bias is None else whole_dtensor(bias)
    return fastlm.linear_top_k(x, whole_dtensor(matrix), k, linear_bias=vector, **options)


Call = Callable[..., Any]


def are_the_largest(
    call: Call, backend: str, num_classes: int, dtype: torch.dtype, ks: list[int]
) -> None:
    x, matrix, bias = layer(4, 6, num_classes, dtype)

    def sharded(x: Tensor, weight: Tensor, k: int, *, linear_bias: Tensor, **options: Any) -> Any:
        return call(x, weight, k, linear_bias, **options)

    with forced(rows=3, block_v=8), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastlm, "linear_top_k", _only_once(patch, sharded))
        for k in ks:
            for options in ({}, OPTIONS):
                judge(x.view(2, 2, 6), matrix, bias, k, backend=backend, **options)


def _only_once(patch: pytest.MonkeyPatch, sharded: Call) -> Call:
    """In place of the function that it calls itself."""
    original = fastlm.linear_top_k

    def call(*args: Any, **options: Any) -> Any:
        with patch.context() as inner:
            inner.setattr(fastlm, "linear_top_k", original)
            return sharded(*args, **options)

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_halves_are_the_whole(backend, dtype, two):
    # also more than the 7 that one rank has
    two.run(are_the_largest, by_group, backend, 14, dtype, [2, 9])


@pytest.mark.parametrize(("num_classes", "ks"), [(17, [3, 17]), (4, [1, 4])])
@pytest.mark.parametrize("backend", BACKENDS)
def test_three_parts_of_a_dtensor_are_the_whole(backend, num_classes, ks, three):
    """Two shards of 6 and one of 5; two of 2 and one of none."""
    three.run(are_the_largest, by_mesh, backend, num_classes, torch.float32, ks)


def has_the_bits_of_one_process(call: Call) -> None:
    """Sums of integers are exact, and their logits often equal, within a rank and across."""
    x, matrix = integers(2, 3, 12, torch.float32)
    for scale in (1.0, -2.0):
        with forced(rows=2, block_v=4):
            want = fastlm.linear_top_k(x, matrix, 8, logit_scale=scale, backend="triton")
            got = call(x, matrix, 8, logit_scale=scale, backend="triton")
        assert torch.equal(got.indices, want.indices)
        logits = scale * (x @ matrix.t())
        order = logits.sort(dim=1, descending=True, stable=True).indices
        assert torch.equal(got.indices, order[:, :8])
        torch.testing.assert_close(got.logprobs, want.logprobs)


@interpreted_only
def test_of_equals_the_kernels_name_the_lowest_class_first(two, three):
    two.run(has_the_bits_of_one_process, by_group)
    three.run(has_the_bits_of_one_process, by_mesh)


def keeps_the_likely(call: Call, backend: str) -> None:
    """Logits near 1000, one of them 12 above: its log-probability is what an lse would round."""
    matrix, x = torch.zeros(40, 4), torch.zeros(1, 4)
    bias = torch.full((40,), 1000.0)
    bias[27] = 1012.0
    want = torch.log_softmax(bias.double(), 0)
    top = call(x, matrix, 2, bias, backend=backend)
    torch.testing.assert_close(top.logprobs[0, 0].double(), want[27], atol=1e-6, rtol=0)
    assert top.indices[0, 0] == 27


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_likely_class_is_not_rounded_away(backend, two):
    two.run(keeps_the_likely, by_group, backend)


VALUES = {
    "a NaN": ({17: torch.nan}, False),
    "an infinity here and there": ({3: torch.inf, 17: torch.inf}, False),
    "nothing but -inf": (dict.fromkeys(range(24), -torch.inf), False),
    "nothing but -inf in a shard": (dict.fromkeys(range(12), -torch.inf), True),
    "nothing but -inf in another": (dict.fromkeys(range(12, 24), -torch.inf), True),
}


def names_classes(backend: str, values: dict[int, float], has_a_distribution: bool) -> None:
    x, matrix, bias = layer(2, 4, 24)
    for place, value in values.items():
        bias[place] = value
    alone = fastlm.linear_top_k(x, matrix, 15, linear_bias=bias, backend=backend)
    top = by_group(x, matrix, 15, bias, backend=backend)
    torch.testing.assert_close(top.logprobs, alone.logprobs, equal_nan=True)
    assert top.logprobs.isnan().any() != has_a_distribution
    assert top.indices.min() >= 0
    assert top.indices.max() < 24
    assert top.indices.sort(-1).values.diff(dim=-1).gt(0).all()


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("backend", FAST)
def test_rows_that_are_no_numbers_are_those_of_one_process(backend, name, two):
    two.run(names_classes, backend, *VALUES[name])


def communicates(backend: str) -> None:
    x, matrix, _ = layer(4, 6, 8)
    gathered, gather = [], dist.all_gather

    def all_gather(outputs: list[Tensor], tensor: Tensor, group: Any) -> None:
        gathered.append(tensor.numel())
        gather(outputs, tensor, group=group)

    with pytest.MonkeyPatch.context() as patch, forced(rows=2):
        patch.setattr(_shards, "_check_agreement", lambda *args: None)
        patch.setattr(dist, "all_gather", all_gather)
        for k, sent in ((2, 2), (6, 4)):
            gathered.clear()
            by_group(x, matrix, k, backend=backend)
            floats = 2 + (3 if backend == "triton" else 2) * sent
            assert gathered == [2 * floats + 2] * 2
        assert by_group(x[:0], matrix, 3, backend=backend).logprobs.shape == (0, 3)


@pytest.mark.parametrize("backend", FAST)
def test_communicates_candidates_and_two_sums_of_each_row(backend, two):
    two.run(communicates, backend)


def compiles() -> None:
    x, matrix, bias = layer(4, 6, 20)
    whole, here, group = whole_dtensor(matrix), part(20), dist.group.WORLD

    def by_name(x: Tensor) -> tuple[Tensor, ...]:
        top = fastlm.linear_top_k(
            x, matrix[here], 3, linear_bias=bias[here], softcap=2.0, process_group=group
        )
        return tuple(top)

    def by_mesh(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(fastlm.linear_top_k(x, whole, 3))

    for call in (by_name, by_mesh):
        got = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
        for actual, want in zip(got, call(x), strict=True):
            assert torch.equal(actual, want)


def test_compiles_without_a_graph_break(two):
    two.run(compiles)


def is_checked(backend: str) -> None:
    x, matrix, bias = layer(4, 6, 40)
    module = {"torch": "fastlm.ops.eager.linear_top_k", "triton": "fastlm.kernels.linear_top_k"}
    place = module[backend] + (".launch" if backend == "triton" else "")
    with fastlm.checked():
        by_group(x, matrix, 5, bias, backend=backend, **OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{place}.best_of_all", lambda shard, everyones, k: (
            torch.zeros(everyones.shape[2], k), torch.zeros(everyones.shape[2], k).long()
        ))  # fmt: skip
        with fastlm.checked(), pytest.raises(fastlm.KernelMismatch, match="linear_top_k"):
            by_group(x, matrix, 5, bias, backend=backend)


@pytest.mark.parametrize("backend", FAST)
def test_checked_compares_with_the_whole_layer(backend, two):
    two.run(is_checked, backend)


def refuses() -> None:
    x, matrix, bias = layer(4, 6, 40)
    rank, here, group = dist.get_rank(), part(40), dist.group.WORLD
    whole = whole_dtensor(matrix)
    right = {"input": x, "linear_weight": matrix[here], "k": 3, "process_group": group}
    for wrong, error, message in (
        ({"k": 3 + rank}, ValueError, "k must be the same on all ranks"),
        ({"k": 41}, ValueError, r"k must be in \[1, 40\], got 41"),
        ({"k": 2.0}, TypeError, "k must be an integer"),
        ({"k": True}, TypeError, "k must be an integer, got bool"),
        ({"linear_bias": [1.0]}, TypeError, "linear_bias must be a tensor, got list"),
        ({"input": x.tolist()}, TypeError, "input must be a tensor, got list"),
        ({"input": x[: 4 - rank]}, ValueError, "input must be the same on all ranks"),
        (
            {"linear_weight": matrix[: 20 + rank]}, ValueError,
            r"linear_weight must be split evenly over the ranks, got \[20, 21\] classes",
        ),
        ({"linear_bias": bias}, ValueError, r"linear_bias must have shape \(20,\)"),
        ({"process_group": "tp"}, TypeError, "process_group must be a ProcessGroup"),
        (
            {"linear_weight": whole, "process_group": None, "linear_bias": bias}, ValueError,
            "linear_bias must be a DTensor placed as linear_weight is",
        ),
    ):  # fmt: skip
        with pytest.raises(error, match=f"^linear_top_k: {message}"):
            fastlm.linear_top_k(**{**right, **wrong})
    explained = fastlm.explain("linear_top_k", **right)
    assert explained.steps["forward"].backend == "torch"
    replica = DTensor.from_local(x, whole.device_mesh, run_check=False)
    top = fastlm.linear_top_k(replica, whole, 3)
    assert torch.equal(top.indices, by_group(x, matrix, 3).indices)


def test_refuses_on_every_rank(two):
    two.run(refuses)


def poisons(backend: str) -> None:
    x, matrix, _ = layer(4, 6, 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_shards, "_check_agreement", lambda *args: None)
        uneven = matrix[: 21 - dist.get_rank()]
        top = fastlm.linear_top_k(x, uneven, 3, process_group=dist.group.WORLD, backend=backend)
    assert top.logprobs.isnan().all()
    assert top.indices.min() >= 0
    assert top.indices.max() < 40


@pytest.mark.parametrize("backend", FAST)
def test_where_nobody_may_look_other_shards_give_nan(backend, two):
    two.run(poisons, backend)


SHARDS = "kernels/_shards.py"
KERNEL = "kernels/linear_top_k/kernel.py"
LAUNCH = "kernels/linear_top_k/launch.py"
EAGER = "fastlm/ops/eager/linear_top_k.py"
MUTANTS = [
    (Mutant("classes are numbered within a rank", SHARDS,
            'order.div(most, rounding_mode="floor") * shard.largest',
            'order.div(most, rounding_mode="floor") * 0'), "torch"),
    (Mutant("each rank's own sum divides", SHARDS,
            "total = (shares * totals).sum(0)\n    # nothing",
            "total = totals[0]\n    # nothing"), "torch"),
    (Mutant("of equals the last rank's comes first", SHARDS,
            "_, order = keys.sort(dim=1, descending=True, stable=True)",
            "order = keys.shape[1] - 1 - keys.flip(1).sort(dim=1, descending=True, stable=True)[1]"
            ), "triton"),
    (Mutant("classes that are not there come before impossible ones", SHARDS,
            "best[2 : 2 + min(k, self.largest)] = -torch.inf", "pass"), "torch"),
    (Mutant("the order is that of values", SHARDS,
            "_, order = keys.sort(", "_, order = (values[0] if values else keys).sort("),
     "triton"),
    (Mutant("keys are taken for values", SHARDS, "(values[0] if values else keys).gather(1",
            "keys.gather(1"), "triton"),
    (Mutant("the likely class is judged by a rounded lse", SHARDS,
            "(x - maximum[:, None]) - total.log()[:, None]",
            "x - (maximum + total.log())[:, None]"), "torch"),
    (Mutant("ranks send one of their best", EAGER,
            "most, found = min(k, shard.largest), min(k, shard.size)",
            "most, found = min(k, shard.largest), min(1, shard.size)"), "torch"),
    (Mutant("a shard of -inf alone is a NaN", EAGER,
            "maximum.masked_fill(maximum == -torch.inf, 0.0)", "maximum"), "torch"),
    (Mutant("a shard of -inf alone is a NaN in the kernel", KERNEL,
            'origin = tl.where(maximum == float("-inf"), 0.0, maximum)', "origin = maximum"),
     "triton"),
    (Mutant("a shard writes log-probabilities of its own", KERNEL,
            "tl.store(keys_ptr + place, best)",
            "tl.store(keys_ptr + place, best)\n            x = (x - maximum) - log_sum"),
     "triton"),
    (Mutant("keys, columns and values lie where there is no gap", LAUNCH,
            "first = 2 + place * most", "first = 2 + place * found"), "triton"),
]  # fmt: skip


def _everything(backend: str) -> None:
    are_the_largest(by_mesh, backend, 17, torch.float32, [3, 17])
    are_the_largest(by_mesh, backend, 4, torch.float32, [4])
    keeps_the_likely(by_mesh, backend)
    x, matrix = torch.zeros(2, 4), torch.zeros(40, 4)
    bias = torch.zeros(40)
    bias[:14] = -torch.inf
    top = by_mesh(x, matrix, 40, bias, backend=backend)
    assert top.logprobs[:, :26].isfinite().all()
    assert top.logprobs[:, 26:].isneginf().all()
    assert top.indices.sort(-1).values.diff(dim=-1).gt(0).all()
    if backend == "triton":
        has_the_bits_of_one_process(by_mesh)
        # a cap makes classes equal that are not
        bias = torch.arange(40.0)
        top = by_mesh(x, matrix, 3, bias, backend=backend, softcap=0.5)
        assert top.indices.tolist() == [[39, 38, 37]] * 2


def _on_three_ranks(backend: str) -> Callable[[], None]:
    def check() -> None:
        ranks = Ranks(3)
        try:
            ranks.run(_everything, backend)
        finally:
            ranks.close()

    return check


CHECKS = {backend: _on_three_ranks(backend) for backend in ("torch", "triton")}


@interpreted_only
@pytest.mark.slow
@pytest.mark.parametrize(("mutant", "backend"), MUTANTS, ids=lambda x: str(x))
def test_a_planted_bug_is_noticed(mutant, backend):
    assert killed(mutant, CHECKS[backend])


@interpreted_only
@pytest.mark.slow
def test_a_changed_comment_is_not():
    comment = Mutant("a comment", EAGER, "What this rank sends of a chunk;", "Sent;")
    assert not killed(comment, CHECKS["torch"])
