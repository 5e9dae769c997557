"""The Gluon kernel on a Hopper GPU: what proves a row of its table.  Run by benchmarks/gpu.sh.

pytest tests/on_hopper.py
"""

from __future__ import annotations

import functools

import pytest
import torch

import fastlm
from fastlm.kernels.attention import gluon_tuning
from fastlm.testing import assert_as_accurate

# B, T, S, H, G: whole blocks, nothing that divides, a prompt behind others, queries that see
# nothing, many heads, one long row
SHAPES = [
    (2, 256, 256, 4, 2), (3, 333, 333, 6, 3), (2, 130, 1000, 4, 1), (1, 400, 270, 2, 2),
    (4, 1024, 1024, 32, 8), (1, 8192, 8192, 4, 4),
]  # fmt: skip


def inputs_of(shape, head_dim, dtype=torch.bfloat16):
    batch, num_queries, num_keys, heads, kv_heads = shape
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = [(num_queries, heads), (num_keys, kv_heads), (num_keys, kv_heads)]
    return [
        torch.randn(batch, *size, head_dim, device="cuda", dtype=dtype, generator=generator)
        for size in sizes
    ]


gluon = functools.partial(fastlm.causal_attention, return_lse=True, backend="gluon")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", gluon_tuning.FORWARD)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_as_accurate_as_torch(shape, head_dim, dtype):
    inputs = inputs_of(shape, head_dim, dtype)
    reference = functools.partial(fastlm.causal_attention, return_lse=True, backend="reference")
    truth = reference(*(x.double() for x in inputs))
    plain = fastlm.causal_attention(*inputs, return_lse=True, backend="torch")
    for name, got, one, true in zip(("out", "lse"), gluon(*inputs), plain, truth, strict=True):
        assert_as_accurate(name, got, plain=one, truth=true)


@pytest.mark.parametrize("head_dim", gluon_tuning.FORWARD)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_its_lse_and_out_serve_the_backward(shape, head_dim):
    def gradients(backend, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in inputs_of(shape, head_dim)]
        out = fastlm.causal_attention(*inputs, backend=backend)
        generator = torch.Generator("cuda").manual_seed(1)
        dout = torch.randn(out.shape, device="cuda", generator=generator).bfloat16().to(dtype)
        return torch.autograd.grad(out, inputs, dout)

    got = gradients("gluon", torch.bfloat16)
    plain, truth = gradients("torch", torch.bfloat16), gradients("reference", torch.float64)
    for name, x, one, true in zip(("dquery", "dkey", "dvalue"), got, plain, truth, strict=True):
        assert_as_accurate(name, x, plain=one, truth=true)


@pytest.mark.parametrize("head_dim", gluon_tuning.FORWARD)
def test_heads_of_one_projection_are_read_where_they_are(head_dim):
    joint = torch.randn(2, 300, 8, head_dim, device="cuda", dtype=torch.bfloat16)
    query, key, value = joint.split((4, 2, 2), dim=2)
    for got, want in zip(
        gluon(query, key, value), gluon(*(x.contiguous() for x in (query, key, value))), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("head_dim", gluon_tuning.FORWARD)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4]], ids=str)
def test_250_runs_have_the_same_bits(shape, head_dim):
    inputs = inputs_of(shape, head_dim)
    want = gluon(*inputs)
    for _ in range(250):
        for got, expected in zip(gluon(*inputs), want, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("head_dim", gluon_tuning.FORWARD)
def test_a_busy_second_stream_changes_no_bit(head_dim):
    inputs = inputs_of(SHAPES[4], head_dim)
    want = gluon(*inputs)
    other = torch.cuda.Stream()
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    for _ in range(50):
        with torch.cuda.stream(other):
            a = (a @ a).tanh()
        for got, expected in zip(gluon(*inputs), want, strict=True):
            assert torch.equal(got, expected)


def test_a_graph_replays_it():
    inputs = inputs_of(SHAPES[1], 128)
    want = gluon(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gluon(*inputs)
    graph.replay()
    for out, expected in zip(got, want, strict=True):
        assert torch.equal(out, expected)
