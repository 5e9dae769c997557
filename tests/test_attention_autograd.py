"""causal_attention under autograd, torch.library and torch.compile."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.attention import (
    assert_same_bits,
    backends,
    backward_arguments,
    blocks,
    forward_arguments,
    run,
    upstream,
    with_dtypes,
)
from torch import Tensor

import fastlm
from fastlm.ops import attention
from fastlm.testing import attention_inputs

ALL = ("triton", "torch", "reference")
BACKENDS = backends(*ALL)


@pytest.fixture(autouse=True)
def _small_blocks():
    with blocks(16, 16):
        yield


# in random directions first: all of the Jacobian takes a minute in the interpreter
@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
def test_gradients_are_those_of_the_function(device, backend, fast):
    # a GPU multiplies no less than 16 by 16
    block = 16 if device == "cuda" else 2
    sizes = (1, 2 * block + 1, 2 * block + 2, 2, 1, 2)
    inputs = attention_inputs(*sizes, torch.float64, device, value_dim=3)
    leaves = [x.requires_grad_() for x in inputs]

    def function(*inputs):
        return fastlm.causal_attention(*inputs, scale=0.8, return_lse=True, backend=backend)

    with blocks(block, block):
        assert torch.autograd.gradcheck(
            function, leaves, eps=1e-6, atol=1e-7, rtol=1e-5, nondet_tol=0.0, fast_mode=fast
        )


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *with_dtypes(*ALL, dtypes=(torch.float32, torch.bfloat16)),
        *with_dtypes("cuda", dtypes=(torch.bfloat16,)),
    ],
)
def test_operators_keep_the_rules_of_torch_library(device, backend, dtype):
    inputs = attention_inputs(1, 5, 7, 2, 1, 8, dtype, device, value_dim=4)
    forward = torch.ops.fastlm.causal_attention_forward.default
    backward = torch.ops.fastlm.causal_attention_backward.default
    sinks = torch.tensor([0.5, -1.0], device=device)
    packed = {"cu_seqlens_q": torch.tensor([0, 2, 4], dtype=torch.int32, device=device)}
    packed["cu_seqlens_k"] = packed["cu_seqlens_q"] + 1
    packed["cu_seqlens_k"][0] = 0
    padded = {"key_start": torch.tensor([1], dtype=torch.int32, device=device)}
    padded["key_end"] = padded["key_start"] + 4
    for needs, with_dlse, options in (
        ((True, True, False), True, {}),
        ((False, True, True), False, {"sinks": sinks, **packed}),
        ((True, False, True), True, {"sinks": sinks, "window_size": 2, "softcap": 2.0, **padded}),
    ):
        arguments = forward_arguments(*inputs, scale=0.3, **options)
        torch.library.opcheck(forward, (*arguments, backend))
        out, lse = forward(*arguments, backend)
        dlse = lse if with_dlse else None
        rest = backward_arguments(out, dlse, out, lse, *inputs, scale=0.3, **options)[:-3]
        torch.library.opcheck(backward, (*rest, *needs, backend))


@pytest.mark.parametrize("backend", backends("triton", "torch"))
def test_compiled_calls_give_the_same_bits(device, backend):
    def function(*inputs):
        out, lse = fastlm.causal_attention(*inputs, return_lse=True, backend=backend)
        return out * 2, lse + 1

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in ((1, 9, 9, 2, 1, 8), (2, 5, 12, 2, 2, 8), (1, 12, 5, 4, 2, 8)):
        results = []
        for call in (function, compiled):
            leaves = [x.requires_grad_() for x in attention_inputs(*sizes, device=device)]
            outputs = call(*leaves)
            grads = upstream(leaves[0], leaves[2])
            results.append((*outputs, *torch.autograd.grad(outputs, leaves, grads)))
        assert_same_bits(results[1], results[0])


@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_any_subset_of_gradients(device, backend, needs):
    inputs = attention_inputs(1, 18, 18, 2, 1, 8, device=device)
    expected = run(*inputs, backend=backend, dout=torch.ones_like(inputs[0]))
    leaves = [x.requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
    out = fastlm.causal_attention(*leaves, backend=backend)
    assert out.requires_grad == any(needs)
    if any(needs):
        out.sum().backward()  # a gradient of stride 0
    for x, need, grad in zip(leaves, needs, expected[2:], strict=True):
        assert (x.grad is not None) == need
        assert x.grad is None or torch.equal(x.grad, grad)


@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
def test_gradients_may_arrive_in_any_layout(device, backend):
    inputs = attention_inputs(2, 5, 5, 2, 1, 8, device=device)
    dout, dlse = upstream(inputs[0], inputs[2])
    expected = run(*inputs, backend=backend, dout=dout, dlse=dlse)
    for a, b in itertools.combinations(range(4), 2):
        strided = dout.transpose(a, b).contiguous().transpose(a, b)
        strided_lse = dlse.transpose(1, 2).contiguous().transpose(1, 2)
        got = run(*inputs, backend=backend, dout=strided, dlse=strided_lse)
        if backend in ("triton", "cuda"):
            assert_same_bits(got, expected)
        for a_result, b_result in zip(got, expected, strict=True):
            torch.testing.assert_close(a_result, b_result)


@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
def test_lse_alone_and_out_alone_have_gradients(device, backend):
    inputs = attention_inputs(1, 18, 18, 2, 1, 8, device=device)
    dout, dlse = upstream(inputs[0], inputs[2])
    leaves = [x.requires_grad_() for x in inputs]
    out, lse = fastlm.causal_attention(*leaves, return_lse=True, backend=backend)
    both = torch.autograd.grad((out, lse), leaves, (dout, dlse), retain_graph=True)
    first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    second = torch.autograd.grad(lse, leaves, dlse)
    assert second[0].norm() > 0
    assert not second[2].any()
    for total, a, b in zip(both, first, second, strict=True):
        torch.testing.assert_close(a + b, total)


def test_a_graph_can_be_walked_twice_with_the_same_result(device):
    leaves = [x.requires_grad_() for x in attention_inputs(1, 18, 18, 2, 1, 8, device=device)]
    for backend in BACKENDS:
        out = fastlm.causal_attention(*leaves, backend=backend)
        once = torch.autograd.grad(out.square().sum(), leaves, retain_graph=True)
        again = torch.autograd.grad(out.square().sum(), leaves)
        for a, b in zip(once, again, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
def test_double_backward_raises(device, backend):
    leaves = [x.requires_grad_() for x in attention_inputs(1, 5, 5, 1, 1, 8, device=device)]
    out = fastlm.causal_attention(*leaves, backend=backend)
    (dquery,) = torch.autograd.grad(out.sum(), leaves[:1], create_graph=True)
    # the second is torch's, for what it is left alone with
    message = "gradient of a gradient is not implemented|derivative for .* is not implemented"
    for leaf in leaves:
        with pytest.raises(RuntimeError, match=message):
            torch.autograd.grad(dquery.sum(), leaf)
    with pytest.raises(RuntimeError, match=message):
        dquery.sum().backward()


def _bound(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ((40, 40), {}),
        ((40, 40), {"scale": 0.7, "backend": "torch"}),
        ((40, 70), {}),
        ((1, 40), {}),
        ((40, 40), {"window_size": 7}),
        ((40, 40), {"key_start": _bound(0, 5, 40)}),
        (
            (9, 40),
            {"key_start": _bound(0, 35, 20), "key_end": _bound(40, 36, 20), "window_size": 4},
        ),
    ],
)
def test_what_torch_does_alone_has_its_graph_and_the_same_bits(lengths, options, monkeypatch):
    inputs = attention_inputs(3, *lengths, 2, 2, 8)
    dout, _ = upstream(inputs[0], inputs[2])
    expected = run(*inputs, dout=dout, **{"backend": "auto", **options})
    monkeypatch.setattr(attention, "_forward", None)
    leaves = [x.requires_grad_() for x in inputs]
    out = fastlm.causal_attention(*leaves, **options)
    got = (out.detach(), *torch.autograd.grad(out, leaves, dout))
    assert_same_bits(got, (expected[0], *expected[2:]))
    assert all(x.is_contiguous() for x in got)


@pytest.mark.parametrize("options", [{}, {"window_size": 7}], ids=str)
def test_out_is_contiguous_whatever_the_layout(options):
    heads_first = [x.transpose(1, 2).contiguous() for x in attention_inputs(2, 40, 40, 2, 2, 8)]
    shared = torch.randn(1, 40, 1, 8).expand(2, 40, 2, 8)
    for inputs in ([x.transpose(1, 2) for x in heads_first], [shared] * 3):
        assert fastlm.causal_attention(*inputs, **options).is_contiguous()
        inputs = [x.detach().requires_grad_() for x in inputs]
        assert fastlm.causal_attention(*inputs, **options).is_contiguous()


def test_torch_is_not_left_alone_with_anything_else(monkeypatch):
    calls = []
    forward = attention._forward
    monkeypatch.setattr(attention, "_forward", lambda *args: calls.append(0) or forward(*args))
    query, key, value = inputs = attention_inputs(2, 40, 40, 2, 1, 8)
    for options in (
        {"backend": "reference"},
        {"return_lse": True},
        {"softcap": 9.0},
        {"sinks": torch.zeros(2)},
        {"scale": 0.0},
    ):
        fastlm.causal_attention(*inputs, **options)
    fastlm.causal_attention(*(x[:1] for x in inputs), cu_seqlens_q=_bound(0, 20, 40))
    fastlm.causal_attention(query, key[:, :20], value[:, :20])
    fastlm.causal_attention(query, key, value[..., :5])
    fastlm.causal_attention(*(x.bfloat16() for x in inputs))
    with fastlm.checked():
        fastlm.causal_attention(*inputs)
    with torch.autocast("cpu"):
        fastlm.causal_attention(*(x.double() for x in inputs))
    assert len(calls) == 11


@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
def test_inputs_are_not_modified(device, backend):
    inputs = attention_inputs(1, 18, 12, 2, 1, 8, device=device, value_dim=6)
    copies = [x.clone() for x in inputs]
    run(*inputs, backend=backend)
    for x, copy in zip(inputs, copies, strict=True):
        assert torch.equal(x, copy)
