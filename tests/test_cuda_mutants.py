"""Bugs planted in csrc/: each, compiled and run on a CPU, must make a check fail."""

from __future__ import annotations

import math
import sys

import pytest
import test_cross_entropy as of_all_backends
import test_cuda_cross_entropy as of_cuda
import torch
from support.cross_entropy import kernels_backward, kernels_forward
from support.cuda_host import (
    host_library,
    in_place_of_the_extension,
    killed,
    loaded,
    mutated,
    only_block,
    run,
)
from support.cuda_host import program as built
from support.interpreter import interpreted_only
from support.loss_addresses import FAR, MANY_ROWS, check_far, check_far_gradient
from support.losses import OPTIONS, definition, judge, ours
from support.memory import in_child
from support.mutants import Mutant

from fastlm.ops.cuda import cross_entropy as door
from fastlm.testing import cross_entropy_inputs

pytestmark = interpreted_only

KERNEL = "csrc/cross_entropy.cuh"
LOSSES = "csrc/losses.cuh"
VECTORS = "csrc/vectors.cuh"
REDUCE = "csrc/reduce.cuh"
MUTANTS = [
    Mutant("the total is not rescaled", LOSSES, "    sums.total *= decay;\n", ""),
    Mutant("warps are not combined", REDUCE,
           "warp < warps_of_block(); ++warp", "warp < 1; ++warp"),
    Mutant("a group of only -inf is forgotten", LOSSES,
           "pivot = sums.maximum == -kInfinity<A> ? 0 : sums.maximum", "pivot = sums.maximum"),
    Mutant("NaN is swallowed", LOSSES,
           "sums.total += exponential(x[i] - pivot);",
           "if (x[i] == x[i]) sums.total += exponential(x[i] - pivot);"),
    Mutant("elements beyond the row count", LOSSES,
           "transform(logit[i]) : -kInfinity<A>;", "transform(logit[i]) : A(0);"),
    Mutant("the last element of a row is skipped", VECTORS,
           "at < size ? row[at * stride]", "at + 1 < size ? row[at * stride]"),
    Mutant("stride of the vocabulary is one", VECTORS, "row[at * stride]", "row[at]"),
    Mutant("16 bytes begin four bytes late", VECTORS, "shift & 4 ?", "shift & 8 ?"),
    Mutant("16 bytes begin eight bytes late", VECTORS, "shift & 8 ?", "shift & 32 ?"),
    Mutant("halves of words change places", VECTORS,
           "words[i] >> 16 | words[i + 1] << 16", "words[i] << 16 | words[i + 1] >> 16"),
    Mutant("groups with gaps are read together", VECTORS, "if (stride == 1) {", "if (stride) {"),
    Mutant("the elements before a group of the gradient are lost", KERNEL,
           "kGroup<T> - behind(dlogits);", "kGroup<T> + behind(dlogits);"),
    Mutant("outer stride takes the inner one's place", KERNEL,
           "row / rows.inner * rows.stride_outer +\n             row % rows.inner * "
           "rows.stride_inner",
           "row / rows.inner * rows.stride_inner +\n             row % rows.inner * "
           "rows.stride_outer"),
    Mutant("offsets of rows have 32 bits", KERNEL,
           "row / rows.inner * rows.stride_outer",
           "static_cast<int>(row / rows.inner * rows.stride_outer)"),
    Mutant("offsets of rows of the gradient have 32 bits", KERNEL,
           "dlogits += number * rows.vocab_size",
           "dlogits += static_cast<int>(number * rows.vocab_size)"),
    Mutant("sums do not wait for the maximum", LOSSES,
           "  reduce_warps(own.maximum, maxima, Larger());\n  __syncthreads();\n",
           "  reduce_warps(own.maximum, maxima, Larger());\n"),
    Mutant("ignored rows keep their loss", KERNEL,
           "results.losses)[number] = row.is_ignored ? 0 : loss",
           "results.losses)[number] = loss"),
    Mutant("ignored rows keep their gradient", KERNEL,
           "row.is_ignored ? A(0) : static_cast<A>(NAN)", "static_cast<A>(NAN)"),
    Mutant("a target out of range is a class", KERNEL,
           "row.is_ignored ? A(0) : static_cast<A>(NAN)", "A(0)"),
    Mutant("no row has a target", LOSSES, "(is_target ? A(1) : A(0))", "A(0)"),
    Mutant("one upstream gradient for all", LOSSES,
           "gradients ? static_cast<const A*>(gradients)[row] : 0",
           "gradients ? static_cast<const A*>(gradients)[0] : 0"),
    Mutant("every block of a row begins at its first", KERNEL,
           "static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x", "int64_t(threadIdx.x)"),
    Mutant("the mean does not follow the maximum", LOSSES,
           "sums.moment -= rise * sums.total;", ""),
    Mutant("the mean is not moved when threads are combined", LOSSES,
           "share * (own.moment + fall * own.total)", "share * own.moment"),
    Mutant("the last of the largest is predicted", LOSSES,
           "for (int i = kCount - 1; i >= 0; --i)", "for (int i = 0; i < kCount; ++i)"),
    Mutant("any thread may predict", LOSSES,
           "own.maximum == row.maximum ? own.first : size - 1", "own.first"),
    Mutant("the softcap has no slope", LOSSES, "(1 - ratio * ratio) * scale", "scale"),
    Mutant("the logit scale is not in the gradient", LOSSES,
           "if (softcap == 0) return scale;", "if (softcap == 0) return 1;"),
    Mutant("the smoothed loss forgets the class weights", LOSSES,
           "gathering.weight ? gathering.weight[first + i] * difference : difference",
           "difference"),
    Mutant("the smoothed gradient forgets the class weights", LOSSES,
           "dx -= weight * factors.of_weight", "dx -= factors.of_weight"),
    Mutant("the target is not smoothed", LOSSES, "factors.of_target *= 1 - smoothing;", ""),
    Mutant("the gradient of lse is lost", KERNEL,
           "factors.of_all += of_row<A>(upstream.dlse, number);", ""),
    Mutant("the entropy's gradient has the wrong sign", LOSSES,
           "dx -= p * (p == 0 ? 0", "dx += p * (p == 0 ? 0"),
    Mutant("parts of lse are added before they are used", KERNEL,
           "x - maximum - log_sum, v", "x - (maximum + log_sum), v"),
]  # fmt: skip
# what only a sanitizer sees: on this processor the addresses are as good as others
UNSEEN = Mutant("any address is read whole", VECTORS,
                "const int late = behind(row + first);", "const int late = 0;")  # fmt: skip


def check() -> None:
    of_all_backends.test_takes_any_incoming_gradient(False, "cuda", "cpu")
    of_all_backends.test_ignored_rows_have_no_loss_and_no_gradient(0, "cuda", "cpu")
    of_all_backends.test_huge_logits_do_not_overflow("cuda", "cpu", None)
    for value in (-math.inf, math.nan):
        of_all_backends.test_values_that_are_not_finite_do_what_they_do_in_torch(
            value, torch.float32, "cuda", "cpu", None
        )
    check_far(door, *FAR["outer"], torch.float32)
    with only_block(sys.modules["fastlm._C"], MANY_ROWS - 1):
        check_far_gradient(door, [MANY_ROWS - 1])
    with pytest.MonkeyPatch.context() as monkeypatch:
        of_cuda.force_few_threads(monkeypatch)
        of_cuda.test_any_layout_gives_the_bits_of_the_contiguous_one(torch.bfloat16, None)
        of_cuda.test_the_first_of_equals_is_predicted(None)
        logits, targets = cross_entropy_inputs(8, of_cuda.several_rounds(torch.float32))
        targets[0] = logits.shape[-1] - 1
        for options in (
            OPTIONS,
            {"reduction": "none"},
            {"logit_scale": 0.5, "reduction": "none"},
            {"return_stats": True, "reduction": "none"},
        ):
            judge(ours, definition, (logits, targets), "cuda", options)
        # of maxima this large, an lse has lost the last digits of what is taken off
        shifted = (logits * 1024).round() / 1024 + 2.0**13
        judge(ours, definition, (shifted, targets), "cuda", {"reduction": "none"})
        beyond = torch.full((8,), logits.shape[-1])
        losses, *saved = kernels_forward(logits, beyond, door)
        gradient = kernels_backward(torch.ones(8), logits, beyond, *saved, door=door)
        assert losses.isnan().all()
        assert gradient.isnan().all()


def test_the_check_passes_without_a_bug():
    library = host_library()

    def passes() -> None:
        with in_place_of_the_extension(loaded(library)):
            check()

    in_child(passes)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_every_bug_is_found(mutant):
    assert killed(mutant, check)


@pytest.mark.slow
def test_the_sanitizers_find_what_no_result_shows():
    with mutated(UNSEEN) as csrc:
        done = run(built(of_cuda.DRIVER, "asan", csrc))
    assert done.returncode
    assert "requires 16 byte alignment" in done.stderr
