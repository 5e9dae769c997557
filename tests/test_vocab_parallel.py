"""linear_cross_entropy with its classes split over processes: what one process would return."""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

import pytest
import torch
import torch._dynamo  # once, and not in every child
import torch.distributed as dist
from support.host_sync import no_host_sync
from support.interpreter import interpreted_only
from support.linear_cross_entropy import NO_OPTIONS, NothingLarge, forced, inputs
from support.losses import OPTIONS, flattened
from support.vocab_parallel import by_group, judge, part, whole_dtensor
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh

import fastlm
from fastlm import testing
from fastlm.kernels._launch import recorded
from fastlm.kernels._shards import combine
from fastlm.ops import _shards
from fastlm.ops import linear_cross_entropy as op

BACKENDS = [
    "torch",
    "reference",
    pytest.param("triton", marks=interpreted_only),
]


# everything at once, but for the reduction
TOGETHER = {name: value for name, value in OPTIONS.items() if name != "reduction"}
PER_POSITION = {**TOGETHER, "reduction": "none"}
ALONE = [{}, *({name: value} for name, value in OPTIONS.items()), {"reduction": "sum"}]


def judge_each(
    cases: list[dict[str, Any]], backend: str, num_classes: int, as_dtensor: bool = False
) -> None:
    """Two chunks of rows, three blocks of classes; a bias where there are other options."""
    with forced(rows=2, block_v=16):
        for options in cases:
            judge(
                (4, 6, num_classes), torch.float64, {**options, "backend": backend},
                as_dtensor=as_dtensor, has_bias=len(options) > 1,
            )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_halves_are_the_whole(backend, two):
    two.run(judge_each, [*ALONE, TOGETHER, PER_POSITION], backend, 74)


@pytest.mark.parametrize("num_classes", [74, 4], ids=["uneven", "one of none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_three_parts_of_a_dtensor_are_the_whole(backend, num_classes, three):
    three.run(judge_each, [{}, PER_POSITION], backend, num_classes, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted_only)])
def test_is_as_accurate_as_torch(backend, dtype, two):
    two.run(judge, (16, 16, 150), dtype, {**PER_POSITION, "backend": backend})


@interpreted_only
@pytest.mark.slow
def test_rounding_at_the_targets_does_not_add_up(two):
    options = {"reduction": "sum", "backend": "triton"}
    two.run(functools.partial(judge, scale=0.125), (32, 8, 150), torch.bfloat16, options)


def judge_likely(backend: str, ahead: float) -> None:
    """Logits near 200, that of the target ``ahead`` of the others."""
    matrix, x = 1e-3 * torch.randn(40, 6), torch.randn(8, 6)
    bias = torch.full((40,), 200.0)
    targets = torch.arange(8) * 5
    bias[targets] += ahead

    def definition(x: Tensor, matrix: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        logits = torch.nn.functional.linear(x, matrix, bias)
        return (torch.nn.functional.cross_entropy(logits, targets, reduction="none"),)

    def call(x: Tensor, matrix: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return by_group(x, matrix, bias, targets, reduction="none", backend=backend)

    here = part(40)
    actual = testing.run(call, x, matrix[here], bias[here])[:1]
    plain = testing.run(definition, x, matrix, bias)[:1]
    truth = testing.run(definition, x, matrix, bias, dtype=torch.float64)[:1]
    testing.assert_all_as_accurate("likely", actual, plain=plain, truth=truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_of_a_likely_target_is_not_rounded_away(backend, two):
    two.run(judge_likely, backend, 9.0)


def same_as_alone(backend: str, options: dict[str, Any]) -> None:
    """What needs more than a definition by torch: the call on one process has it right."""
    x, matrix, bias, targets = inputs(6, 6, 20, torch.float64)
    x, targets, here = x.view(2, 3, 6), targets.view(2, 3), part(20)
    ignored = options.get("ignore_index", -100)
    targets[targets == -100] = ignored

    def alone(x: Tensor, matrix: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        results = fastlm.linear_cross_entropy(x, matrix, targets, linear_bias=bias, **options)
        return flattened(results)

    want = testing.run(alone, x, matrix, bias, targets)
    want[-2:] = [gradient[here] for gradient in want[-2:]]
    got = testing.run(by_group, x, matrix[here], bias[here], targets, backend=backend, **options)
    torch.testing.assert_close(got, want, equal_nan=True)
    x[0, 1], matrix[3] = torch.nan, -torch.inf
    for leaves in ((x, matrix, bias), (x[:0], matrix, bias)):
        for y in (targets, torch.full_like(targets, ignored)):
            y = y[: len(leaves[0])]
            want = alone(*leaves, y)
            got = by_group(leaves[0], matrix[here], bias[here], y, backend=backend, **options)
            torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_count_for_nothing_and_rows_that_are_no_numbers(backend, two):
    for options in (
        {"shift": 1, "ignore_index": 5, "num_items": torch.tensor(7.0), "label_smoothing": 0.1},
        {"reduction": "none", "shift": 2, "return_stats": True, "z_loss": 0.1},
    ):
        two.run(same_as_alone, backend, options)


def predicts_the_first_of_equals(backend: str) -> None:
    x, here = torch.ones(3, 2), part(8)
    matrix = torch.zeros(8, 2)
    matrix[[3, 5, 6]] = 1.0
    for scale, first in ((1.0, 3), (-1.0, 0), (0.0, 0)):
        _, stats = fastlm.linear_cross_entropy(
            x, matrix[here], torch.tensor([7, 0, -100]), logit_scale=scale, return_stats=True,
            process_group=dist.group.WORLD, backend=backend,
        )  # fmt: skip
        assert stats.predictions.tolist() == [first, first, -1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_predicts_the_first_of_equals(backend, two):
    two.run(predicts_the_first_of_equals, backend)


def refuses_targets(backend: str) -> None:
    x, matrix, bias, targets = inputs(6, 4, 20)
    here = part(20)
    for wrong in (20, -1, 2**40):
        targets[4] = wrong
        for reduction in ("none", "mean"):
            x.requires_grad_(reduction == "mean")
            with pytest.raises(IndexError, match=rf"got {wrong} at position \[4\]"):
                by_group(x, matrix[here], bias[here], targets, reduction=reduction, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_target_out_of_range_raises_on_every_rank(backend, two):
    two.run(refuses_targets, backend)


def marks_targets() -> None:
    x, matrix, bias, targets = inputs(6, 4, 20, ignored=0)
    targets[4], targets[2] = 20, -1
    got = testing.run(
        by_group, x, matrix[part(20)], bias[part(20)], targets, reduction="none", backend="triton"
    )
    bad = torch.tensor([False, False, True, False, True, False])
    assert torch.equal(got[0].isnan(), bad)
    assert torch.equal(got[1].isnan().all(1), bad)
    assert torch.equal(got[1].isnan().any(1), bad)


@interpreted_only
def test_a_target_out_of_range_makes_its_row_nan_in_a_kernel(two):
    two.run(marks_targets)


def counts_collectives(backend: str) -> None:
    """Rows of floats that are gathered, and elements that are summed."""
    x, matrix, _, targets = inputs(10, 6, 20, ignored=0)
    shard, gathered, summed = matrix[part(20)], [], []
    gather, reduce = dist.all_gather, dist.all_reduce

    def all_gather(outputs, tensor, group):
        gathered.append(tensor.numel())
        gather(outputs, tensor, group=group)

    def all_reduce(tensor, group):
        summed.append(tensor.numel())
        reduce(tensor, group=group)

    everything = {"label_smoothing": 0.1, "return_stats": True}
    with pytest.MonkeyPatch.context() as patch, forced(rows=5, block_v=16):
        patch.setattr(_shards, "_check_agreement", lambda *args: None)
        patch.setattr(dist, "all_gather", all_gather)
        patch.setattr(dist, "all_reduce", all_reduce)
        for options, needs, floats, elements in (
            ({}, (False, False), 3, []),
            ({}, (True, True), 3, [60]),
            ({}, (False, True), 3, []),
            (everything, (True, False), 6, [60]),
            ({"reduction": "none"}, (True, True), 3, [60]),
        ):
            gathered.clear(), summed.clear()
            leaves = [t.clone().requires_grad_(n) for t, n in zip((x, shard), needs, strict=True)]
            loss, *_ = by_group(*leaves, None, targets, backend=backend, **options)
            if any(needs):
                loss.sum().backward()
            assert gathered == [5 * floats + 2] * 2
            assert summed == elements
            assert [leaf.grad is not None for leaf in leaves] == list(needs)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted_only)])
def test_communicates_a_few_floats_per_row_and_the_gradient_of_the_input(backend, two):
    two.run(counts_collectives, backend)


def asks_nothing_of_the_host() -> None:
    x, matrix, bias, targets = inputs(9, 5, 40, torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, matrix[part(40)].clone(), bias[part(40)].clone())]
    with pytest.MonkeyPatch.context() as patch, recorded(run=False), no_host_sync():
        patch.setattr(_shards, "_check_agreement", lambda *args: None)
        for options in (TOGETHER, PER_POSITION):
            given = {**options, "weight": torch.ones(40), "backend": "triton"}
            outputs = by_group(*leaves, targets, **given)
            torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])


@interpreted_only
def test_asks_nothing_of_the_host(two):
    two.run(asks_nothing_of_the_host)


def holds_no_logits(backend: str) -> None:
    x, matrix, bias, targets = inputs(8, 2, 512)
    module = importlib.import_module(op.BACKENDS[backend])
    shard, whole = part(512), (dist.group.WORLD.group_name, 512)
    arguments = (x, matrix[shard], bias[shard], targets)
    with forced(rows=2, block_v=64), NothingLarge(2 * 256 * 2 + 1):
        module.forward(*arguments, None, *NO_OPTIONS, True, *whole)
        module.gradients(*arguments, None, None, *NO_OPTIONS, True, True, True, True, *whole)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted_only)])
def test_never_holds_the_logits_of_its_shard(backend, two):
    two.run(holds_no_logits, backend)


def compiles() -> None:
    x, matrix, bias, targets = inputs(6, 4, 20, torch.float64)
    here, group = part(20), dist.group.WORLD

    def by_name(x, matrix, bias):
        loss, stats = fastlm.linear_cross_entropy(
            x, matrix, targets, linear_bias=bias, process_group=group, return_stats=True
        )  # fmt: skip
        return loss, stats.entropy

    def by_mesh(x, matrix, bias):
        return -fastlm.linear_logprobs(x, matrix, targets, linear_bias=bias)

    for call, shard in ((by_name, lambda t: t[here]), (by_mesh, whole_dtensor)):
        results = []
        for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
            leaves = [x.clone(), shard(matrix).detach(), shard(bias).detach()]
            leaves = [leaf.requires_grad_() for leaf in leaves]
            outputs = function(*leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            sum(output.sum() for output in outputs).backward()
            grads = [local(leaf.grad) for leaf in leaves]
            results.append([*(output.detach() for output in outputs), *grads])
        torch.testing.assert_close(*results)


def test_compiles_without_a_graph_break(two):
    two.run(compiles)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradients_are_distributed() -> None:
    x, matrix, bias, targets = inputs(6, 4, 20)
    mesh = init_device_mesh("cpu", (2,))
    loss = fastlm.nn.LinearCrossEntropyLoss(4, 20, bias=True)
    for name, value in (("weight", matrix), ("bias", bias)):
        setattr(loss.linear, name, torch.nn.Parameter(whole_dtensor(value)))
    replica = DTensor.from_local(x, mesh, [Replicate()], run_check=False).requires_grad_()
    loss(replica, targets).backward()
    leaves = [t.requires_grad_() for t in (x, matrix, bias)]
    want = torch.autograd.grad(
        fastlm.linear_cross_entropy(*leaves[:2], targets, linear_bias=bias), leaves
    )
    got = (replica.grad, loss.linear.weight.grad, loss.linear.bias.grad)
    assert got[0].placements == (Replicate(),)
    assert got[1].placements == got[2].placements == (Shard(0),)
    for gradient, whole in zip(got, want, strict=True):
        torch.testing.assert_close(gradient.full_tensor(), whole)


def test_gradients_are_placed_as_the_tensors_are(two):
    two.run(gradients_are_distributed)


def is_checked(backend: str) -> None:
    x, matrix, bias, targets = inputs(6, 4, 20)
    here = part(20)
    call = functools.partial(testing.run, by_group, x, matrix[here], bias[here], targets)
    with fastlm.checked():
        for options in ({}, {"reduction": "none", "label_smoothing": 0.1, "return_stats": True}):
            call(backend=backend, **options)
    right = combine

    def wrong(*args: Any) -> Any:
        known = right(*args)
        known.losses[1] += 0.01
        return known

    modules = ("fastlm.ops.eager.linear_cross_entropy", "fastlm.kernels._linear_loss")
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(f"{module}.combine", wrong)
        with fastlm.checked(), pytest.raises(fastlm.KernelMismatch, match="linear_cross_entropy"):
            call(backend=backend)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted_only)])
def test_checked_compares_with_the_whole_layer(backend, two):
    two.run(is_checked, backend)


def refuses(name: str) -> None:
    """The call of each name raises what its message says, on every rank."""
    x, matrix, bias, targets = inputs(6, 4, 20)
    rank, here, group = dist.get_rank(), part(20), dist.group.WORLD
    mesh, square = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    replicated = DTensor.from_local(matrix, mesh, [Replicate()], run_check=False)
    both = DTensor.from_local(matrix, square, [Replicate(), Shard(0)], run_check=False)
    columns = DTensor.from_local(matrix, mesh, [Shard(1)], run_check=False)
    rows = DTensor.from_local(x, mesh, [Shard(0)], run_check=False)
    whole = whole_dtensor(matrix)
    right = {"input": x, "linear_weight": matrix[here], "target": targets, "process_group": group}
    wrong, error, message = {
        "no group": ({"process_group": "0"}, TypeError, "process_group must be a ProcessGroup"),
        "a group of others": (
            {"process_group": dist.GroupMember.NON_GROUP_MEMBER}, TypeError,
            "process_group must be a ProcessGroup that this process belongs to",
        ),
        "another group": (
            {"linear_weight": whole, "process_group": alone}, ValueError,
            "process_group must be None or that of linear_weight's mesh",
        ),
        "replicated": (
            {"linear_weight": replicated}, ValueError, r"linear_weight must have the placement",
        ),
        "other dimension": (
            {"linear_weight": columns}, ValueError, r"linear_weight must have the placement",
        ),
        "two dimensions": (
            {"linear_weight": both}, ValueError, "over a mesh of 1 dimension, got 2",
        ),
        "local bias": (
            {"linear_weight": whole, "linear_bias": bias[here]}, ValueError,
            "linear_bias must be a DTensor placed as linear_weight is, got a Tensor",
        ),
        "bias elsewhere": (
            {
                "linear_weight": whole,
                "linear_bias": DTensor.from_local(bias, mesh, [Replicate()], run_check=False),
            },
            ValueError, "linear_bias must be a DTensor placed as linear_weight is",
        ),
        "sharded input": (
            {"linear_weight": whole, "input": rows}, ValueError,
            "input must be a local tensor, or replicated over linear_weight's mesh",
        ),
        "DTensor input alone": ({"input": rows}, TypeError, "input must be a local tensor"),
        "uneven shards": (
            {"linear_weight": matrix[: 10 + rank]}, ValueError,
            r"linear_weight must be split evenly over the ranks, got \[10, 11\] classes",
        ),
        "no classes": (
            {"linear_weight": matrix[:0]}, ValueError, "linear_weight must have at least one class",
        ),
        "other targets": (
            {"target": targets.clamp(min=0) + rank}, ValueError,
            "target must be the same on all ranks",
        ),
        "other inputs": (
            {"input": x[: 6 - rank]}, ValueError, "input must be the same on all ranks",
        ),
        "targets in a list": (
            {"target": targets.tolist()}, TypeError, "target must be a tensor, got list",
        ),
        "bias in a list": (
            {"linear_bias": [1.0]}, TypeError, "linear_bias must be a tensor, got list",
        ),
        "input in a list": ({"input": x.tolist()}, TypeError, "input must be a tensor, got list"),
        "class weights in a list": (
            {"weight": [1.0] * 20}, TypeError, "weight must be a tensor, got list",
        ),
        "integer class weights": (
            {"weight": torch.ones(20).int()}, TypeError, "weight must be one of float32",
        ),
        "real targets": (
            {"target": targets.float()}, TypeError, "target must be one of int64",
        ),
        "integer input": ({"input": x.int()}, TypeError, "input must be one of float32"),
        "complex layer": (
            {"linear_weight": matrix[here] + 0j}, TypeError, "linear_weight must be one of float32",
        ),
        "integer bias": (
            {"linear_bias": bias[here].int()}, TypeError, "linear_bias must be one of float32",
        ),
        "part of a shift": ({"shift": 0.5}, TypeError, "shift must be an integer, got float"),
        "real ignored class": (
            {"ignore_index": 1.0}, TypeError, "ignore_index must be an integer, got float",
        ),
        "cap in a tensor": (
            {"softcap": torch.ones(())}, TypeError, "softcap must be a number, got Tensor",
        ),
        "scale in text": ({"logit_scale": "1"}, TypeError, "logit_scale must be a number, got str"),
        "smoothing in text": (
            {"label_smoothing": "0"}, TypeError, "label_smoothing must be a number, got str",
        ),
        "z-loss in text": ({"z_loss": "0"}, TypeError, "z_loss must be a number, got str"),
        "items in text": ({"num_items": "3"}, TypeError, "num_items must be an integer, got str"),
        "class weights of a shard": (
            {"weight": torch.ones(10)}, ValueError, r"weight must have shape \(20,\)",
        ),
        "bias of all classes": (
            {"linear_bias": bias}, ValueError, r"linear_bias must have shape \(10,\)",
        ),
    }[name]  # fmt: skip
    given = {**right, **wrong}
    if isinstance(given["linear_weight"], DTensor) and "process_group" not in wrong:
        given["process_group"] = None
    calls = [fastlm.linear_cross_entropy]
    if set(wrong) <= set(inspect.signature(fastlm.linear_logprobs).parameters):
        calls.append(fastlm.linear_logprobs)
    for call in calls:
        with pytest.MonkeyPatch.context() as patch:
            if error is TypeError:
                patch.setattr(dist, "all_gather", None)  # what any rank can see needs no other
            with pytest.raises(error, match=f"^{call.__name__}: .*{message}"):
                call(**given)


WRONG = [
    "no group", "a group of others", "another group", "replicated", "other dimension",
    "two dimensions", "local bias", "bias elsewhere", "sharded input", "DTensor input alone",
    "uneven shards", "no classes", "other targets", "other inputs", "class weights of a shard",
    "bias of all classes", "targets in a list", "bias in a list", "input in a list",
    "class weights in a list", "integer class weights", "real targets", "integer input",
    "complex layer", "integer bias", "part of a shift", "real ignored class", "cap in a tensor",
    "scale in text", "smoothing in text", "z-loss in text", "items in text",
]  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_refuses_on_every_rank(name, two):
    two.run(refuses, name)


def poisons(backend: str) -> None:
    x, matrix, _, targets = inputs(6, 4, 20, ignored=0)
    rank, half = dist.get_rank(), part(20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_shards, "_check_agreement", lambda *args: None)
        for shard, y, agree in (
            (matrix[half], targets, True),
            (matrix[: 11 - rank], targets, False),
            (matrix[half], (targets + rank) % 20, False),
        ):
            (loss,) = by_group(x, shard, None, y, backend=backend)
            assert loss.isfinite() if agree else loss.isnan()


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted_only)])
def test_where_nobody_may_look_a_disagreement_gives_nan(backend, two):
    two.run(poisons, backend)


def is_explained() -> None:
    x, matrix, _, targets = inputs(6, 4, 20)
    x.requires_grad_()
    explained = fastlm.explain(
        "linear_cross_entropy", x, matrix[part(20)], targets, process_group=dist.group.WORLD
    )
    assert explained.steps["gradients"].backend == "torch"


def test_explains_a_sharded_call(two):
    two.run(is_explained)
