"""Bugs planted in the kernels of rms_norm, rotary and glu: each must make a short check fail."""

from __future__ import annotations

import pytest
import test_rms_norm
import torch
from support.interpreter import interpreted_only
from support.layers import (
    CASES,
    REFERENCES,
    assert_same_bits,
    force_tiny_blocks,
    judge,
    relaid,
    run_guarded,
)
from support.mutants import Mutant, killed

from fastlm.kernels import glu, rms_norm, rotary

pytestmark = [interpreted_only, pytest.mark.slow]

NORM, NORM_LAUNCH = "kernels/rms_norm/kernel.py", "kernels/rms_norm/launch.py"
ROTARY, ROTARY_LAUNCH = "kernels/rotary/kernel.py", "kernels/rotary/launch.py"
GLU, GLU_LAUNCH = "kernels/glu/kernel.py", "kernels/glu/launch.py"
ROWS = "kernels/_rows.py"
OF_NORM = [
    Mutant("what lies beyond a vector is squared", NORM,
           "tl.load(ptrs[:, None] + cols[None, :] * stride_col, mask=mask, other=0.0)",
           "tl.load(ptrs[:, None] + cols[None, :] * stride_col, mask=mask, other=1.0)"),
    Mutant("the sum is normalised before it is rounded", NORM, "x = x.to(TOTAL).to(ACC)", "x = x"),
    Mutant("the weight has no offset", NORM,
           "weight + tl.full((), weight_offset, ACC)", "weight"),
    Mutant("the mean is that of a block", NORM,
           "squares / size +", "squares / BLOCK_C +"),
    Mutant("epsilon is forgotten", NORM, " + tl.full((), eps, ACC)", ""),
    Mutant("a wide vector is normalised by its last block", NORM,
           "squares += tl.sum(x * x, 1)", "squares = tl.sum(x * x, 1)"),
    Mutant("the gradient ignores that the norm depends on the vector", NORM,
           "(grad - normal * mean[:, None]) * rstd", "grad * rstd"),
    Mutant("the gradient of the sum is lost", NORM,
           "dx += tl.load(dtotal_ptrs + cols[None, :], mask=mask, other=0.0)",
           "dx += 0.0 * tl.load(dtotal_ptrs + cols[None, :], mask=mask, other=0.0)"),
    Mutant("only the last tile counts for the weight", NORM, "sums += product", "sums = product"),
    Mutant("the weight's gradient is multiplied by the weight", NORM,
           "product = dout * normal", "product = dout * normal * scale"),
    Mutant("one part too few is added up", NORM,
           "mask = (rows < num_parts)", "mask = (rows < num_parts - 1)"),
    Mutant("parts of wide vectors are one", NORM, "part = program // blocks_per_row",
           "part = program // blocks_per_row * 0"),
    Mutant("the sums of a wide vector's products start anew", NORM, "dots += tl.sum(",
           "dots = tl.sum("),
    Mutant("rows are found by the stride of another dimension", ROWS,
           "return outer, inner", "return outer, (inner[0], outer[1])"),
    Mutant("float64 is computed in float32", NORM_LAUNCH,
           "BLOCK_C=plan.block_c, ACC=accumulator(dtype),\n        num_warps",
           "BLOCK_C=plan.block_c, ACC=accumulator(torch.float32),\n        num_warps"),
]  # fmt: skip
OF_ROTARY = [
    Mutant("the gradient is rotated forward", ROTARY, "sin = -sin", "sin = sin"),
    Mutant("neighbours change places", ROTARY,
           "tl.join(a * cos - b * sin, b * cos + a * sin)",
           "tl.join(b * cos + a * sin, a * cos - b * sin)"),
    Mutant("the second of a pair turns the other way", ROTARY,
           "(b * cos + a * sin).to(DTYPE)", "(b * cos - a * sin).to(DTYPE)"),
    Mutant("partners are neighbours of the first half", ROTARY,
           "x_ptrs + (pairs + pair) * stride_d", "x_ptrs + (1 + pair) * stride_d"),
    Mutant("channels beyond the pairs are left out", ROTARY,
           "range(2 * pairs, head_dim, BLOCK_P)", "range(2 * pairs, 2 * pairs, BLOCK_P)"),
    Mutant("all sequences have the angles of the first", ROTARY,
           "cos_ptr + batch * angles_b", "cos_ptr + 0 * angles_b"),
    Mutant("angles go by heads", ROTARY,
           "sin_ptr + batch * angles_b + position * angles_t",
           "sin_ptr + batch * angles_b + head * angles_t"),
    Mutant("pairs of the first block alone", ROTARY,
           "range(0, pairs, BLOCK_P)", "range(0, BLOCK_P, BLOCK_P)"),
    Mutant("both tables are read by the strides of one", ROWS,
           "if cos.stride() != sin.stride():", "if cos.dim() != sin.dim():"),
    Mutant("the channels' stride is one", ROTARY, "x_ptrs + cols * stride_d, mask=inside",
           "x_ptrs + cols, mask=inside"),
]  # fmt: skip
OF_GLU = [
    Mutant("the gate's slope is that of a sigmoid", GLU,
           "share * (1.0 + x * (1.0 - share))", "share * (1.0 - share)"),
    Mutant("the slope of tanh is forgotten", GLU, " + 0.5 * x * rise", ""),
    Mutant("gelu takes the wrong root", GLU, "0.7071067811865476", "0.7978845608028654"),
    Mutant("gelu's density is not normalised", GLU, " * _1_OVER_SQRT_2_PI\n", "\n"),
    Mutant("a cube counts too little", GLU,
           "x + 0.044715 * x * x * x", "x + 0.0044715 * x * x * x"),
    Mutant("relu2 has the slope of relu", GLU,
           "positive * positive, 2.0 * positive", "positive * positive, positive"),
    Mutant("the gradients change places", GLU,
           "tl.store(dup_ptr + place, (dout * value)", "tl.store(dup_ptr + place, (dout * slope)"),
    Mutant("the gate's gradient is not multiplied by up", GLU,
           "dout * up * slope", "dout * slope"),
    Mutant("every block of a row begins at its first", GLU,
           "(program % blocks_per_row) * BLOCK +", "(program % blocks_per_row) * 0 +"),
    Mutant("rows are found by the stride of another dimension", GLU,
           "outer * stride_outer", "outer * stride_inner"),
    Mutant("the columns' stride is one", GLU, "ptr + cols * stride_col", "ptr + cols"),
    Mutant("what has gaps is one long row", ROWS,
           "if all(x.is_contiguous() for x in tensors):", "if tensors[0].is_contiguous():"),
]  # fmt: skip

OF_ADDRESSES = [
    ("norm without weight", Mutant("a vector beyond the last", NORM,
     "has_row = (rows < num_rows)[:, None]", "has_row = (rows < num_rows + 1)[:, None]")),
    ("rotary", Mutant("a head beyond the last", ROTARY,
     "has_row = (rows < num_rows)[:, None]", "has_row = (rows < num_rows + 1)[:, None]")),
    ("silu", Mutant("an element beyond the last", GLU, "cols, cols < size", "cols, cols <= size")),
]  # fmt: skip
DOORS = {"rms_norm": rms_norm, "rotary": rotary, "glu": glu}


def check(op: str) -> None:
    door = DOORS[op]
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, case in CASES.items():
            if case.op != op:
                continue
            for whole in (True, False)[: 1 + (op == "rms_norm")]:
                force_tiny_blocks(monkeypatch, whole=whole)
                judge(case, door, case.inputs())
            force_tiny_blocks(monkeypatch)
            inputs = case.inputs(torch.bfloat16)
            want = case.run(door, inputs)
            assert_same_bits(case.run(door, relaid(inputs, 0)), want, name)
            for place in (3, 5):
                assert_same_bits(case.run(door, relaid(inputs, place)), want, name)
            inputs = case.inputs(torch.float64)
            wide = zip(case.run(door, inputs), case.run(REFERENCES[op], inputs), strict=True)
            assert all(torch.allclose(x, y, rtol=1e-12, atol=1e-12) for x, y in wide)


def check_norm() -> None:
    check("rms_norm")
    test_rms_norm.test_the_norm_is_that_of_the_sum_it_returns("triton", "cpu")


def check_rotary() -> None:
    check("rotary")


def check_glu() -> None:
    check("glu")


@pytest.mark.parametrize("mutant", OF_NORM, ids=str)
def test_a_bug_in_rms_norm_is_found(mutant):
    assert killed(mutant, check_norm)


@pytest.mark.parametrize("mutant", OF_ROTARY, ids=str)
def test_a_bug_in_rotary_is_found(mutant):
    assert killed(mutant, check_rotary)


@pytest.mark.parametrize("mutant", OF_GLU, ids=str)
def test_a_bug_in_glu_is_found(mutant):
    assert killed(mutant, check_glu)


@pytest.mark.parametrize(("name", "mutant"), OF_ADDRESSES, ids=str)
def test_an_access_outside_is_seen(name, mutant, monkeypatch):
    force_tiny_blocks(monkeypatch)
    case = CASES[name]
    assert killed(mutant, lambda: run_guarded(case, DOORS[case.op], "back", (16, 37)))
