"""The CUDA C++ kernels of linear_cross_entropy, run on a CPU: addresses, races, bits.

What they compute is tested with the other backends, in test_linear_cross_entropy.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import test_vocab_parallel as split
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
from support.interpreter import interpreted_only
from support.layouts import layouts
from support.linear_cross_entropy import (
    assert_same_bits,
    inputs,
    judge,
    likely,
    ours,
    plain_loss,
)
from support.losses import linear, linear_definition
from support.memory import guarded, in_child, sparse
from support.poison import poisoned
from torch import Tensor

import fastlm
from fastlm import testing
from fastlm.kernels._chunks import Operand, Upstream
from fastlm.kernels._linear_loss import Loss, Rows
from fastlm.ops.cuda import _loss_chunk as chunk
from fastlm.ops.cuda import cross_entropy as door
from fastlm.ops.eager import linear_cross_entropy as eager

pytestmark = interpreted_only  # on a GPU the kernels run there

DRIVER = HOST / "check_linear_cross_entropy.cpp"
NARROW = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *NARROW]
THREADS = 64  # two warps
ROUND = THREADS * 8  # elements that a block of them overwrites at once, in 16 bits


@pytest.fixture(scope="module", autouse=True)
def extension() -> Iterator[ModuleType]:
    with in_place_of_the_extension(host_module()) as module:
        yield module


@pytest.fixture
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    force_few_threads(monkeypatch)


def force_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small row takes several rounds of a block."""
    monkeypatch.setattr(door, "THREADS", ((1 << 62, THREADS),))


# Sanitizers


@pytest.mark.parametrize("variant", ["plain", pytest.param("asan", marks=pytest.mark.slow)])
@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_stays_inside_its_blocks_of_memory(order, variant):
    done = run(program(DRIVER, variant), order)
    assert (done.returncode, done.stderr) == (0, "")
    assert "504 launches" in done.stdout


@pytest.mark.slow
def test_has_no_races():
    done = run(program(DRIVER, "tsan"), "small")
    assert (done.returncode, done.stderr) == (0, "")
    assert "20 launches" in done.stdout


# Numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounds", [1, 2, 5])
@pytest.mark.parametrize("beyond", [-1, 0, 3])
def test_holds_at_every_edge_of_a_round(beyond, rounds, dtype, few_threads):
    vocab_size = rounds * ROUND + beyond
    x, weight, bias, targets = inputs(8, 24, vocab_size, dtype, ignored=0)
    targets[-1] = vocab_size - 1
    judge(x, weight, bias, targets, backend="cuda", reduction="none")
    judge(x, weight, None, targets, backend="cuda", reduction="sum")


@pytest.mark.parametrize(("dtype", "seed"), [(NARROW[0], 24), (NARROW[1], 1), (NARROW[1], 35)])
def test_two_likely_classes(dtype, seed, few_threads):
    judge(*likely(dtype, "cpu", seed=seed), backend="cuda", reduction="sum")


def test_the_loss_of_a_likely_target_is_not_rounded_away():
    """Logits of 200, those of the targets 9 ahead of the others; ignored rows have no lse."""
    x, weight, bias, targets = inputs(8, 6, 40)
    weight, bias = torch.zeros_like(weight), torch.full((40,), 200.0)
    bias[targets[targets >= 0]] += 9.0
    arguments = (x, weight, bias, targets)
    options = {"reduction": "none", "return_stats": True}
    actual = testing.run(linear, *arguments, backend="cuda", **options)
    plain = testing.run(linear_definition, *arguments, **options)
    truth = testing.run(linear_definition, *arguments, dtype=torch.float64, **options)
    testing.assert_all_as_accurate("likely", actual[:4], plain=plain[:4], truth=truth[:4])
    _, stats = fastlm.linear_cross_entropy(
        x, weight, targets, linear_bias=bias, return_stats=True, backend="cuda"
    )
    assert not stats.lse[targets == -100].any()
    assert (stats.predictions[targets == -100] == -1).all()
    assert (stats.predictions[targets != -100] == targets[targets >= 0].min()).all()


def gradient_of(
    logits: Tensor, dtype: torch.dtype, targets: Tensor, bias: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    rows = Rows.empty(logits, len(logits), torch.float32, need_stats=False)
    return chunk.launch_gradient(
        logits.clone(), Operand(dtype), targets, plain_loss(bias), Upstream(), rows,
        lse_is_known=False,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("vocab_size", [150, 3 * ROUND + 2])
def test_gives_back_what_the_target_and_the_largest_other_lost(vocab_size, dtype, few_threads):
    x, weight, bias, targets = inputs(9, 5, vocab_size, ignored=0)
    logits = x @ weight.t()
    exact, nothing = gradient_of(logits, torch.float32, targets, bias)
    assert nothing is None
    rounded, lost = gradient_of(logits, dtype, targets, bias)
    assert torch.equal(rounded, exact.to(dtype))
    _, want = eager._rounded(exact.clone(), targets[:, None], Operand(dtype))
    assert lost is not None
    assert want is not None
    assert torch.equal(lost[0][:, 0], want[0][:, 0])
    assert torch.equal(lost[1].abs(), want[1].abs())  # of equals each takes another
    differences = exact - rounded.float()
    assert torch.equal(lost[1], differences.gather(1, lost[0]))


def test_rows_without_a_target_give_nothing_back():
    _, weight, bias, targets = inputs(4, 5, 150)
    targets[:] = torch.tensor([-100, 150, 3, 4])
    logits = torch.randn(4, 5) @ weight.t()
    logits[2, 7] = torch.nan
    _, lost = gradient_of(logits, torch.bfloat16, targets, bias)
    assert lost is not None
    columns, residuals = lost
    assert ((columns >= 0) & (columns < 150)).all()
    assert not residuals[0].any()
    assert residuals[1:3, 0].isnan().all()
    assert residuals[3].isfinite().all()


# Classes split over processes, which are forked with the extension in place


@pytest.mark.parametrize("num_classes", [74, 2_052])
def test_two_halves_are_the_whole(num_classes, two):
    two.run(split.judge_each, [*split.ALONE, split.TOGETHER], "cuda", num_classes)


@pytest.mark.parametrize("num_classes", [74, 4], ids=["uneven", "one of none"])
def test_three_parts_of_a_dtensor_are_the_whole(num_classes, three):
    three.run(split.judge_each, [{}, split.PER_POSITION], "cuda", num_classes, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_split_it_is_as_accurate_as_torch(dtype, two):
    two.run(split.judge, (16, 16, 150), dtype, {**split.PER_POSITION, "backend": "cuda"})


def test_split_it_does_not_round_away_the_loss_of_a_likely_target(two):
    two.run(split.judge_likely, "cuda", 9.0)


# Bit for bit


def everything(dtype: torch.dtype = torch.bfloat16, **options: Any) -> list[Tensor | None]:
    arguments = inputs(5, 3, 2 * ROUND + 3, dtype)
    return testing.run(ours, *arguments, backend="cuda", **options)


def test_where_logits_lie_changes_no_bit(few_threads):
    """They begin at any multiple of 4 bytes, and with an odd number of classes every row does."""
    x, weight, bias, targets = inputs(6, 5, 2 * ROUND + 3, ignored=0)
    logits, order = x @ weight.t(), torch.randperm(6)
    for dtype in DTYPES:
        want, want_lost = gradient_of(logits, dtype, targets, bias)
        for offset in range(4):
            for _, added in layouts(bias, last_contiguous=True):
                memory = torch.empty(offset + logits.numel())[offset:].view(logits.shape)
                rows = Rows.empty(logits, 6, torch.float32, need_stats=False)
                got, lost = chunk.launch_gradient(
                    memory.copy_(logits[order]), Operand(dtype), targets[order], plain_loss(added),
                    Upstream(), rows, lse_is_known=False,
                )  # fmt: skip
                assert torch.equal(got, want[order])
                if want_lost is not None:
                    assert lost is not None
                    assert torch.equal(lost[0], want_lost[0][order])
                    assert torch.equal(lost[1], want_lost[1][order])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_order_of_blocks_and_threads_changes_no_bit(reduction, extension, few_threads):
    expected = everything(reduction=reduction)
    for order, seed in (("reverse", 0), ("random", 0), ("random", 1)):
        with ordered(extension, order, seed):
            assert_same_bits(everything(reduction=reduction), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_memory_held_before_does_not_matter(reduction, few_threads):
    expected = everything(reduction=reduction)
    for byte in (0x00, 0x7F):
        with poisoned(byte):
            assert_same_bits(everything(reduction=reduction), expected)


# Addresses


def run_guarded(end: str) -> None:
    """All kernels, every tensor they are given at a protected page."""
    x, weight, bias, targets = inputs(6, 4, 37)
    targets[1], targets[2] = 37, -1
    per_row = torch.ones(6)
    for vocab_size in (1, 3, 4, 37, 2 * ROUND + 3):
        _, weight, bias, _ = inputs(6, 4, vocab_size)
        y = guarded(targets.clamp(max=vocab_size), end)
        for dtype in DTYPES:
            rows = Rows(*(guarded(per_row, end) for _ in range(4)), guarded(targets, end))
            class_weights = guarded(torch.ones(vocab_size), end)
            total = guarded(torch.tensor([float(vocab_size)]), end)
            loss = Loss(guarded(bias, end), class_weights, total, -100, 0.1, 3.0, 0.5)
            upstream = Upstream(*(guarded(per_row, end) for _ in range(4)), total)
            logits = guarded(x @ weight.t(), end)
            chunk.launch_loss(logits, y, loss, rows)
            chunk.launch_bias_gradient(
                logits, y, loss, upstream, rows, guarded(torch.zeros(vocab_size), end)
            )
            for lse_is_known in (False, True):
                logits = guarded(x @ weight.t(), end)
                chunk.launch_gradient(
                    logits, Operand(dtype), y, loss, upstream, rows, lse_is_known=lse_is_known
                )


@pytest.mark.parametrize("end", ["back", "front"])
def test_stays_inside_its_tensors(end, few_threads):
    in_child(lambda: run_guarded(end))


def far_chunk(num_rows: int, vocab_size: int) -> tuple[Tensor, Tensor, Rows, float]:
    """Zero logits but for a 1 in the last row at column 5, the target of all, and its lse."""
    logits = sparse((num_rows, vocab_size), (vocab_size, 1), torch.float32)
    logits[-1, 5] = 1.0
    targets = sparse((num_rows,), (1,), torch.int64)
    targets[-1] = 5
    per_row = [sparse((num_rows,), (1,), torch.float32) for _ in range(4)]
    rows = Rows(*per_row, sparse((num_rows,), (1,), torch.int64))
    return logits, targets, rows, math.log(vocab_size - 1 + math.e)


def check_far_rows(extension: ModuleType, dtype: torch.dtype) -> None:
    """The last of 2^27 + 2 rows of 17 classes, beyond 2^31 elements, alone."""
    num_rows = 2**27 + 2
    logits, targets, rows, lse = far_chunk(num_rows, 17)
    made = sparse((num_rows, 2), (2, 1), torch.int64), sparse((num_rows, 2), (2, 1), torch.float32)
    with only_block(extension, num_rows - 1), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Tensor, "new_empty", lambda like, *shape: made[0 if like.dtype == torch.int64 else 1]
        )
        chunk.launch_loss(logits, targets, plain_loss(None), rows)
        assert rows.losses[-1].item() == pytest.approx(lse - 1, rel=1e-6)
        dlogits, lost = chunk.launch_gradient(
            logits, Operand(dtype), targets, plain_loss(None), Upstream(), rows, lse_is_known=False
        )
    want = torch.full((17,), math.exp(-lse))
    want[5] = math.exp(1 - lse) - 1
    torch.testing.assert_close(dlogits[-1].float(), want, rtol=1e-2, atol=0.0)
    if lost is not None:
        columns, residuals = (x[-1].clone() for x in lost)
        assert columns.tolist() == [5, 0]
        given_back = dlogits[-1].float().scatter_add(0, columns, residuals)
        torch.testing.assert_close(given_back[columns], want[columns])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_chunk_may_have_more_than_2_to_the_31_elements(dtype, extension):
    in_child(lambda: check_far_rows(extension, dtype))


def check_far_bias(extension: ModuleType) -> None:
    """The first columns of 17 rows that pass 2^31 elements."""
    vocab_size = 2**27 + 64
    logits, targets, rows, lse = far_chunk(17, vocab_size)
    targets.fill_(5)
    rows.lse.fill_(lse)
    dbias = sparse((vocab_size,), (1,), torch.float32)
    with only_block(extension, 0):
        chunk.launch_bias_gradient(logits, targets, plain_loss(None), Upstream(), rows, dbias)
    want = 16 * (math.exp(-lse) - 1) + math.exp(1 - lse) - 1
    assert dbias[5].item() == pytest.approx(want, rel=1e-6)
    assert dbias[4].item() == pytest.approx(17 * math.exp(-lse), rel=1e-5)
    assert dbias[-1] == 0


def test_rows_of_the_bias_gradient_may_be_far_apart(extension):
    in_child(lambda: check_far_bias(extension))


def test_a_launch_that_fails_says_what_and_why(monkeypatch):
    monkeypatch.setattr(door, "THREADS", ((1 << 62, 2_048),))
    message = (
        r"linear_cross_entropy_gradient did not start: invalid configuration argument "
        r"\(grid \(3, 1\), 2048 threads and 0 bytes of shared memory a block, device 0\)"
    )
    with pytest.raises(RuntimeError, match=message):
        testing.run(ours, *inputs(3, 4, 20)[:2], None, inputs(3, 4, 20)[3], backend="cuda")
