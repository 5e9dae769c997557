"""The test kit itself: each tool is handed a fault and has to see it."""

from __future__ import annotations

import math
import time

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from support.host_sync import no_host_sync
from support.interpreter import (
    bfloat16_boundaries,
    cast_in_a_kernel,
    interpreted_only,
    permuted_grid,
)
from support.layouts import layouts
from support.memory import guarded, in_child, sparse
from support.mutants import Mutant, killed
from support.poison import poisoned

import fastlm
from fastlm.testing import assert_as_accurate, cross_entropy_inputs


@triton.jit
def copy_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr, IS_MASKED: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < (size if IS_MASKED else size + 1)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=mask, other=0.0), mask=offsets < size)


@triton.jit
def shifted_copy_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets - 1, mask=offsets < size, other=0.0)
    tl.store(out_ptr + offsets, x, mask=offsets < size)


@triton.jit
def row_sum_kernel(x_ptr, out_ptr, stride, size, BLOCK: tl.constexpr, IS_WIDE: tl.constexpr):
    row = tl.program_id(0)
    if IS_WIDE:
        row = row.to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + offsets, mask=offsets < size, other=0.0)
    tl.store(out_ptr + tl.program_id(0), tl.sum(x.to(tl.float32), 0))


@triton.jit
def last_writer_kernel(out_ptr):
    previous = tl.load(out_ptr)
    tl.store(out_ptr, previous * 1.5 + tl.program_id(0))


@triton.jit
def atomic_sum_kernel(x_ptr, out_ptr):
    tl.atomic_add(out_ptr, tl.load(x_ptr + tl.program_id(0)))


@triton.jit
def unary_kernel(x_ptr, out_ptr, OP: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, 16))
    if OP == "add":
        x = x + x
    if OP == "sum":
        tl.store(out_ptr, tl.sum(x, 0))
    else:
        tl.store(out_ptr + tl.arange(0, 16), x)


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr):
    rows, cols = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    a, b = tl.load(a_ptr + rows * 16 + cols), tl.load(b_ptr + rows * 16 + cols)
    tl.store(out_ptr + rows * 16 + cols, tl.dot(a, b))


# The interpreter's bfloat16


def nearest_bfloat16(x: torch.Tensor) -> torch.Tensor:
    """Round to nearest, ties to even, by exact float64 arithmetic on the spacing."""
    exact = x.double()
    exponent = torch.frexp(exact).exponent.clamp(min=-125)
    spacing = 2.0 ** (exponent - 8).double()
    rounded = torch.round(exact / spacing) * spacing  # torch.round takes ties to even
    overflowing = rounded.abs() >= 2.0**128
    return torch.where(overflowing, torch.copysign(torch.tensor(math.inf), exact), rounded)


def test_kernels_round_to_bfloat16_as_arithmetic_defines_it(device):
    values = bfloat16_boundaries()
    values = values[values.isfinite()]
    got = cast_in_a_kernel(values.to(device), torch.bfloat16).cpu()
    assert torch.equal(got.double(), nearest_bfloat16(values))


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float64, torch.float16, torch.int32])
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float64, torch.float16, torch.int32])
def test_casts_through_bfloat16_agree_with_torch(source, target, device):
    if torch.bfloat16 not in (source, target):
        return
    values = torch.tensor([-300.7, -1.5, 0.0, 0.1, 3.0, 255.0, 257.0], device=device).to(source)
    assert torch.equal(cast_in_a_kernel(values, target), values.to(target))


@interpreted_only
@pytest.mark.parametrize("op", ["add", "sum"])
def test_arithmetic_on_bfloat16_is_refused(op):
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="cast to ACC first"):
        unary_kernel[(1,)](x, torch.empty_like(x), OP=op)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dot_multiplies_values_and_not_bit_patterns(dtype, device):
    a = torch.randint(-8, 9, (16, 16), device=device).to(dtype)
    b = torch.randint(-8, 9, (16, 16), device=device).to(dtype)
    out = torch.empty(16, 16, device=device)
    dot_kernel[(1,)](a, b, out)
    assert out.norm() > 0
    assert torch.equal(out, a.float() @ b.float())


@interpreted_only
def test_a_grid_beyond_the_limit_of_cuda_is_refused():
    x = torch.ones(4)
    with pytest.raises(ValueError, match="beyond what CUDA takes"):
        copy_kernel[(1, 65_536)](x, torch.empty(4), 4, BLOCK=4, IS_MASKED=True)


# Memory


@interpreted_only
@pytest.mark.parametrize("end", ["front", "back"])
def test_guarded_keeps_values_and_strides(end):
    for name, view in layouts(torch.randn(3, 5)):
        copy = guarded(view, end)
        assert torch.equal(copy, view), name
        assert copy.stride() == view.stride()
    assert guarded(torch.ones(1).expand(7), end).tolist() == [1.0] * 7
    assert guarded(torch.empty(0, 3), end).shape == (0, 3)


@interpreted_only
def test_an_access_after_the_end_ends_the_child():
    x = guarded(torch.ones(100))

    def copy(is_masked: bool) -> None:
        copy_kernel[(1,)](x, torch.empty(100), 100, BLOCK=128, IS_MASKED=is_masked)

    in_child(lambda: copy(True))
    with pytest.raises(AssertionError, match="SIGSEGV"):
        in_child(lambda: copy(False))


@interpreted_only
def test_an_access_before_the_beginning_ends_the_child():
    def copy(x: torch.Tensor) -> None:
        shifted_copy_kernel[(1,)](x, torch.empty(100), 100, BLOCK=128)

    in_child(lambda: copy(guarded(torch.ones(1100), "front")[1:]))
    with pytest.raises(AssertionError, match="SIGSEGV"):
        in_child(lambda: copy(guarded(torch.ones(100), "front")))


@interpreted_only
def test_a_32_bit_offset_is_seen_beyond_2_to_the_31():
    x = sparse((3, 50), (2**30 + 64, 1), torch.float16)
    x.copy_(torch.tensor([1.0, 2.0, 3.0])[:, None].expand(3, 50))

    def sums(is_wide: bool) -> None:
        out = torch.empty(3)
        row_sum_kernel[(3,)](x, out, x.stride(0), 50, BLOCK=64, IS_WIDE=is_wide)
        assert out.tolist() == [50.0, 100.0, 150.0]

    in_child(lambda: sums(True))
    with pytest.raises(AssertionError, match="SIGSEGV"):
        in_child(lambda: sums(False))


@interpreted_only
def test_in_child_reports_what_was_raised_and_what_hangs():
    def fail() -> None:
        raise ValueError("planted")

    with pytest.raises(AssertionError, match="ValueError: planted"):
        in_child(fail)
    with pytest.raises(AssertionError, match="SIGALRM"):
        in_child(lambda: time.sleep(60), seconds=1)


@interpreted_only
def test_in_child_can_use_torch_with_its_threads():
    x = torch.randn(400, 400)
    x @ x  # starts the workers that a fork loses
    in_child(lambda: (x @ x).sum().item(), seconds=30)


# Order of programs


@interpreted_only
def test_permuted_grid_sees_that_order_matters():
    def last() -> float:
        out = torch.zeros(1)
        last_writer_kernel[(8,)](out)
        return out.item()

    expected = last()
    orders = []
    for seed in range(3):
        with permuted_grid(seed):
            orders.append(last())
    assert expected not in orders
    assert last() == expected


@interpreted_only
def test_permuted_grid_sees_float_atomics():
    x = torch.randn(64) * 10 ** torch.linspace(-3, 3, 64)

    def total() -> float:
        out = torch.zeros(1)
        atomic_sum_kernel[(64,)](x, out)
        return out.item()

    totals = {total()}
    for seed in range(3):
        with permuted_grid(seed):
            totals.add(total())
    assert len(totals) > 1


@interpreted_only
def test_permuted_grid_runs_every_program_once():
    x = torch.arange(60.0)
    out = torch.empty(60)
    with permuted_grid(0):
        copy_kernel[(15,)](x, out, 60, BLOCK=4, IS_MASKED=True)
    assert torch.equal(out, x)


# Poison


@pytest.mark.parametrize("make", [
    lambda x: torch.empty(4, device=x.device),
    lambda x: torch.empty_like(x),
    lambda x: x.new_empty(4),
    lambda x: torch.empty_strided((2, 2), (2, 1), device=x.device),
    lambda x: x.new_empty_strided((2, 2), (2, 1)),
])  # fmt: skip
def test_empty_memory_is_poisoned(make, device):
    x = torch.zeros(4, device=device)
    assert make(x).isnan().all()
    with poisoned(0x7F):
        assert make(x).view(torch.int32).eq(0x7F7F7F7F).all()
    assert make(x).isnan().all()


def test_poison_is_what_a_forgotten_store_leaves(device):
    out = torch.empty(8, device=device)
    copy_kernel[(1,)](torch.ones(8, device=device), out, 5, BLOCK=8, IS_MASKED=True)
    assert out[:5].eq(1).all()
    assert out[5:].isnan().all()


# Layouts


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (2, 0, 4), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_layouts_have_equal_values_and_differ(shape, dtype):
    tensor = torch.randn(shape).mul(10).to(dtype)
    views = layouts(tensor)
    for name, view in views:
        assert torch.equal(view, tensor), name
    if tensor.numel() > 1 and tensor.dim() > 1:
        assert len({(view.stride(), view.storage_offset()) for _, view in views}) > 4


def test_layouts_can_keep_the_last_dimension_contiguous():
    views = dict(layouts(torch.randn(2, 3, 4), last_contiguous=True))
    assert "transposed 0, 1" in views
    assert all(view.stride(-1) == 1 for view in views.values())


def test_layouts_expand_what_is_constant():
    views = dict(layouts(torch.ones(3, 4)))
    assert views["stride 0 in 0"].stride(0) == 0
    assert views["stride 0 in 1"].stride(1) == 0
    assert not any(name.startswith("stride 0") for name, _ in layouts(torch.randn(3, 4)))


# Host synchronisation


@pytest.mark.parametrize("sync", [
    lambda x: x.item(),
    lambda x: x.tolist(),
    lambda x: bool(x > 0),
    lambda x: int(x),
    lambda x: float(x),
    lambda x: x.nonzero(),
    lambda x: torch.nonzero(x),
    lambda x: x.reshape(1)[x.reshape(1) > 0],
    lambda x: x.cpu(),
    lambda x: torch.equal(x, x),
])  # fmt: skip
def test_no_host_sync_sees(sync, device):
    x = torch.ones((), device=device)
    sync(x)
    with no_host_sync(), pytest.raises(AssertionError, match="waits for the device"):
        sync(x)
    sync(x)


def test_no_host_sync_lets_arithmetic_and_slices_pass(device):
    x = torch.ones(4, device=device)
    with no_host_sync():
        y = (x[1:] * 2).sum()
    assert y.item() == 6


# The comparator


def rounded_and_truth(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    truth = torch.randn(64, 256, dtype=torch.float64)
    return truth.to(dtype), truth


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rule_accepts_correct_rounding(dtype):
    actual, truth = rounded_and_truth(dtype)
    assert_as_accurate("x", actual, plain=actual, truth=truth)


def truncated(truth: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded towards zero."""
    rounded = truth.to(dtype)
    away = rounded.double().abs() > truth.abs()
    return torch.where(away, torch.nextafter(rounded, torch.zeros_like(rounded)), rounded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_rule_refuses_truncating_casts(dtype):
    plain, truth = rounded_and_truth(dtype)
    with pytest.raises(AssertionError, match=r"x: (rms|shrink)"):
        assert_as_accurate("x", truncated(truth, dtype), plain=plain, truth=truth)


def test_the_rule_sees_a_bias_that_no_single_element_shows():
    plain, truth = rounded_and_truth(torch.bfloat16)
    some = torch.rand(truth.shape) < 0.2
    biased = torch.where(some, truncated(truth, torch.bfloat16), plain)
    with pytest.raises(AssertionError, match="x: shrink"):
        assert_as_accurate("x", biased, plain=plain, truth=truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rule_refuses_one_wrong_element_and_names_it(dtype):
    plain, truth = rounded_and_truth(dtype)
    wrong = plain.clone()
    wrong[17, 203] += 0.25
    with pytest.raises(AssertionError, match=r"x: error .* worst at \[17, 203\]"):
        assert_as_accurate("x", wrong, plain=plain, truth=truth)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_rule_wants_the_same_nonfinite_values_in_the_same_places(value):
    plain, truth = rounded_and_truth(torch.float32)
    for tensor in (plain, truth):
        tensor[3, 4] = value
    assert_as_accurate("x", plain.clone(), plain=plain, truth=truth)
    missing, extra, other = plain.clone(), plain.clone(), plain.clone()
    missing[3, 4], extra[5, 6], other[3, 4] = 0.0, value, -1.0 if math.isnan(value) else -value
    for wrong, index in ((missing, "3, 4"), (extra, "5, 6"), (other, "3, 4")):
        with pytest.raises(AssertionError, match=rf"finite.*\[{index}\]"):
            assert_as_accurate("x", wrong, plain=plain, truth=truth)


def test_the_rule_accepts_overflow_of_the_narrow_dtype_only():
    truth = torch.tensor([1e5, 1.0], dtype=torch.float64)
    plain = truth.half()
    assert_as_accurate("x", plain, plain=plain, truth=truth)
    with pytest.raises(AssertionError, match="finite"):
        assert_as_accurate("x", truth.float() / 0, plain=truth.float(), truth=truth)


def test_the_rule_refuses_all_zeros_and_a_wrong_shape():
    plain, truth = rounded_and_truth(torch.float32)
    with pytest.raises(AssertionError, match="x: error"):
        assert_as_accurate("x", torch.zeros_like(plain), plain=plain, truth=truth)
    with pytest.raises(AssertionError, match=r"shape \(64, 255\)"):
        assert_as_accurate("x", plain[:, 1:], plain=plain, truth=truth)


def test_the_rule_judges_a_result_that_is_exactly_zero():
    zeros = torch.zeros(5, dtype=torch.float64)
    assert_as_accurate("x", zeros.float(), plain=zeros.float(), truth=zeros)
    with pytest.raises(AssertionError, match="x: error"):
        assert_as_accurate("x", zeros.float() + 1e-30, plain=zeros.float(), truth=zeros)


# Mutants


KERNEL = "kernels/cross_entropy/kernel.py"
COMMENT = Mutant("a comment", KERNEL, "# one grid dimension: y", "# a comment: y")


def smoke_check() -> None:
    logits, targets = cross_entropy_inputs(8, 40)
    plain = F.cross_entropy(logits, targets, reduction="none")
    truth = F.cross_entropy(logits.double(), targets, reduction="none")
    for backend in ("triton", "torch"):
        losses = fastlm.cross_entropy(logits, targets, reduction="none", backend=backend)
        assert_as_accurate(backend, losses, plain=plain, truth=truth)


@interpreted_only
def test_a_mutant_of_a_kernel_is_killed_and_leaves_nothing_behind():
    wrong_sign = Mutant(
        "sign of the target logit", KERNEL, "log_sum - (x_target", "log_sum + (x_target"
    )
    assert killed(wrong_sign, smoke_check)
    smoke_check()


@interpreted_only
@pytest.mark.parametrize("file, old, new", [
    ("kernels/cross_entropy/launch.py", "return losses, maximum", "return maximum, maximum"),
    ("fastlm/ops/eager/cross_entropy.py", "mask(_column(ignored)", "mask(_column(~ignored)"),
])  # fmt: skip
def test_python_around_a_kernel_can_be_mutated(file, old, new):
    assert killed(Mutant("python", file, old, new), smoke_check)


@interpreted_only
def test_a_mutant_that_changes_nothing_survives():
    assert not killed(COMMENT, smoke_check)


@interpreted_only
def test_a_mutant_must_be_planted_exactly_once_and_import():
    with pytest.raises(ValueError, match="is 0 times in"):
        Mutant("absent", KERNEL, "no such text", "x")
    with pytest.raises(ValueError, match=r"is ([2-9]|\d\d) times in"):
        Mutant("twice", KERNEL, "tl.load", "tl.store")
    with pytest.raises(AssertionError, match="could not be planted"):
        killed(Mutant("syntax", KERNEL, '"""Cross-entropy kernels.', "def ("), smoke_check)


@interpreted_only
def test_a_check_that_always_fails_kills_no_mutant():
    def broken() -> None:
        raise ValueError("this check is broken")

    with pytest.raises(AssertionError, match="this check is broken"):
        killed(COMMENT, broken)
