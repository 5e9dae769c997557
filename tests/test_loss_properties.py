"""What must hold of the losses whatever the numbers and the options are.

A case is changed in a way that its result can be traced through, and the traced result is held to
that of the case as it was: in float64 to the result itself, in lower precision by the tolerance
rule to the float64 truth.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.linear_cross_entropy import forced, inputs
from support.losses import OPTIONS, definition, flattened, linear_definition, weights
from torch import Tensor

import fastlm
from fastlm.kernels.cross_entropy import tuning
from fastlm.testing import assert_all_as_accurate, cross_entropy_inputs

WIDTH = 5
DTYPES = [torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    """A call of a loss, and the gradients that come in.

    Attributes:
        leaves: Logits, or input, matrix and bias of a layer.
        weight: Of the classes, where the options ask for it.
        upstream: One for the loss, and for log-probabilities, lse and entropy where they are asked.
        chunk: Rows of a chunk, also of a block of the torch backend.
        block_v: Columns of a block of the triton backend.
    """

    leaves: tuple[Tensor, ...]
    targets: Tensor
    weight: Tensor
    options: dict[str, Any]
    upstream: tuple[Tensor, ...]
    backend: str
    chunk: int
    block_v: int

    @property
    def vocab_size(self) -> int:
        return len(self.weight)

    @property
    def is_layer(self) -> bool:
        return len(self.leaves) == 3

    @property
    def per_row(self) -> list[bool]:
        """Which results have a value for each row."""
        outputs = [self.options["reduction"] == "none"] + [True] * (len(self.upstream) - 1)
        return [*outputs, *(leaf is self.leaves[0] for leaf in self.leaves)]

    def results(self) -> list[Tensor]:
        """Outputs and gradients of ours."""
        options = dict(self.options, backend=self.backend)
        if "weight" in options:
            options["weight"] = self.weight

        def ours(*leaves: Tensor) -> tuple[Tensor, ...]:
            if not self.is_layer:
                return flattened(fastlm.cross_entropy(*leaves, self.targets, **options))
            x, matrix, bias = leaves
            return flattened(
                fastlm.linear_cross_entropy(x, matrix, self.targets, linear_bias=bias, **options)
            )

        with forced(rows=self.chunk, block_v=self.block_v), self._blocks():
            return self._run(ours, self.leaves[0].dtype)

    def by_torch(self, dtype: torch.dtype) -> list[Tensor]:
        """The same by torch's own operators."""
        function = linear_definition if self.is_layer else definition
        return self._run(lambda *leaves: function(*leaves, self.targets, **self.options), dtype)

    def _run(self, function: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype) -> list[Tensor]:
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in self.leaves]
        outputs = function(*leaves)
        upstream = [d.to(x.dtype) for d, x in zip(self.upstream, outputs, strict=True)]
        gradients = torch.autograd.grad(outputs, leaves, upstream)
        return [x.detach() for x in (*outputs, *gradients)]

    @contextlib.contextmanager
    def _blocks(self) -> Iterator[None]:
        """Of cross_entropy, on both backends."""
        plan = tuning.Plan(block_v=self.block_v, num_warps=1)
        elements = self.chunk * self.vocab_size
        with (
            mock.patch.object(tuning, "plan", lambda step, vocab_size, **kwargs: plan),
            mock.patch("fastlm.ops.eager._losses._CPU_BLOCK", elements),
        ):
            yield


@st.composite
def cases(
    draw: st.DrawFn,
    without: tuple[str, ...] = (),
    dtypes: Any = DTYPES,
    kinds: tuple[str, ...] = ("layer", "logits"),
    fewest_rows: int = 8,
) -> dict[str, Any]:
    """What a case is made from; ``without`` names options it must not have.

    ``fewest_rows`` is for what the tolerance rule judges: of a handful of numbers it says little.
    """
    dtype = draw(st.sampled_from(dtypes))
    is_wide = dtype == torch.float64
    given = {name: draw(st.booleans()) for name in OPTIONS if name != "reduction"}
    # one sum of a few rows shows the luck of its roundings
    reductions = ["none", "mean", "sum"] if is_wide else ["none"]
    return dict(
        kind=draw(st.sampled_from(kinds)),
        backend=draw(st.sampled_from(["triton", "torch"])),
        dtype=dtype,
        names=[name for name, is_given in given.items() if is_given and name not in without],
        reduction=draw(st.sampled_from(reductions)),
        rows=draw(st.integers(2, 10) if is_wide else st.integers(fewest_rows, fewest_rows + 2)),
        vocab_size=draw(st.integers(2 if is_wide else 8, 36)),
        chunk=draw(st.integers(3, 10)),
        seed=draw(st.integers(0, 2**20)),
    )


def made(drawn: dict[str, Any], device: str) -> Case:
    dtype, vocab_size, seed = drawn["dtype"], drawn["vocab_size"], drawn["seed"]
    options = {name: OPTIONS[name] for name in drawn["names"]}
    options["reduction"] = drawn["reduction"]
    if drawn["kind"] == "layer":
        shape = (drawn["rows"], WIDTH, vocab_size)
        *leaves, targets = inputs(*shape, dtype, device, seed=seed)
    else:
        shape = (drawn["rows"], vocab_size)
        *leaves, targets = cross_entropy_inputs(*shape, dtype, device, seed=seed)
        targets[0] = vocab_size - 1
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(len(targets), generator=generator, dtype=torch.float64)] * 4
    upstream = [x.roll(shift).to(device) for shift, x in enumerate(upstream)]
    if options["reduction"] != "none":
        upstream[0] = upstream[0][0]
    if "return_stats" not in options:
        upstream = upstream[:1]
    weight = weights(vocab_size, device).to(torch.promote_types(dtype, torch.float32))
    return Case(
        tuple(leaves), targets, weight, options, tuple(upstream),
        drawn["backend"], drawn["chunk"], block_v=16,
    )  # fmt: skip


def judge(
    actual: list[Tensor], case: Case, *, torch_case: Case | None = None, expected: Any = None
) -> None:
    """Hold ``actual`` to the results of ``case``, or to ``expected`` made of them.

    In low precision torch may lose as much on ``torch_case``, the changed one where that is harder.
    """
    expected = expected or (lambda results: results)
    if case.leaves[0].dtype == torch.float64:
        torch.testing.assert_close(actual, expected(case.results()))
        return
    plain = (torch_case or case).by_torch(torch.float32)
    if torch_case is None:
        plain = expected(plain)
    truth = expected(case.by_torch(torch.float64))
    assert_all_as_accurate(str(case.options), actual, plain=plain, truth=truth)


def each_row(case: Case, results: list[Tensor], index: Tensor) -> list[Tensor]:
    return [x[index] if rows else x for x, rows in zip(results, case.per_row, strict=True)]


# The properties


def check_rows_may_be_permuted(case: Case) -> None:
    order = torch.randperm(len(case.targets)).to(case.targets)
    first, *others = case.leaves
    is_per_row = case.per_row
    changed = replace(
        case,
        leaves=(first[order], *others),
        targets=case.targets[order],
        upstream=tuple(
            x[order] if rows else x for x, rows in zip(case.upstream, is_per_row, strict=False)
        ),
    )
    judge(each_row(changed, changed.results(), order.argsort()), case)


def check_classes_may_be_permuted(case: Case) -> None:
    order = torch.randperm(case.vocab_size).to(case.targets)
    back = order.argsort()
    if case.is_layer:
        x, matrix, bias = case.leaves
        leaves = (x, matrix[order], bias[order])
    else:
        leaves = (case.leaves[0][:, order],)
    targets = torch.where(case.targets < 0, case.targets, back[case.targets.clamp(min=0)])
    changed = replace(case, leaves=leaves, targets=targets, weight=case.weight[order])
    results = changed.results()
    if case.is_layer:
        results[-2:] = [gradient[back] for gradient in results[-2:]]
    else:
        results[-1] = results[-1][:, back]
    judge(results, case)


def check_ignored_rows_change_nothing(case: Case) -> None:
    rows = len(case.targets)
    total = rows + case.chunk
    kept = torch.randperm(total)[:rows].sort().values.to(case.targets)

    def padded(x: Tensor, value: float) -> Tensor:
        return x.new_full((total, *x.shape[1:]), value).index_copy(0, kept, x)

    first, *others = case.leaves
    changed = replace(
        case,
        leaves=(padded(first, 30.0), *others),
        targets=padded(case.targets, -100),
        upstream=tuple(
            padded(x, 7.0) if is_per_row else x
            for x, is_per_row in zip(case.upstream, case.per_row, strict=False)
        ),
    )
    results = changed.results()
    added = torch.ones(total, dtype=torch.bool, device=kept.device).index_fill(0, kept, False)
    for x, is_per_row in zip(results, case.per_row, strict=True):
        assert not is_per_row or not x[added].any()
    judge(each_row(changed, results, kept), case)


def check_chunks_and_blocks_change_nothing(case: Case) -> None:
    rows = len(case.targets)
    chunk, block_v = (2, 64) if case.chunk % 2 else (rows, 8)
    judge(replace(case, chunk=chunk, block_v=block_v).results(), case)


def check_a_constant_may_be_added_to_a_row(case: Case) -> None:
    by = torch.randint(-64, 65, (len(case.targets),)).to(case.targets)
    # multiples of 2^-10, which the sum keeps exactly
    logits = (case.leaves[0] * 1024).round() / 1024
    case = replace(case, leaves=(logits,))
    changed = replace(case, leaves=(logits + by[:, None].to(logits.dtype),))

    def expected(results: list[Tensor]) -> list[Tensor]:
        if "return_stats" in case.options:
            rise = by.double() * case.options.get("logit_scale", 1.0) * (case.targets != -100)
            results[2] = results[2] + rise
        return results

    judge(changed.results(), case, torch_case=changed, expected=expected)


def check_gradients_of_a_row_sum_to_that_of_its_lse(case: Case) -> None:
    """To zero where nothing depends on the lse, which alone rises with all logits."""
    options, count = case.options, (case.targets != -100).sum()
    results = case.results()
    of_lse = torch.zeros_like(case.weight[:1]).expand(len(case.targets))
    if "z_loss" in options:
        with_lse = replace(
            case, options={**options, "return_stats": True}, upstream=(case.upstream[0],) * 4
        )
        upstream = tuple(x.expand(len(case.targets)) for x in with_lse.upstream[1:])
        lse = replace(with_lse, upstream=(case.upstream[0], *upstream)).results()[2]
        share = count if options["reduction"] == "mean" else 1
        of_lse = of_lse + 2 * options["z_loss"] * lse * case.upstream[0] / share
    if "return_stats" in options:
        of_lse = of_lse + case.upstream[2]
    of_lse = of_lse * options.get("logit_scale", 1.0) * (case.targets != -100)
    if case.is_layer:
        of_matrix, of_bias = (gradient.sum(0) for gradient in results[-2:])
        torch.testing.assert_close(of_bias, of_lse.sum())
        torch.testing.assert_close(of_matrix, of_lse @ case.leaves[0])
        return
    torch.testing.assert_close(results[-1].sum(-1), of_lse)


ANY = cases()
IN_FLOAT64 = cases(("softcap",), [torch.float64])
INVARIANT = cases(
    ("softcap", "z_loss"), [torch.float64, torch.float32], kinds=("logits",), fewest_rows=32
)
PROPERTIES = {
    "rows may be permuted": (check_rows_may_be_permuted, ANY),
    "classes may be permuted": (check_classes_may_be_permuted, ANY),
    "ignored rows change nothing": (check_ignored_rows_change_nothing, ANY),
    "chunks and blocks change nothing": (check_chunks_and_blocks_change_nothing, ANY),
    "gradients of a row sum to that of its lse": (
        check_gradients_of_a_row_sum_to_that_of_its_lse,
        IN_FLOAT64,
    ),
    "a constant may be added to a row": (check_a_constant_may_be_added_to_a_row, INVARIANT),
}
FUZZ = dict(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)


def check_one(name: str, data: st.DataObject, device: str) -> None:
    check, strategy = PROPERTIES[name]
    drawn = data.draw(strategy)
    torch.manual_seed(drawn["seed"])
    check(made(drawn, device))


@pytest.mark.parametrize("name", PROPERTIES)
@given(data=st.data())
@settings(max_examples=12, **FUZZ)
def test_property(name, data, device):
    check_one(name, data, device)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROPERTIES)
@given(data=st.data())
@settings(max_examples=200, **FUZZ)
def test_property_two_hundred_times(name, data, device):
    check_one(name, data, device)
