"""cross_entropy: what it computes, on every backend, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.cross_entropy import (
    BACKENDS,
    BLOCK,
    DTYPES,
    NO_OPTIONS,
    assert_agrees,
    assert_same_bits,
    force_tiny_blocks,
    losses_and_gradient,
    torch_loss,
    wide,
)
from support.host_sync import no_host_sync
from support.interpreter import interpreted_only, permuted_grid
from support.layouts import layouts
from support.poison import poisoned
from torch import Tensor

import fastlm
from fastlm.testing import assert_all_as_accurate, cross_entropy_inputs, run


@pytest.fixture
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    force_tiny_blocks(monkeypatch)


# Agreement with torch


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 5), (7, 300), (4, 9_000)], ids=str)
def test_is_as_accurate_as_torch(shape, dtype, reduction, backend, device):
    logits, targets = cross_entropy_inputs(*shape, dtype, device, ignored=0.2)
    targets[0] = 3
    assert_agrees(logits, targets, backend, reduction=reduction)


@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_a_large_vocabulary(backend, device):
    logits, targets = cross_entropy_inputs(2, 50_257, torch.bfloat16, device, ignored=0)
    assert_agrees(logits, targets, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4), (1, 2, 1, 3)], ids=str)
def test_takes_any_leading_dimensions(shape, backend, device):
    logits, targets = cross_entropy_inputs(math.prod(shape), 40, device=device, ignored=0, likely=0)
    results = assert_agrees(logits.view(*shape, 40), targets.view(shape), backend, reduction="none")
    assert results[0].shape == shape
    assert results[1].shape == (*shape, 40)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab_size", [1, 2, *(k * BLOCK + d for k in (1, 3) for d in (-1, 0, 1))])
@pytest.mark.parametrize("rows", [1, 2, 17])
def test_holds_at_every_edge_of_a_block(rows, vocab_size, backend, device, tiny_blocks):
    logits, targets = cross_entropy_inputs(rows, vocab_size, device=device, ignored=0)
    if rows <= 2:
        # the loss of a likely target is almost zero: one alone shows luck, not accuracy
        logits = logits.clamp(max=2.0)
    targets[-1] = vocab_size - 1
    assert_agrees(logits, targets, backend, reduction="none")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 7), (0, 3, 7), (3, 0, 7)], ids=str)
def test_no_rows_give_what_torch_gives(shape, backend, device):
    logits = torch.randn(shape, device=device)
    targets = torch.zeros(shape[:-1], dtype=torch.int64, device=device)
    for reduction, want in (("mean", math.nan), ("sum", 0.0)):
        loss, gradient = run(
            fastlm.cross_entropy, logits, targets, reduction=reduction, backend=backend
        )
        assert loss.item() == want or (math.isnan(want) and loss.isnan())
        assert gradient.shape == shape
    losses, _ = losses_and_gradient(logits, targets, backend)
    assert losses.shape == shape[:-1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32],
    ids=str,
)
def test_takes_any_integer_target(dtype, backend, device):
    logits, targets = cross_entropy_inputs(6, 100, device=device, ignored=0)
    expected = run(fastlm.cross_entropy, logits, targets, backend=backend, ignore_index=3)
    actual = run(fastlm.cross_entropy, logits, targets.to(dtype), backend=backend, ignore_index=3)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignore_index", [-100, 0, 1, 39, 40, 2**40])
def test_ignored_rows_have_no_loss_and_no_gradient(ignore_index, backend, device):
    logits, targets = cross_entropy_inputs(12, 40, device=device, ignored=0)
    targets[[1, 5, 6]] = ignore_index
    logits[5] = math.nan
    logits[6] = math.inf
    loss, gradient = losses_and_gradient(logits, targets, backend, ignore_index=ignore_index)
    ignored = targets == ignore_index
    assert loss[ignored].eq(0).all()
    assert gradient[ignored].eq(0).all()
    kept = ~ignored
    assert_agrees(logits[kept], targets[kept], backend, ignore_index=ignore_index, reduction="none")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mean_of_nothing_is_nan_with_zero_gradient(backend, device):
    logits, targets = cross_entropy_inputs(5, 40, device=device, ignored=1.0)
    for reduction in ("mean", "sum"):
        loss, gradient = run(
            fastlm.cross_entropy, logits, targets, reduction=reduction, backend=backend
        )
        want, want_gradient = run(torch_loss, logits, targets, reduction=reduction)
        assert torch.equal(loss.isnan(), want.isnan())
        assert reduction == "mean" or loss.eq(0)
        assert gradient.eq(0).all()
        assert want_gradient.eq(0).all()


def kinds(x: Tensor) -> Tensor:
    return x.isnan() * 1 + x.isposinf() * 2 + x.isneginf() * 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_do_what_they_do_in_torch(
    value, dtype, backend, device, tiny_blocks
):
    vocab_size, target = 3 * BLOCK + 5, BLOCK + 3
    places = [[0], [target], [vocab_size - 1], [0, target], list(range(BLOCK)), range(vocab_size),
              [v for v in range(vocab_size) if v != target], []]  # fmt: skip
    logits, _ = cross_entropy_inputs(len(places), vocab_size, dtype, device)
    for row, columns in enumerate(places):
        logits[row, list(columns)] = value
    targets = torch.full((len(places),), target, device=device)
    actual = losses_and_gradient(logits, targets, backend)
    expected = run(torch_loss, logits, targets, dtype=wide(dtype), reduction="none")
    for got, want in zip(actual, expected, strict=True):
        assert torch.equal(kinds(got), kinds(want))
    assert_agrees(logits[-1:], targets[-1:], backend, reduction="none")


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_logits_do_not_overflow(backend, device, tiny_blocks):
    logits = torch.full((3, 40), 3e38, device=device)
    logits[1] = -3e38
    logits[2, ::2] = -3e38
    targets = torch.tensor([5, 6, 7], device=device)
    assert_agrees(logits, targets, backend, reduction="none")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [-(2.0**13), -256.0, 256.0, 2.0**13])
def test_adding_a_constant_changes_nothing(offset, backend, device):
    # multiples of 2^-10, which the sum keeps exactly
    logits, targets = cross_entropy_inputs(6, 300, device=device)
    logits = (logits * 1024).round() / 1024
    losses, gradient = losses_and_gradient(logits, targets, backend)
    shifted, shifted_gradient = losses_and_gradient(logits + offset, targets, backend)
    unit = 2.0**-24
    bound = 4 * unit * (abs(offset) + logits.abs().max().item() + math.log(300))
    assert (shifted - losses).abs().max().item() <= bound
    assert (shifted_gradient - gradient).abs().max().item() <= 4 * bound


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_rows_sum_to_zero(dtype, backend, device):
    logits, targets = cross_entropy_inputs(6, 300, dtype, device)
    _, gradient = losses_and_gradient(logits, targets, backend)
    unit = torch.finfo(dtype).eps / 2
    sums = gradient.double().sum(-1).abs()
    # each element is rounded once, after float32 arithmetic on probabilities that sum to one
    allowed = unit * gradient.double().abs().sum(-1) + 300 * 2.0**-24 * gradient.abs().amax(-1)
    assert (sums <= allowed + 300 * torch.finfo(dtype).tiny * 2.0**-10).all()
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_power_of_two_upstream_scales_the_gradient_exactly(backend, device):
    logits, targets = cross_entropy_inputs(6, 300, device=device)
    gradients = []
    for scale in (1.0, 8.0):
        leaf = logits.clone().requires_grad_()
        (fastlm.cross_entropy(leaf, targets, reduction="sum", backend=backend) * scale).backward()
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0] * 8, gradients[1])
    assert gradients[0].norm() > 0


def test_float64_runs_through_the_kernel_with_a_float64_accumulator(device, tiny_blocks):
    logits, targets = cross_entropy_inputs(2, 2 * BLOCK + 1, torch.float64, device, ignored=0)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: fastlm.cross_entropy(x, targets, reduction="none", backend="triton"),
        logits, eps=1e-6, atol=1e-7, rtol=1e-5, nondet_tol=0,
    )  # fmt: skip


# Autograd


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("expand", [True, False], ids=["stride 0", "transposed"])
def test_takes_any_incoming_gradient(expand, backend, device):
    logits, targets = cross_entropy_inputs(6, 40, device=device)
    logits, targets = logits.view(2, 3, 40), targets.view(2, 3)
    upstream = torch.randn(1, device=device).expand(2, 3) if expand else torch.randn(3, 2).t()
    gradients = []
    for incoming in (upstream.to(device), upstream.to(device).contiguous()):
        leaf = logits.clone().requires_grad_()
        losses = fastlm.cross_entropy(leaf, targets, reduction="none", backend=backend)
        losses.backward(incoming)
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gives_the_same_loss_with_and_without_a_gradient(backend, device):
    logits, targets = cross_entropy_inputs(6, 40, device=device)
    expected = fastlm.cross_entropy(logits, targets, backend=backend)
    assert not expected.requires_grad
    leaf = logits.clone().requires_grad_()
    assert torch.equal(fastlm.cross_entropy(leaf, targets, backend=backend), expected)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = fastlm.cross_entropy(leaf, targets, backend=backend)
        assert not loss.requires_grad
        assert torch.equal(loss, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_retained_graph_gives_the_same_gradient_twice(backend, device):
    logits, targets = cross_entropy_inputs(6, 40, device=device)
    leaf = logits.requires_grad_()
    loss = fastlm.cross_entropy(leaf, targets, backend=backend)
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_raises(backend, device):
    logits, targets = cross_entropy_inputs(6, 40, device=device)
    leaf = logits.requires_grad_()
    loss = fastlm.cross_entropy(leaf, targets, backend=backend)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    assert torch.equal(gradient, torch.autograd.grad(loss, leaf, retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="the gradient of a gradient is not implemented"):
        torch.autograd.grad(loss + gradient.square().sum(), leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="the gradient of a gradient is not implemented"):
        (loss.detach() + gradient.square().sum()).backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_changing_the_logits_before_backward_raises(backend, device):
    logits, targets = cross_entropy_inputs(6, 40, device=device)
    leaf = logits.requires_grad_()
    hidden = leaf * 1
    loss = fastlm.cross_entropy(hidden, targets, backend=backend)
    hidden.data.add_(0)
    hidden.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_leaves_its_inputs_unchanged(backend, device):
    logits, targets = cross_entropy_inputs(6, 300, torch.bfloat16, device)
    logits_before, targets_before = logits.clone(), targets.clone()
    run(fastlm.cross_entropy, logits, targets, backend=backend)
    assert_same_bits([logits], [logits_before])
    assert torch.equal(targets, targets_before)


# The operators


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operators_keep_their_promises_to_pytorch(backend, device):
    logits, targets = cross_entropy_inputs(6, 40, device=device)
    operators = torch.ops.fastlm
    for weight, *options, need_stats in (
        (*NO_OPTIONS, False),
        (torch.rand(40, device=device), -100, 0.1, 3.0, 0.5, True),
    ):
        arguments = (logits, targets, weight, *options, need_stats, backend)
        torch.library.opcheck(operators.cross_entropy_forward, arguments)
        losses, maximum, log_sum, logprobs, entropy, _ = operators.cross_entropy_forward(*arguments)
        upstream = (losses, logprobs, losses, entropy) if need_stats else (losses, None, None, None)
        saved = (logits, targets, weight, maximum, log_sum, entropy)
        torch.library.opcheck(
            operators.cross_entropy_backward, (*upstream, *saved, *options, backend)
        )


def mean_loss(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: fastlm.cross_entropy(x * 2, y, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_equals_eager(backend, device):
    function = mean_loss(backend)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5, 9):
        logits, targets = cross_entropy_inputs(rows, 40, device=device, ignored=0)
        assert_same_bits(run(compiled, logits, targets), run(function, logits, targets))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_inductor_equals_eager(device):
    function = mean_loss("triton")
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    logits, targets = cross_entropy_inputs(4, 40, device=device, ignored=0)
    actual, plain = run(compiled, logits, targets), run(function, logits, targets)
    truth = run(lambda x, y: torch_loss(x * 2, y), logits, targets, dtype=torch.float64)
    # inductor may sum the losses in another order
    assert_all_as_accurate("compiled", actual, plain=plain, truth=truth)


def test_the_kernels_never_wait_for_the_device(device):
    logits, targets = cross_entropy_inputs(6, 40, device=device)
    leaf = logits.requires_grad_()
    with no_host_sync():
        fastlm.cross_entropy(leaf, targets, backend="triton").backward()


# Bit for bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_layout_gives_the_bits_of_the_contiguous_one(dtype, device, tiny_blocks):
    logits, targets = cross_entropy_inputs(6, 3 * BLOCK + 3, dtype, device)
    logits, targets = logits.view(2, 3, -1), targets.view(2, 3)
    expected = losses_and_gradient(logits, targets)
    for name, view in layouts(logits):
        actual = losses_and_gradient(view, targets)
        assert_same_bits(actual, expected, name)
    for name, view in layouts(targets):
        assert_same_bits(losses_and_gradient(logits, view), expected, f"targets {name}")


def test_expanded_logits_are_read_in_place(device, tiny_blocks):
    row, targets = cross_entropy_inputs(1, 3 * BLOCK + 3, device=device)
    targets = torch.arange(6, device=device).view(2, 3)
    expanded = row.expand(2, 3, -1)
    actual = losses_and_gradient(expanded, targets)
    assert_same_bits(actual, losses_and_gradient(expanded.contiguous(), targets))


def test_a_shifted_slice_is_read_in_place(device):
    logits, targets = cross_entropy_inputs(8, 300, device=device)
    shifted, next_targets = logits.view(2, 4, 300)[:, :-1], targets.view(2, 4)[:, 1:]
    assert_same_bits(
        losses_and_gradient(shifted, next_targets),
        losses_and_gradient(shifted.contiguous(), next_targets.contiguous()),
    )


@interpreted_only
def test_the_order_of_programs_changes_no_bit(tiny_blocks):
    logits, targets = cross_entropy_inputs(5, 3 * BLOCK + 3, torch.bfloat16)
    expected = losses_and_gradient(logits, targets)
    for seed in range(3):
        with permuted_grid(seed):
            assert_same_bits(losses_and_gradient(logits, targets), expected)


def test_a_row_does_not_depend_on_its_neighbours(device, tiny_blocks):
    logits, targets = cross_entropy_inputs(9, 3 * BLOCK + 3, device=device)
    losses, _ = losses_and_gradient(logits, targets)
    order = torch.randperm(9, device=device)
    ordered_losses, _ = losses_and_gradient(logits[order], targets[order])
    assert_same_bits([ordered_losses], [losses[order]])
    together = gradient_of_sum(logits, targets)
    for row in range(9):
        alone = slice(row, row + 1)
        loss, _ = losses_and_gradient(logits[alone], targets[alone])
        gradient = gradient_of_sum(logits[alone], targets[alone])
        assert_same_bits([loss, gradient], [losses[alone], together[alone]])


def gradient_of_sum(logits: Tensor, targets: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    fastlm.cross_entropy(leaf, targets, reduction="sum", backend="triton").backward()
    assert leaf.grad is not None
    return leaf.grad


def test_a_second_run_gives_the_same_bits(device):
    logits, targets = cross_entropy_inputs(6, 300, torch.bfloat16, device)
    first = losses_and_gradient(logits, targets)
    assert_same_bits(losses_and_gradient(logits, targets), first)


def test_what_memory_held_before_does_not_matter(device, tiny_blocks):
    logits, targets = cross_entropy_inputs(6, 3 * BLOCK + 3, device=device)
    expected = losses_and_gradient(logits, targets)
    for byte in (0x00, 0x7F):
        with poisoned(byte):
            assert_same_bits(losses_and_gradient(logits, targets), expected)


# Refusals


def test_leading_dimensions_that_do_not_merge_are_left_to_torch(device):
    logits, targets = cross_entropy_inputs(24, 40, device=device)
    logits = logits.view(2, 3, 4, 40).transpose(0, 2)
    targets = targets.view(2, 3, 4).transpose(0, 2)
    with pytest.raises(NotImplementedError, match="triton refused: the leading dim"):
        fastlm.cross_entropy(logits, targets, backend="triton")
    assert_agrees(logits, targets, "torch", reduction="none")


@pytest.mark.parametrize("change, error, message", [
    (dict(input=[1.0]), TypeError, "input must be a tensor, got list"),
    (dict(input=torch.zeros(3, 5, dtype=torch.int64)), TypeError,
     "input must be one of float32, bfloat16, float16, float64, got int64"),
    (dict(input=torch.zeros(3, 5).to_sparse()), TypeError, "input must be a dense tensor"),
    (dict(input=torch.zeros(())), ValueError, "input must have at least one dimension"),
    (dict(input=torch.zeros(3, 0)), ValueError, "input must have at least one class, got V = 0"),
    (dict(target=torch.zeros(3)), TypeError, "target must be one of int64.*, got float32"),
    (dict(target=torch.zeros(3, dtype=torch.bool)), TypeError, "target must be one of .* got bool"),
    (dict(target=torch.zeros(2, dtype=torch.int64)), ValueError,
     r"target must have shape \(3,\) to match input, got \(2,\)"),
    (dict(target=torch.zeros(3, dtype=torch.int64, device="meta")), ValueError,
     "target must be on the device of input, cpu, got meta"),
    (dict(reduction="avg"), ValueError, "reduction must be one of mean, sum, none, got 'avg'"),
    (dict(backend="cudnn"), ValueError, "backend must be one of auto, .*, got 'cudnn'"),
])  # fmt: skip
def test_refuses(change, error, message):
    arguments: dict[str, Any] = dict(
        input=torch.zeros(3, 5), target=torch.zeros(3, dtype=torch.int64)
    )
    with pytest.raises(error, match=rf"cross_entropy: {message}"):
        fastlm.cross_entropy(**{**arguments, **change})


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("target", [-1, 5, 2**40])
def test_names_a_target_out_of_range_on_cpu(target, backend):
    targets = torch.tensor([[0, 1], [target, -100]])
    message = rf"cross_entropy: target must be in \[0, 5\).*, got {target} at position \[1, 0\]"
    with pytest.raises(IndexError, match=message):
        fastlm.cross_entropy(torch.zeros(2, 2, 5), targets, backend=backend)
