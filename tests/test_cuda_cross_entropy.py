"""The CUDA C++ kernels of cross_entropy, run on a CPU: addresses, races, bits.

What they compute is tested with the other backends, in test_cross_entropy.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from support.cross_entropy import assert_agrees, assert_same_bits, losses_and_gradient
from support.cuda_host import (
    HOST,
    host_module,
    in_place_of_the_extension,
    only_block,
    ordered,
    program,
    run,
)
from support.interpreter import interpreted_only
from support.layouts import layouts
from support.loss_addresses import (
    FAR,
    MANY_ROWS,
    check_bad_target,
    check_far,
    check_far_gradient,
    run_guarded,
)
from support.losses import OPTIONS, definition, judge, ours
from support.memory import in_child
from support.poison import poisoned
from torch import Tensor

import fastlm
from fastlm.ops.cuda import cross_entropy as door
from fastlm.testing import cross_entropy_inputs

pytestmark = interpreted_only  # on a GPU the kernels run there

DRIVER = HOST / "check_cross_entropy.cpp"
THREADS = 64  # two warps
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", autouse=True)
def extension() -> Iterator[ModuleType]:
    with in_place_of_the_extension(host_module()) as module:
        yield module


@pytest.fixture
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    force_few_threads(monkeypatch)


def force_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small row takes several rounds of a block, and several blocks."""
    monkeypatch.setattr(door, "THREADS", ((1 << 62, THREADS),))
    monkeypatch.setattr(door, "GROUPS_PER_THREAD", 1)


def round_of(dtype: torch.dtype) -> int:
    """Elements that a block of few threads takes at once."""
    return THREADS * 16 // dtype.itemsize


def several_rounds(dtype: torch.dtype) -> int:
    return 3 * round_of(dtype) + 5


# Sanitizers


@pytest.mark.parametrize("variant", ["plain", "asan"])
@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_stays_inside_its_blocks_of_memory(order, variant):
    done = run(program(DRIVER, variant), order)
    assert (done.returncode, done.stderr) == (0, "")
    assert "512 launches" in done.stdout


@pytest.mark.slow
def test_has_no_races():
    done = run(program(DRIVER, "tsan"), "small")
    assert (done.returncode, done.stderr) == (0, "")
    assert "8 launches" in done.stdout


# Numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_holds_at_every_edge_of_a_round(beyond, rounds, dtype, few_threads):
    vocab_size = rounds * round_of(dtype) + beyond
    if vocab_size < 1:
        vocab_size = 2
    logits, targets = cross_entropy_inputs(4, vocab_size, dtype, ignored=0)
    logits = logits.clamp(max=2.0)
    targets[-1] = vocab_size - 1
    assert_agrees(logits, targets, "cuda", reduction="none")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [OPTIONS, {**OPTIONS, "logit_scale": 0.7}], ids=["-", "+"])
def test_takes_all_options_at_once(options, dtype, few_threads):
    arguments = cross_entropy_inputs(8, several_rounds(dtype), dtype)
    judge(ours, definition, arguments, "cuda", options)


def test_float64_is_computed_in_float64(few_threads):
    vocab_size = round_of(torch.float64) + 5
    logits, targets = cross_entropy_inputs(2, vocab_size, torch.float64)
    weight = torch.rand(vocab_size, dtype=torch.float64)

    def losses(x: Tensor) -> tuple[Tensor, ...]:
        loss, stats = fastlm.cross_entropy(
            x, targets, weight, reduction="none", label_smoothing=0.1, softcap=9.0,
            logit_scale=0.7, z_loss=0.01, return_stats=True, backend="cuda",
        )  # fmt: skip
        return loss, stats.logprobs, stats.lse, stats.entropy

    assert torch.autograd.gradcheck(
        losses, logits.requires_grad_(), eps=1e-6, atol=1e-7, rtol=1e-5, nondet_tol=0
    )


def test_the_first_of_equals_is_predicted(few_threads):
    vocab_size = several_rounds(torch.float32)
    for first in (0, 3, 250, vocab_size - 2):
        logits = torch.zeros(1, vocab_size)
        logits[0, [first, first + 1, vocab_size - 1]] = 1.0
        _, stats = fastlm.cross_entropy(
            logits, torch.tensor([0]), return_stats=True, backend="cuda"
        )
        assert stats.predictions.tolist() == [first]


# Bit for bit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_layout_gives_the_bits_of_the_contiguous_one(dtype, few_threads):
    logits, targets = cross_entropy_inputs(6, several_rounds(dtype) + 3, dtype)
    logits, targets = logits.view(2, 3, -1), targets.view(2, 3)
    expected = losses_and_gradient(logits, targets, "cuda")
    # rows at multiples of 16 bytes are read otherwise than those beside them
    for name, view in [*layouts(logits), ("aligned", aligned(logits))]:
        assert_same_bits(losses_and_gradient(view, targets, "cuda"), expected, name)
    for name, view in layouts(targets):
        assert_same_bits(losses_and_gradient(logits, view, "cuda"), expected, f"targets {name}")


def aligned(logits: Tensor) -> Tensor:
    """The same, each row at a multiple of 16 bytes."""
    step = 16 // logits.itemsize
    size = -(-logits.shape[-1] // step) * step
    rows = logits.new_zeros(*logits.shape[:-1], size)[..., : logits.shape[-1]].copy_(logits)
    assert all(row.data_ptr() % 16 == 0 for row in rows.flatten(0, -2))
    return rows


def test_the_order_of_blocks_and_threads_changes_no_bit(extension, few_threads):
    logits, targets = cross_entropy_inputs(5, several_rounds(torch.bfloat16), torch.bfloat16)
    expected = losses_and_gradient(logits, targets, "cuda")
    for order, seed in (("reverse", 0), ("random", 0), ("random", 1)):
        with ordered(extension, order, seed):
            assert_same_bits(losses_and_gradient(logits, targets, "cuda"), expected, order)


def test_a_row_does_not_depend_on_its_neighbours(few_threads):
    logits, targets = cross_entropy_inputs(7, several_rounds(torch.float32))
    losses, gradient = losses_and_gradient_of_sum(logits, targets)
    order = torch.randperm(7)
    for rows in (order, order[:1], order[2:4]):
        actual = losses_and_gradient_of_sum(logits[rows], targets[rows])
        assert_same_bits(actual, [losses[rows], gradient[rows]])


def losses_and_gradient_of_sum(logits: Tensor, targets: Tensor) -> list[Tensor]:
    leaf = logits.clone().requires_grad_()
    losses = fastlm.cross_entropy(leaf, targets, reduction="none", backend="cuda")
    losses.sum().backward()
    assert leaf.grad is not None
    return [losses.detach(), leaf.grad]


def test_what_memory_held_before_does_not_matter(few_threads):
    logits, targets = cross_entropy_inputs(6, several_rounds(torch.float32))
    expected = losses_and_gradient(logits, targets, "cuda")
    for byte in (0x00, 0x7F):
        with poisoned(byte):
            assert_same_bits(losses_and_gradient(logits, targets, "cuda"), expected)


# Addresses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("end", ["back", "front"])
def test_stays_inside_its_tensors(end, dtype, few_threads):
    sizes = (1, 7, 8, 9, several_rounds(dtype))
    in_child(lambda: run_guarded(door, end, dtype, sizes))


@pytest.mark.parametrize("bad", [-1, 300, 301, -(2**63), 2**32 + 3])
@pytest.mark.parametrize("end", ["back", "front"])
def test_a_target_out_of_range_makes_its_row_nan_and_nothing_else(bad, end, few_threads):
    in_child(lambda: check_bad_target(door, bad, end, 300))


@pytest.mark.parametrize("place", FAR)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_offsets_pass_2_to_the_31(place, dtype):
    in_child(lambda: check_far(door, *FAR[place], dtype))


def test_the_gradient_may_have_more_than_2_to_the_31_elements(extension):
    def check() -> None:
        with only_block(extension, MANY_ROWS - 1):
            check_far_gradient(door, [MANY_ROWS - 1])

    in_child(check)


# Launches


@pytest.mark.parametrize("vocab_size", [1, 1_024, 1_025, 50_257, 2**31, 2**40])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_a_plan_is_within_the_limits(vocab_size, dtype):
    threads, blocks_per_row = door.plan(vocab_size, dtype.itemsize)
    assert threads % 32 == 0
    assert 32 <= threads <= 256
    assert 1 <= blocks_per_row <= 65_535


def test_a_launch_that_fails_says_what_and_why(monkeypatch):
    logits, targets = cross_entropy_inputs(3, 40)
    monkeypatch.setattr(door, "THREADS", ((1 << 62, 2_048),))
    message = (
        r"cross_entropy_forward did not start: invalid configuration argument \(grid \(3, 1\), "
        r"2048 threads and 0 bytes of shared memory a block, device 0\)"
    )
    with pytest.raises(RuntimeError, match=message):
        fastlm.cross_entropy(logits, targets, backend="cuda")
