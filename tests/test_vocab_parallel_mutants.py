"""Bugs planted in what a loss with split classes does, each of which must be noticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from support.interpreter import interpreted_only
from support.linear_cross_entropy import forced, inputs
from support.losses import OPTIONS, linear
from support.mutants import Mutant, killed
from support.ranks import Ranks
from support.vocab_parallel import by_group, distributed, judge, part
from torch import Tensor

import fastlm
from fastlm import testing

SHARDS = "kernels/_shards.py"
SUMS = "kernels/linear_cross_entropy/shard.py"
KERNEL = "kernels/linear_cross_entropy/kernel.py"
DRIVER = "kernels/_linear_loss.py"
EAGER = "fastlm/ops/eager/linear_cross_entropy.py"
LOSSES = "fastlm/ops/eager/_losses.py"
REFERENCE = "fastlm/ops/reference/_shards.py"

SHARED = [
    Mutant("totals are added without their maxima", SHARDS,
           "shares = (maxima - _finite(maximum)).exp()", "shares = torch.ones_like(maxima)"),
    Mutant("each rank takes itself for the owner of its own row", SHARDS,
           "owner = classes.div(shard.largest", "owner = classes.mul(0).div(shard.largest"),
    Mutant("classes are smoothed relative to the wrong maximum", SHARDS,
           "(maximum - _finite(maxima))) - weighted", "(maximum - maximum)) - weighted"),
    Mutant("smoothing counts the classes of one rank", SHARDS,
           "(label_smoothing / shard.num_classes)", "(label_smoothing / shard.size)"),
    Mutant("the entropy forgets how far a maximum is from the highest", SHARDS,
           "moments + fall * totals", "moments"),
    Mutant("predictions are numbered within a rank", SHARDS,
           "best * shard.largest + firsts", "firsts"),
    Mutant("of equals the last rank's class is predicted", SHARDS,
           "best = maxima.argmax(0, keepdim=True)",
           "best = len(maxima) - 1 - maxima.flip(0).argmax(0, keepdim=True)"),
    Mutant("the gradient of the input stays a share", SHARDS,
           "dist.all_reduce(x, group=self.group)", "pass"),
    Mutant("every rank takes the first classes", SHARDS,
           "min(self.group.rank() * self.largest, self.num_classes)", "0"),
    Mutant("nobody looks whether ranks agree", SHARDS,
           "masked_fill_(~agree, torch.nan)", "masked_fill_(agree & ~agree, torch.nan)"),
    Mutant("an empty shard is not told from one of zeros", SHARDS,
           "sums[0] = -torch.inf", "sums[0] = 0.0"),
]  # fmt: skip
TRITON = [
    Mutant("a target elsewhere is one out of range", KERNEL,
           "return tl.where(known & ~here, 0.0, x_target), w_target, here",
           "return x_target, w_target, here"),
    Mutant("a target elsewhere has no weight", KERNEL,
           "w_target = tl.load(weight_ptr + target, mask=known, other=0.0)", "w_target = w_target"),
    Mutant("the gradient has the weights of other classes", KERNEL,
           "weight = tl.load(weight_ptr + first_class + cols, mask=in_row, other=0.0)\n"
           "        dx = gradient(",
           "weight = tl.load(weight_ptr + cols, mask=in_row, other=0.0)\n        dx = gradient("),
    Mutant("the bias looks for the target at its class", KERNEL,
           "cols[None, :] == column[:, None]", "cols[None, :] == target[:, None]"),
    Mutant("a residual is added for a target elsewhere", KERNEL,
           "residual = tl.where(is_here | (x_target != x_target), residual, 0.0)",
           "residual = dx_target"),
    Mutant("the sums have the weights of other classes", SUMS,
           "weight_ptr + first_class + cols", "weight_ptr + cols"),
    Mutant("weighted sums do not follow the maximum", SUMS, " - rise * weights", ""),
    Mutant("moments do not follow the maximum", SUMS,
           "decay * (moment - rise * total)", "decay * moment"),
    Mutant("lanes are not brought to one maximum", SUMS,
           "fall = tl.where(running_max == float(\"-inf\"), 0.0, running_max - pivot)",
           "fall = tl.zeros((BLOCK_V,), ACC)"),
    Mutant("ignored rows have a loss", DRIVER,
           "masked_fill_(outside, torch.nan).masked_fill_(ignored, 0.0))\n    rows.lse",
           "masked_fill_(outside, torch.nan))\n    rows.lse"),
    Mutant("residuals go to the row of the class's number", KERNEL,
           "tl.minimum(tl.maximum(column, 0), vocab_size - 1)",
           "tl.minimum(tl.maximum(target, 0), vocab_size - 1)"),
    Mutant("the sum of the weights is that of a rank", DRIVER,
           "weight_sum = weight.sum() if",
           "weight_sum = (weight if shard is None else weight[: shard.size]).sum() if"),
]  # fmt: skip
TORCH = [
    Mutant("every rank subtracts one at a target", LOSSES,
           "-row.is_here.to(log_p.dtype)", "-torch.ones_like(log_p[:, :1])"),
    Mutant("the gradient of a target elsewhere replaces the first class's", LOSSES,
           "at_target = torch.where(row.is_here, at_target, log_p.gather(1, targets))", "pass"),
    Mutant("classes have the weights of others", EAGER,
           "weight=shard.of_classes(options.weight)", "weight=options.weight[: shard.size]"),
    Mutant("of a target elsewhere the first logit is sent", LOSSES,
           ".masked_fill_(~here[rows], 0.0)[:, 0]", "[:, 0] + 1.0"),
    Mutant("the sums are relative to zero", LOSSES,
           "z = x - out[0].masked_fill(out[0] == -torch.inf, 0.0)[:, None]", "z = x + 0.0"),
]  # fmt: skip
DEFINITION = [
    Mutant("the definition keeps the first rank's gradients", REFERENCE,
           "first = ranks.rank() * largest", "first = 0"),
    Mutant("the definition keeps the padding", REFERENCE,
           "return torch.cat(shards)[:num_classes]", "return torch.cat(shards)"),
]  # fmt: skip

EVERYTHING = {name: value for name, value in OPTIONS.items() if name != "reduction"}


def _compare(backend: str) -> None:
    """With torch; the residuals of rounding are those of bfloat16."""
    with forced(rows=4, block_v=16):
        for options in ({}, {"reduction": "none"}, EVERYTHING):
            judge((6, 4, 40), torch.float64, {**options, "backend": backend})
    options = {"reduction": "sum", "backend": backend}
    judge((32, 8, 150), torch.bfloat16, options, scale=0.125)


def _compare_predictions(backend: str) -> None:
    x, matrix, _, targets = inputs(4, 4, 8, ignored=0)
    matrix[1] = matrix[6] = 10 * matrix[6].abs()
    for best in (1, 6):
        _, stats = fastlm.linear_cross_entropy(
            x.abs(), matrix[part(8)], targets, process_group=dist.group.WORLD, return_stats=True,
            backend=backend,
        )  # fmt: skip
        assert (stats.predictions == best).all()
        matrix[1] = 0.0


def _compare_ragged(backend: str) -> None:
    """Three ranks and four classes: two, two, none.  Every logit is far below zero."""
    x, matrix, _, targets = inputs(6, 4, 4, torch.float64)
    x, matrix, here = 300 * (x - 3), matrix.abs(), part(4)

    def sharded(x: Tensor, shard: Tensor) -> tuple[Tensor, ...]:
        whole = distributed(shard, 4)
        return linear(x, whole, None, targets, label_smoothing=0.1, backend=backend)

    want = testing.run(linear, x, matrix, None, targets, label_smoothing=0.1, backend="torch")
    want[-1] = want[-1][here]
    torch.testing.assert_close(testing.run(sharded, x, matrix[here]), want)


def _disagree(backend: str) -> None:
    x, matrix, _, targets = inputs(4, 4, 8, ignored=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastlm.ops._shards._check_agreement", lambda *args: None)
        (loss,) = by_group(x, matrix[: 4 + dist.get_rank()], None, targets % 4, backend=backend)
        assert loss.isnan()


def _on_ranks(backend: str) -> Callable[[], None]:
    cases = [(2, _compare), (2, _compare_predictions), (3, _compare_ragged)]
    if backend != "reference":  # which is for CPU, where ranks are asked first
        cases.append((2, _disagree))

    def check() -> None:
        for count, case in cases:
            ranks = Ranks(count)
            try:
                ranks.run(case, backend)
            finally:
                ranks.close()

    return check


CHECKS = {backend: _on_ranks(backend) for backend in ("torch", "triton", "reference")}
PLANTED = [
    *(pytest.param(mutant, "torch", id=str(mutant)) for mutant in [*SHARED, *TORCH]),
    *(pytest.param(mutant, "triton", id=str(mutant)) for mutant in TRITON),
    *(pytest.param(mutant, "reference", id=str(mutant)) for mutant in DEFINITION),
]


@interpreted_only
@pytest.mark.slow
@pytest.mark.parametrize(("mutant", "backend"), PLANTED)
def test_a_planted_bug_is_noticed(mutant, backend):
    assert killed(mutant, CHECKS[backend])


@interpreted_only
@pytest.mark.slow
def test_a_changed_comment_is_not():
    comment = Mutant("a comment", SHARDS, "# nothing but -inf: NaN, as in torch", "# NaN")
    assert not killed(comment, CHECKS["torch"])
