"""linear_top_k on every backend: its values, its classes, its edges, its refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.interpreter import interpreted_only
from support.layouts import layouts
from support.linear_top_k import OPTIONS, all_logprobs, forced, integers, judge, layer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm
from fastlm.kernels import linear_top_k as kernels
from fastlm.kernels.linear_top_k import tuning

BACKENDS = ["triton", "torch", "reference"]
FAST = ["triton", "torch"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "options"])
def test_are_the_largest_of_all(options, dtype, backend, device):
    x, weight, bias = layer(3, 5, 70, dtype, device)
    with forced(rows=2):
        judge(x.view(3, 1, 5), weight, bias if options else None, 4, backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab_size", [1, 3, 4, 5, 11, 12, 13])
def test_any_k_of_any_vocabulary(vocab_size, backend, device):
    x, weight, bias = layer(1, 4, vocab_size, device=device)
    with forced(block_v=4):
        every = judge(x, weight, bias, vocab_size, backend=backend)
        for k in {1, vocab_size // 2 + 1}:
            fewer = fastlm.linear_top_k(x, weight, k, linear_bias=bias, backend=backend)
            assert torch.equal(fewer.logprobs, every.logprobs[:, :k])
            assert torch.equal(fewer.indices, every.indices[:, :k])


@pytest.mark.parametrize("vocab_size", [300, 3_000, 70_000])
def test_rows_of_the_tuning_table(vocab_size, device):
    judge(*layer(1, 4, vocab_size, device=device), 12, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_position_without_leading_dimensions(backend, device):
    x, weight, bias = layer(1, 4, 20, device=device)
    judge(x[0], weight, bias, 3, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, -2.0])
def test_of_equals_the_kernel_names_the_lowest_class_first(scale, dtype, device):
    x, weight = integers(2, 3, 90, dtype, device)
    logits = scale * (x @ weight.t()).float()
    want = logits.sort(dim=-1, descending=True, stable=True).indices
    for block_v, block_lane in ((16, 2), (32, 4)):
        with forced(block_v=block_v, block_lane=block_lane):
            got = fastlm.linear_top_k(x, weight, 6, logit_scale=scale, backend="triton")
        assert torch.equal(got.indices, want[:, :6])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_of_zero_makes_all_classes_equal(backend, device):
    x, weight, bias = layer(1, 4, 40, device=device)
    with forced():
        top = judge(x, weight, bias, 9, backend=backend, logit_scale=0.0)
    torch.testing.assert_close(top.logprobs, torch.full_like(top.logprobs, -math.log(40)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_impossible_classes_come_last(backend, device):
    x, weight, bias = layer(1, 4, 20, device=device)
    bias[::2] = -torch.inf
    with forced(block_v=8):
        top = judge(x, weight, bias, 20, backend=backend)
    assert top.logprobs[:, :10].isfinite().all()
    assert top.logprobs[:, 10:].isneginf().all()


NOT_FINITE = {
    "a NaN": {7: torch.nan},
    "the last a NaN": {11: torch.nan},
    "a negative NaN": {7: -torch.tensor(torch.nan)},
    "an infinity": {0: torch.inf},
    "two infinities": {3: torch.inf, 10: torch.inf},
    "a NaN and an infinity": {3: torch.inf, 10: torch.nan},
    "nothing but -inf": dict.fromkeys(range(12), -torch.inf),
    "nothing but NaN": dict.fromkeys(range(12), torch.nan),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("values", NOT_FINITE.values(), ids=NOT_FINITE.keys())
@pytest.mark.parametrize("k", [1, 12])
def test_a_row_without_a_distribution_is_nan_and_names_classes(k, values, backend, device):
    x, weight, bias = layer(1, 4, 12, device=device)
    for place, value in values.items():
        bias[place] = value
    with forced(block_v=4), fastlm.checked():
        top = fastlm.linear_top_k(x, weight, k, linear_bias=bias, backend=backend)
    assert top.logprobs.isnan().all()
    assert all_logprobs(x, weight, bias, torch.float32).isnan().all()
    assert top.indices.min() >= 0
    assert top.indices.max() < 12
    assert top.indices.sort(-1).values.diff(dim=-1).gt(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_a_softcap_makes_infinities_finite(scale, backend, device):
    x, weight, bias = layer(2, 4, 12, device=device)
    bias[3], bias[5] = torch.inf, -torch.inf
    with forced(block_v=4):
        top = judge(x, weight, bias, 3, backend=backend, softcap=2.0, logit_scale=scale)
    assert top.logprobs.isfinite().all()
    assert top.indices[:, 0].eq(3 if scale > 0 else 5).all()


@pytest.mark.parametrize("backend", FAST)
def test_a_row_that_is_nan_leaves_the_others_alone(backend, device):
    x, weight, bias = layer(3, 4, 40, device=device)
    want = fastlm.linear_top_k(x, weight, 3, linear_bias=bias, backend=backend)
    x[1] = torch.nan
    got = fastlm.linear_top_k(x, weight, 3, linear_bias=bias, backend=backend)
    kept = [0, 2]
    assert torch.equal(got.logprobs[kept], want.logprobs[kept])
    assert torch.equal(got.indices[kept], want.indices[kept])
    assert got.logprobs[1].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4)])
def test_no_positions(shape, backend, device):
    x, weight = torch.randn(shape, device=device), torch.randn(7, 4, device=device)
    with fastlm.checked():
        top = fastlm.linear_top_k(x, weight, 3, backend=backend)
    assert top.logprobs.shape == top.indices.shape == (*shape[:-1], 3)


@pytest.mark.parametrize("backend", FAST)
def test_any_layout_gives_the_same_bits(backend, device):
    # integers: a product in another order is the same
    x, weight = integers(3, 5, 40, torch.bfloat16, device)
    x, bias = x.view(1, 3, 5), weight[:, 0].contiguous()
    cases: list[tuple[Any, ...]] = [(view, weight, bias) for _, view in layouts(x)]
    cases += [(x, view, bias) for _, view in layouts(weight)]
    cases += [(x, weight, view) for _, view in layouts(bias)]
    with forced(rows=2):
        results = [
            fastlm.linear_top_k(a, b, 1, linear_bias=c, logit_scale=0.3, backend=backend)
            for a, b, c in cases
        ]
    for got in results[1:]:
        assert torch.equal(got.logprobs, results[0].logprobs)
        assert torch.equal(got.indices, results[0].indices)


@pytest.mark.parametrize("backend", FAST)
def test_has_no_gradient_and_leaves_its_inputs_as_they_were(backend, device):
    tensors = layer(4, 5, 40, device=device)
    copies = [t.clone() for t in tensors]
    x, weight, bias = (t.requires_grad_() for t in tensors)
    top = fastlm.linear_top_k(x, weight, 3, linear_bias=bias, **OPTIONS, backend=backend)
    assert not top.logprobs.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_passes_its_own_check_where_one_class_is_all_but_certain(backend, device):
    x, weight, bias = layer(3, 8, 200, device=device)
    bias[7] = 64.0
    with fastlm.checked():
        fastlm.linear_top_k(x, weight / 10, 1, linear_bias=bias, backend=backend)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for out in result if isinstance(result, tuple | list) else (result,):
            if isinstance(out, Tensor) and not out._is_view():
                self.elements = max(self.elements, out.numel())
        return result


@pytest.mark.parametrize("backend", FAST)
def test_never_holds_the_logits(backend, device):
    x, weight, bias = layer(8, 2, 60, device=device)
    with forced(rows=3, block_v=64, block_lane=1), Largest() as seen:
        fastlm.linear_top_k(x, weight, 1, linear_bias=bias, backend=backend)
    assert 0 < seen.elements <= 3 * 60


@pytest.mark.parametrize("backend", FAST)
def test_autocast_rounds_what_linear_would_round(backend, device):
    x, weight, bias = layer(4, 5, 40, device=device)
    with torch.autocast(device, torch.bfloat16):
        got = fastlm.linear_top_k(x, weight, 3, linear_bias=bias, backend=backend)
    narrow = (t.bfloat16() for t in (x, weight))
    want = fastlm.linear_top_k(*narrow, 3, linear_bias=bias.bfloat16(), backend=backend)
    assert torch.equal(got.logprobs, want.logprobs)


@pytest.mark.parametrize("backend", FAST)
def test_compiled_is_equal_to_eager(backend, device):
    def call(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return fastlm.linear_top_k(x, weight, 2, linear_bias=bias, softcap=3.0, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    with forced():
        for rows in (2, 3):
            arguments = layer(rows, 4, 40, device=device)
            for got, want in zip(compiled(*arguments), call(*arguments), strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize("backend", FAST)
def test_is_an_operator_as_torch_expects(backend, device):
    operator = torch.ops.fastlm.linear_top_k_forward.default
    x, weight, bias = layer(2, 5, 20, device=device)
    with forced():
        for added in (bias, None):
            torch.library.opcheck(operator, (x, weight, added, 1, None, 1.0, "", 20, backend))


@interpreted_only
def test_auto_on_cpu_is_torch_and_says_why():
    x, weight, _ = layer(2, 4, 200)
    choice = fastlm.explain("linear_top_k", x, weight, 3).steps["forward"]
    assert choice.backend == "torch"
    assert choice.refusals == {"triton": "tensors are on cpu; auto runs kernels on CUDA only"}


def test_a_k_too_large_for_the_kernel_is_refused_by_it_alone(device):
    x, weight, _ = layer(2, 4, 200, device=device)
    judge(x, weight, None, 129, backend="torch")
    choice = fastlm.explain("linear_top_k", x, weight, 129, backend="triton").steps["forward"]
    assert choice.refusals == {"triton": "k must be at most 128, got 129"}
    with pytest.raises(NotImplementedError, match="triton refused: k must be at most 128, got 129"):
        fastlm.linear_top_k(x, weight, 129, backend="triton")
    assert f"(k up to {tuning.MOST_ASKED})" in (fastlm.linear_top_k.__doc__ or "")


def test_refuses_more_classes_than_it_can_count():
    x, weight = (torch.empty(n, 1, device="meta") for n in (1, 2**30 + 1))
    refusal = kernels.forward_refuses(x, weight, None, 1, None, 1.0, "", 2**30 + 1)
    assert refusal == "linear_weight must have at most 1073741824 classes, got 1073741825"


@pytest.mark.parametrize("k", [0, -1, 6])
def test_refuses_a_k_out_of_range(k):
    with pytest.raises(ValueError, match=rf"linear_top_k: k must be in \[1, 5\], got {k}"):
        fastlm.linear_top_k(torch.zeros(3, 2), torch.zeros(5, 2), k)


@pytest.mark.parametrize("k", [2.0, True])
def test_refuses_a_k_that_is_no_integer(k):
    message = f"linear_top_k: k must be an integer, got {type(k).__name__}"
    with pytest.raises(TypeError, match=message):
        fastlm.linear_top_k(torch.zeros(3, 2), torch.zeros(5, 2), k)
