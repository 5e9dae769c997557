"""Bugs planted in the kernels of linear_cross_entropy in csrc/: each must make a check fail."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import test_cuda_linear_cross_entropy as of_cuda
import test_linear_cross_entropy as of_all_backends
import test_vocab_parallel as split
import torch
from support.cuda_host import host_library, in_place_of_the_extension, killed, loaded, mutated, run
from support.cuda_host import program as built
from support.interpreter import interpreted_only
from support.linear_cross_entropy import forced, inputs, judge
from support.losses import OPTIONS, linear, linear_definition
from support.losses import judge as judge_options
from support.memory import in_child
from support.mutants import Mutant
from support.ranks import Ranks

pytestmark = interpreted_only

KERNEL = "csrc/linear_cross_entropy.cuh"
MUTANTS = [
    Mutant("the logits are read as float32 of the gradient's size", KERNEL,
           "row.logits, 1, first + part, size", "row.logits, 1, first, size"),
    Mutant("offsets of rows have 32 bits", KERNEL,
           "(rows.logits) + row * rows.vocab_size",
           "(rows.logits) + static_cast<int>(row * rows.vocab_size)"),
    Mutant("offsets of rows of the gradient have 32 bits", KERNEL,
           "(place.dlogits) + number * size", "(place.dlogits) + static_cast<int>(number * size)"),
    Mutant("offsets of rows have 32 bits in the bias gradient", KERNEL,
           "(rows.logits) + number * size", "(rows.logits) + static_cast<int>(number * size)"),
    Mutant("the bias is not in the logit of the target", KERNEL,
           "bias ? logits[v] + bias[v] : logits[v]", "logits[v]"),
    Mutant("ignored rows keep their loss", KERNEL,
           "(results.losses)[number] = row.is_ignored ? 0 : loss",
           "(results.losses)[number] = loss"),
    Mutant("ignored rows keep their gradient", KERNEL,
           "dx[i] = row.is_ignored ? A(0) : static_cast<A>(NAN)", "dx[i] = static_cast<A>(NAN)"),
    Mutant("a target out of range is a class", KERNEL,
           "is_class = target >= 0 && target < rows.num_classes && !is_ignored",
           "is_class = !is_ignored"),
    Mutant("the lse of ignored rows is kept", KERNEL,
           "(results.lse)[number] = row.is_ignored ? 0 : lse", "(results.lse)[number] = lse"),
    Mutant("the loss is made of the rounded lse", KERNEL,
           "surprisal = log_sum - (row.x_target - sums.maximum)",
           "surprisal = lse - row.x_target"),
    Mutant("the z-loss has half its gradient", KERNEL,
           "factors.of_all += 2 * *static_cast", "factors.of_all += *static_cast"),
    Mutant("the loss of no gradient that came in is zero", KERNEL,
           "upstream.dlosses ? of_row<A>(upstream.dlosses, number) : A(1)",
           "of_row<A>(upstream.dlosses, number)"),
    Mutant("the gradient of log-probabilities is lost", KERNEL,
           "factors.of_target -= of_row<A>(upstream.dlogprobs, number);", ""),
    Mutant("the scale of a float16 gradient is forgotten", KERNEL,
           "transform.slope(x[i]) * scale", "transform.slope(x[i])"),
    Mutant("what the target lost is forgotten", KERNEL,
           "(place.residuals)[2 * number] = here.taken", "(place.residuals)[2 * number] = 0"),
    Mutant("what a second likely class lost is forgotten", KERNEL,
           "(gradient.residuals)[2 * number + 1] = own.taken;",
           "(gradient.residuals)[2 * number + 1] = 0;"),
    Mutant("what the target lost is given back twice", KERNEL,
           "} else if (here.size() > lost.size()) {", "} if (here.size() > lost.size()) {"),
    Mutant("the last to lose anything is given back", KERNEL,
           "here.size() > lost.size()", "here.size() > 0"),
    Mutant("a loss below zero is none", KERNEL, "taken < 0 ? -taken : taken", "taken"),
    Mutant("each chunk overwrites the gradient of the bias", KERNEL,
           "dbias[first + i] += sum", "dbias[first + i] = sum"),
    Mutant("ignored rows are in the gradient of the bias", KERNEL,
           "if (target.is_ignored) continue;", ""),
    Mutant("the bias takes the rows of one warp", KERNEL,
           "other < warps_of_block(); ++other", "other < 1; ++other"),
    Mutant("nobody waits for others to read what is overwritten", KERNEL,
           "if (round == 0 || (kIsNarrow && (round & (round + 1)) == 0)) __syncthreads();", ""),
    Mutant("a narrow row is overwritten before it is read", KERNEL,
           "round == 0 || (kIsNarrow && (round & (round + 1)) == 0)", "round == 0"),
    Mutant("groups before the first are lost", KERNEL,
           "int64_t start = -behind(dlogits);", "int64_t start = behind(dlogits);"),
    Mutant("the entropy known is not read", KERNEL,
           "if (upstream.dentropy) entropy = static_cast", "if (false) entropy = static_cast"),
    Mutant("predictions of ignored rows are classes", KERNEL,
           "row.is_ignored ? -1 : sums.first", "sums.first"),
]  # fmt: skip
SPLIT = [
    Mutant("the target is looked for among the classes here", KERNEL,
           "column = is_class ? target - rows.first_class : -1", "column = is_class ? target : -1"),
    Mutant("a target elsewhere has a logit", KERNEL,
           "write(row.is_here ? row.x_target : A(0));", "write(row.x_target + 1);"),
    Mutant("sums have the weights of other classes", KERNEL,
           "weight + rows.first_class : nullptr", "weight : nullptr"),
    Mutant("the weight of a target is that of a class here", KERNEL,
           "weight[target.column + rows.first_class]", "weight[target.column]"),
    Mutant("weighted sums are relative to the origin", KERNEL,
           "own.weighted - (pivot - origin) * sum", "own.weighted"),
    Mutant("weighted sums count all classes", KERNEL,
           "rows.weight ? *weight_sum : static_cast<A>(rows.vocab_size)",
           "rows.weight ? *weight_sum : static_cast<A>(rows.num_classes)"),
    Mutant("smoothing counts the classes of one rank", KERNEL,
           "smoothing / static_cast<A>(rows.num_classes)",
           "smoothing / static_cast<A>(rows.vocab_size)"),
    Mutant("a shard of nothing but -inf is NaN", "csrc/losses.cuh",
           "pivot = row.maximum == -kInfinity<A> ? 0 : row.maximum", "pivot = row.maximum"),
]  # fmt: skip
# what only a sanitizer sees: whose logit that is, nobody asks
UNSEEN = Mutant("every target is here", KERNEL,
                "is_here = column >= 0 && column < rows.vocab_size",
                "is_here = is_class")  # fmt: skip


@pytest.fixture(autouse=True)
def few_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    of_cuda.force_few_threads(monkeypatch)
    return


def check() -> None:
    of_all_backends.test_all_ignored_is_as_in_torch("none", "cuda", "cpu")
    for target in (-1, 2**32 + 3):
        of_all_backends.test_a_target_out_of_range_is_nan_in_the_kernel(target, "cuda", "cpu")
    of_all_backends.test_float16_gradients_keep_their_precision_at_any_scale_of_the_loss(
        2.0**-20, "cuda", "cpu"
    )
    extension = sys.modules["fastlm._C"]
    for dtype in (torch.float32, torch.bfloat16):
        of_cuda.check_far_rows(extension, dtype)
        arguments = inputs(7, 24, 5 * of_cuda.ROUND + 3, dtype)
        of_all_backends.test_chunks_of_any_size_agree_with_torch(3, dtype, "cuda", "cpu")
        judge(*arguments, backend="cuda", reduction="none")
        judge(*arguments[:2], None, arguments[3], backend="cuda", reduction="sum")
    of_cuda.check_far_bias(extension)
    for dtype in of_cuda.NARROW:
        of_cuda.test_gives_back_what_the_target_and_the_largest_other_lost(150, dtype, None)
    of_cuda.test_where_logits_lie_changes_no_bit(None)
    x, weight, bias, targets = inputs(5, 4, 37)
    x = x * 6  # logits whose exponentials overflow
    alone = {name: OPTIONS[name] for name in OPTIONS if name != "return_stats"}
    for added, options in (
        (bias, OPTIONS),
        (None, {**alone, "reduction": "mean"}),
        (None, {**OPTIONS, "reduction": "mean"}),
    ):
        with forced(rows=3):
            judge_options(linear, linear_definition, (x, weight, added, targets), "cuda", options)
    of_cuda.test_the_loss_of_a_likely_target_is_not_rounded_away()


def check_split() -> None:
    """On two ranks, and on three of which one has no class; likely targets, and rows of -inf."""
    for count, case, *arguments in (
        (2, split.judge_each, [{}, split.TOGETHER, {"label_smoothing": 0.1}], "cuda", 74),
        (2, split.judge_likely, "cuda", 9.0),
        (2, split.same_as_alone, "cuda", {"reduction": "none", "return_stats": True}),
        (3, split.judge_each, [{}, split.PER_POSITION], "cuda", 4, True),
    ):
        ranks = Ranks(count)
        try:
            ranks.run(case, *arguments)
        finally:
            ranks.close()


@pytest.mark.slow
@pytest.mark.parametrize("check", [check, check_split])
def test_the_checks_pass_without_a_bug(check):
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
@pytest.mark.parametrize("mutant", SPLIT, ids=str)
def test_every_bug_in_split_classes_is_found(mutant):
    assert killed(mutant, check_split)


@pytest.mark.slow
def test_the_sanitizers_find_what_no_result_shows():
    with mutated(UNSEEN) as csrc:
        done = run(built(of_cuda.DRIVER, "asan", csrc))
    assert done.returncode
    assert "heap-buffer-overflow" in done.stderr
