"""The options of the two losses: each alone, in pairs, and their statistics."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.cross_entropy import force_tiny_blocks
from support.linear_cross_entropy import forced, inputs
from support.losses import (
    OPTIONS,
    definition,
    flattened,
    judge,
    linear,
    linear_definition,
    ours,
    weights,
)
from torch import Tensor

import fastlm
from fastlm import testing
from fastlm.testing import cross_entropy_inputs

BACKENDS = ["triton", "cuda", "torch", "reference"]
FAST = ["triton", "cuda", "torch"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCAB_SIZE = 35


PAIRS = [dict([a, b]) for a, b in itertools.combinations(OPTIONS.items(), 2)]
ALONE = [{name: value} for name, value in OPTIONS.items()]
# without a statistic that has a gradient, the gradients are computed beside the loss
LOSS_ALONE = {name: value for name, value in OPTIONS.items() if name != "return_stats"}
REDUCED = [{**case, "reduction": r} for case in (OPTIONS, LOSS_ALONE) for r in ("mean", "sum")]
CASES = [*ALONE, *PAIRS, OPTIONS, LOSS_ALONE, *REDUCED]


def named(case: dict[str, Any]) -> str:
    return "-".join(case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=named)
def test_cross_entropy_with_every_pair_of_options(case, backend, device, monkeypatch):
    force_tiny_blocks(monkeypatch)
    dtype = DTYPES[len(named(case)) % 3]
    arguments = cross_entropy_inputs(12, VOCAB_SIZE, dtype, device)
    judge(ours, definition, arguments, backend, case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=named)
def test_linear_cross_entropy_with_every_pair_of_options(case, backend, device):
    x, matrix, bias, targets = inputs(12, 6, VOCAB_SIZE, device=device)
    # with a bias the losses are computed apart from the gradient; a row of 35 may be one block
    for added, block_v in ((bias, 16), (None, 16), (None, 64))[: 3 if backend == "triton" else 1]:
        with forced(rows=8, block_v=block_v):
            judge(linear, linear_definition, (x, matrix, added, targets), backend, case)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("vocab_size", [41, 150])
def test_linear_cross_entropy_of_narrow_inputs_with_all_options(
    vocab_size, reduction, dtype, backend, device
):
    with forced(rows=14, block_v=64):
        arguments = inputs(24, 8, vocab_size, dtype, device)
        options = {**OPTIONS, "reduction": reduction}
        judge(linear, linear_definition, arguments, backend, options)


EXTREME = {
    "weights far from one": {"weight": torch.tensor([1e4, 1e-3, 3.0, 50.0]).repeat(40)},
    "a large scale": {"logit_scale": 40.0},
    "a large z-loss": {"z_loss": 10.0},
}


@pytest.mark.parametrize("options", EXTREME.values(), ids=EXTREME.keys())
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_float16_gradients_of_logits_do_not_overflow(reduction, options, device):
    x, matrix, _, targets = inputs(12, 8, 160, torch.float16, device)
    options = {name: v.to(device) if name == "weight" else v for name, v in options.items()}

    def run(**more: Any) -> list[Tensor | None]:
        def function(x: Tensor, matrix: Tensor) -> Tensor:
            loss = fastlm.linear_cross_entropy(
                x, matrix, targets, **options, reduction=reduction, **more
            )
            return loss.sum() * 1e-3

        dtype = torch.float64 if more["backend"] == "reference" else None
        return testing.run(function, x, matrix / 8, dtype=dtype)

    with forced(rows=8, block_v=64):
        actual, truth = run(backend="triton"), run(backend="reference")
    for got, want in zip(actual, truth, strict=True):
        assert got is not None
        assert got.isfinite().all()
        assert (got.double() - want).norm() <= 2e-3 * want.norm()


# Statistics


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["logits", "linear"])
def test_predictions_are_the_first_of_the_largest(kind, backend, device, monkeypatch):
    force_tiny_blocks(monkeypatch)
    logits = torch.zeros(5, VOCAB_SIZE, device=device)
    logits[1, 34] = logits[2, 3] = logits[2, 30] = 2.0
    logits[3] = -torch.inf
    logits[3, 33] = 0.0
    targets = torch.tensor([1, 2, 3, 33, -100], device=device)
    with forced(rows=2, block_v=16):
        if kind == "logits":
            _, stats = fastlm.cross_entropy(logits, targets, return_stats=True, backend=backend)
        else:
            eye = torch.eye(5, device=device)
            _, stats = fastlm.linear_cross_entropy(
                eye, logits.t().contiguous().clamp(min=-1e30), targets,
                return_stats=True, backend=backend,
            )  # fmt: skip
    assert stats.predictions.tolist() == [0, 34, 3, 33, -1]
    assert stats.num_items.item() == 4
    assert stats.lse[4] == stats.entropy[4] == stats.logprobs[4] == 0
    assert stats.entropy[3] == stats.logprobs[3] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_entropy_with_impossible_classes_is_finite_and_so_is_its_gradient(backend, device):
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf, 200.0, 3.0]] * 2, device=device)
    logits[1, 4] = 0.5
    targets = torch.zeros(2, dtype=torch.int64, device=device)

    def entropy(x: Tensor) -> Tensor:
        return fastlm.cross_entropy(x, targets, return_stats=True, backend=backend)[1].entropy

    def expected(x: Tensor) -> Tensor:
        return torch.special.entr(x.softmax(-1)).sum(-1)

    possible = [0, 2, 4, 5]
    got, gradient = testing.run(entropy, logits)
    want, want_gradient = testing.run(expected, logits[:, possible], dtype=torch.float64)
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradient[:, possible].double(), want_gradient, atol=1e-6, rtol=1e-5)
    assert gradient[:, [1, 3]].eq(0).all()


@pytest.mark.parametrize("backend", FAST)
def test_a_statistic_alone_may_have_a_gradient(backend, device):
    for name in ("logprobs", "lse", "entropy"):
        for reduction in ("mean", "none"):
            x, matrix, bias, targets = inputs(6, 4, 20, torch.float64, device)

            def one(x, matrix, bias, targets=targets, name=name, reduction=reduction, **options):
                _, stats = fastlm.linear_cross_entropy(
                    x, matrix, targets, linear_bias=bias, reduction=reduction,
                    return_stats=True, **options,
                )  # fmt: skip
                return getattr(stats, name)

            actual = testing.run(one, x, matrix, bias, backend=backend)
            expected = testing.run(one, x, matrix, bias, backend="reference")
            torch.testing.assert_close(actual, expected)
            assert all(gradient.norm() > 0 for gradient in actual[1:])


@pytest.mark.parametrize("backend", FAST)
def test_logprobs_are_those_of_the_targets(backend, device):
    x, matrix, bias, targets = inputs(6, 4, 20, device=device)
    logprobs = fastlm.linear_logprobs(x, matrix, targets, linear_bias=bias, backend=backend)
    every = F.linear(x, matrix, bias).log_softmax(-1)
    expected = every.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    expected = expected.masked_fill(targets == -100, 0.0)
    torch.testing.assert_close(logprobs, expected)
    shifted = fastlm.linear_logprobs(x, matrix, targets, shift=1, backend=backend)
    torch.testing.assert_close(
        shifted, fastlm.linear_logprobs(x[:-1], matrix, targets[1:], backend=backend)
    )


# Through the real kernels in float64


ALL = {"label_smoothing": 0.1, "softcap": 3.0, "logit_scale": 0.7, "z_loss": 0.1}


def test_gradcheck_of_everything_cross_entropy_returns(device, monkeypatch):
    force_tiny_blocks(monkeypatch)
    logits, targets = cross_entropy_inputs(2, 35, torch.float64, device, ignored=0)
    weight = weights(35, device).double()

    def everything(x: Tensor) -> tuple[Tensor, ...]:
        return flattened(
            fastlm.cross_entropy(
                x, targets, weight, **ALL, return_stats=True, reduction="none", backend="triton"
            )
        )

    leaf = logits.requires_grad_()
    assert torch.autograd.gradcheck(everything, leaf, nondet_tol=0, fast_mode=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_of_everything_linear_cross_entropy_returns(reduction, device):
    x, matrix, bias, targets = inputs(3, 2, 11, torch.float64, device)
    weight = weights(11, device).double()

    def everything(*params: Tensor) -> tuple[Tensor, ...]:
        x, matrix, bias = params
        return flattened(
            fastlm.linear_cross_entropy(
                x, matrix, targets, linear_bias=bias, weight=weight, **ALL,
                return_stats=True, reduction=reduction, backend="triton",
            )
        )  # fmt: skip

    leaves = [t.requires_grad_() for t in (x, matrix, bias)]
    with forced(rows=2, block_v=4):
        assert torch.autograd.gradcheck(everything, leaves, nondet_tol=0, fast_mode=True)


# Refusals


@pytest.mark.parametrize("change, error, message", [
    (dict(weight=torch.ones(4)), ValueError, r"weight must have shape \(5,\)"),
    (dict(weight=torch.ones(5, dtype=torch.int64)), TypeError, "weight must be one of float32"),
    (dict(weight=[1.0] * 5), TypeError, "weight must be a tensor, got list"),
    (dict(weight=torch.ones(5, requires_grad=True)), ValueError,
     "weight must not require a gradient"),
    (dict(label_smoothing=1.5), ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    (dict(label_smoothing=float("nan")), ValueError, r"label_smoothing must be in \[0, 1\]"),
    (dict(softcap=0.0), ValueError, "softcap must be positive, or None, got 0.0"),
    (dict(softcap=-1.0), ValueError, "softcap must be positive"),
    (dict(z_loss=-1e-4), ValueError, "z_loss must be at least 0"),
    (dict(logit_scale=float("inf")), ValueError, "logit_scale must be finite, got inf"),
    (dict(logit_scale=torch.tensor(2.0)), TypeError, "logit_scale must be a number, got Tensor"),
    (dict(softcap="3"), TypeError, "softcap must be a number, got str"),
    (dict(label_smoothing=None), TypeError, "label_smoothing must be a number, got NoneType"),
    (dict(z_loss=1j), TypeError, "z_loss must be a number, got complex"),
])  # fmt: skip
def test_refuses(change, error, message):
    targets = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(error, match=f"^cross_entropy: {message}"):
        fastlm.cross_entropy(torch.zeros(3, 5), targets, **change)
    with pytest.raises(error, match=f"^linear_cross_entropy: {message}"):
        fastlm.linear_cross_entropy(torch.zeros(3, 2), torch.zeros(5, 2), targets, **change)


@pytest.mark.parametrize(
    "name, value", [("num_items", 2.5), ("shift", 1.5), ("shift", "1"), ("shift", True)]
)
def test_refuses_what_is_no_integer(name, value):
    x, matrix, targets = torch.zeros(3, 2), torch.zeros(5, 2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(TypeError, match=f"linear_cross_entropy: {name} must be an integer"):
        fastlm.linear_cross_entropy(x, matrix, targets, **{name: value})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [-1e9, torch.finfo(torch.float32).min, -torch.inf])
@pytest.mark.parametrize("weight_of_target", [0.0, 1.0])
def test_a_masked_target_swallows_no_other_class(weight_of_target, masked, backend, device):
    logits = torch.randn(1, 100, device=device)
    logits[0, 3] = masked
    weight = torch.ones(100, device=device)
    weight[3] = weight_of_target
    options = {"label_smoothing": 0.1, "reduction": "sum"}
    target = torch.tensor([3], device=device)
    expected = F.cross_entropy(logits, target, weight, **options)
    loss = fastlm.cross_entropy(logits, target, weight, **options, backend=backend)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    eye = torch.ones(1, 1, device=device)
    loss = fastlm.linear_cross_entropy(
        eye, logits.t().contiguous(), target, weight=weight, **options, backend=backend
    )
    torch.testing.assert_close(loss, expected, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prediction_is_a_class_even_of_nothing_but_nan(backend, device):
    logits = torch.full((2, 5), torch.nan, device=device)
    targets = torch.tensor([0, 1], device=device)
    _, stats = fastlm.cross_entropy(logits, targets, return_stats=True, backend=backend)
    assert all(0 <= prediction < 5 for prediction in stats.predictions.tolist())
    _, stats = fastlm.linear_cross_entropy(
        logits, torch.ones(7, 5, device=device), targets, return_stats=True, backend=backend
    )
    assert all(0 <= prediction < 7 for prediction in stats.predictions.tolist())


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_of_no_rows_keep_their_shape(backend, device):
    x, matrix = torch.randn(3, 0, 4, device=device), torch.randn(7, 4, device=device)
    targets = torch.zeros(3, 0, dtype=torch.int64, device=device)
    with fastlm.checked():
        for _, stats in (
            fastlm.cross_entropy(x, targets, return_stats=True, backend=backend),
            fastlm.linear_cross_entropy(x, matrix, targets, return_stats=True, backend=backend),
        ):
            assert all(value.shape == (3, 0) for value in stats[:4])
        fastlm.cross_entropy(x, targets, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_zero_give_what_they_give_in_torch(backend, device):
    x, matrix, _, targets = inputs(4, 3, 6, device=device, ignored=0)
    weight = torch.zeros(6, device=device)
    loss, *gradients = testing.run(
        fastlm.linear_cross_entropy, x, matrix, targets, weight=weight, backend=backend
    )
    assert loss.isnan()
    assert all(gradient.isnan().any() for gradient in gradients)


# Any combination


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    values = {name: draw(st.booleans()) for name in OPTIONS if name != "reduction"}
    return dict(
        options={name: OPTIONS[name] for name, given in values.items() if given}
        | {"reduction": draw(st.sampled_from(["mean", "sum", "none"]))},
        rows=draw(st.integers(1, 20)),
        vocab_size=draw(st.integers(1, 70)),
        chunk=draw(st.integers(1, 20)),
        seed=draw(st.integers(0, 2**20)),
    )


def check_problem(problem: dict[str, Any], device: str) -> None:
    x, matrix, bias, targets = inputs(
        problem["rows"], 5, problem["vocab_size"], torch.float64, device, seed=problem["seed"]
    )
    options = problem["options"]
    with forced(rows=problem["chunk"], block_v=16):
        actual = testing.run(linear, x, matrix, bias, targets, backend="triton", **options)
    expected = testing.run(linear_definition, x, matrix, bias, targets, **options)
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


FUZZ = dict(deadline=None, suppress_health_check=list(HealthCheck), database=None)


@given(problem=problems())
@settings(max_examples=12, derandomize=True, **FUZZ)
def test_any_combination(problem, device):
    check_problem(problem, device)


@pytest.mark.slow
@given(problem=problems())
@settings(max_examples=120, **FUZZ)
def test_many_combinations(problem, device):
    check_problem(problem, device)
