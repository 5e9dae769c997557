"""Bugs planted in the CUDA C++ kernels of rms_norm, rotary and glu: the programs that check them
must fail."""

from __future__ import annotations

import pytest
from support.cuda_host import HOST, mutated, program, run
from support.interpreter import interpreted_only
from support.mutants import Mutant

pytestmark = [interpreted_only, pytest.mark.slow]

NORM, ROTARY, GLU = "csrc/rms_norm.cuh", "csrc/rotary.cuh", "csrc/glu.cuh"
NUMBERS, LAUNCH = "csrc/numbers.cuh", "csrc/rms_norm.cu"
MUTANTS = [
    ("rms_norm", Mutant("a team sums its first warp alone", NORM,
     "value = combined(by_warp, Sum());", "value = by_warp[0];")),
    ("rms_norm", Mutant("sums do not wait for all warps", NORM,
     "by_warp[threadIdx.x / kWarpSize] = value;\n    __syncthreads();",
     "by_warp[threadIdx.x / kWarpSize] = value;")),
    ("rms_norm", Mutant("the weight has no offset", NORM,
     "scale.items[i] + static_cast<A>(in.weight_offset)", "scale.items[i]")),
    ("rms_norm", Mutant("the sum is not rounded", NORM,
     "rounded(x.items[i] + added.items[i], dtype)", "x.items[i] - added.items[i]")),
    ("rms_norm", Mutant("epsilon is forgotten", NORM, " + static_cast<A>(in.eps)", "")),
    ("rms_norm", Mutant("a row's part of the weight's gradient replaces the others", NORM,
     "row == begin ? product : sums[first + i] + product", "product")),
    ("rms_norm", Mutant("teams share one room", NORM,
     "room + threadIdx.x / plan.team * in.size", "room")),
    ("rms_norm", Mutant("the gradient of the sum is lost", NORM,
     "d.items[i] += added.items[i];", "d.items[i] += 0 * added.items[i];")),
    ("rms_norm", Mutant("rows are found by the stride of another dimension", NORM,
     "row / inner * rows.stride_outer + row % inner * rows.stride_inner",
     "row / inner * rows.stride_inner + row % inner * rows.stride_outer")),
    ("rms_norm", Mutant("more room is used than was asked for", LAUNCH,
     "has_room ? int(bytes) : 0", "has_room ? int(bytes / 2 + 1) : 0")),
    ("rotary", Mutant("what has gaps is read at once", NUMBERS,
     "if (stride == 1 && first + kEight <= size && dtype", "if (first + kEight <= size && dtype")),
    ("rotary", Mutant("the gradient is rotated forward", ROTARY, "A(-1) : A(1)", "A(1) : A(1)")),
    ("rotary", Mutant("neighbours are those of the other half", ROTARY,
     "i < kEight / 2 ? low : high", "i < kEight / 2 ? high : low")),
    ("rotary", Mutant("the second of a pair turns the other way", ROTARY,
     "high.items[i] = b * cos.items[i] + a", "high.items[i] = b * cos.items[i] - a")),
    ("rotary", Mutant("channels beyond the pairs begin too early", ROTARY,
     "2 * in.pairs + (unit - of_pairs)", "in.pairs + (unit - of_pairs)")),
    ("rotary", Mutant("a head has no channels beyond its pairs", ROTARY,
     " + eights_of(in.head_dim - 2 * in.pairs)", "")),
    ("rotary", Mutant("angles are those of the first token", ROTARY,
     "position * in.angle_t", "0 * in.angle_t")),
    ("rotary", Mutant("the last of eight is not written", NUMBERS,
     "if (first + i < size) put_number(to, i,", "if (first + i + 1 < size) put_number(to, i,")),
    ("glu", Mutant("a slope is an activation", GLU, "value * (1 - value)", "value")),
    ("glu", Mutant("up is gate", GLU, "eight_of<A>(in.up, row", "eight_of<A>(in.gate, row")),
    ("glu", Mutant("the gradient forgets up", GLU,
     "dout.items[i] * up.items[i] * act.slope", "dout.items[i] * act.slope")),
    ("glu", Mutant("the gradients change places", GLU,
     "moved(in.dup, row * in.size, dtype), dtype, first, in.size, dup",
     "moved(in.dup, row * in.size, dtype), dtype, first, in.size, out")),
    ("glu", Mutant("every thread has the first eight", GLU,
     "number % eights * kEight", "number % eights * 0")),
    ("glu", Mutant("rows have no gaps", GLU,
     "row % inner * rows.stride_inner", "row % inner * size")),
    ("glu", Mutant("elements beyond the row are written", NUMBERS,
     "if (first + i < size) put_number(to, i,", "put_number(to, i,")),
    ("glu", Mutant("eight float32 are four", NUMBERS,
     "eight.items[g * kGroup<T> + i]", "eight.items[i]")),
]  # fmt: skip


@pytest.mark.parametrize(("op", "mutant"), MUTANTS, ids=str)
def test_a_program_sees_it(op, mutant):
    with mutated(mutant) as csrc:
        done = run(program(HOST / f"check_{op}.cpp", "plain", csrc), "small")
        if done.returncode == 0:
            done = run(program(HOST / f"check_{op}.cpp", "asan", csrc))
    assert done.returncode
