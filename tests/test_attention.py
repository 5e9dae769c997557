"""causal_attention: what it computes, on every backend."""

from __future__ import annotations

import random
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support.attention import (
    DTYPES,
    assert_same_bits,
    backends,
    backward_arguments,
    blocks,
    forward_arguments,
    judge,
    judge_pooled,
    run,
    upstream,
    with_dtypes,
)
from support.host_sync import no_host_sync
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlm
from fastlm.kernels import attention as kernels
from fastlm.kernels.attention import tuning
from fastlm.ops.eager import attention as eager
from fastlm.ops.reference import attention as reference
from fastlm.testing import attention_inputs

ALL = ("triton", "torch", "reference")
BACKENDS = backends(*ALL)
HEAD_DIMS = [(1, 8, 24, 40), (59, 72, 80, 96, 111), (128, 160, 192, 256), (257, 512)]
KERNELS = backends("triton", "torch")
REAL_PLAN = tuning.plan


@pytest.fixture(autouse=True)
def _small_blocks():
    with blocks(16, 16):
        yield


@pytest.mark.parametrize(("backend", "dtype"), with_dtypes(*ALL, "cuda"))
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "heads", "kv_heads"),
    [(35, 35, 2, 1), (17, 33, 1, 1), (49, 17, 1, 1)],
)
def test_as_accurate_as_torch(device, backend, dtype, num_queries, num_keys, heads, kv_heads):
    inputs = attention_inputs(1, num_queries, num_keys, heads, kv_heads, 16, dtype, device)
    judge(*inputs, backend=backend)


@pytest.mark.parametrize("backend", backends("triton", "torch", dtype=torch.bfloat16))
@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
def test_any_head_dim(device, backend, head_dims):
    cases = [
        attention_inputs(1, *lengths, 1, 1, head_dim, torch.bfloat16, device, value_dim=value_dim)
        for head_dim in head_dims
        for lengths, value_dim in (((17, 17), head_dim), ((9, 18), abs(257 - head_dim) or 320))
        # up to 256 torch's is fused, and beside 256 has no column for the gradient of the lse
        if value_dim != 256 or backend == "triton" or device == "cpu"
    ]
    judge_pooled(cases, backend=backend)


@pytest.mark.parametrize("backend", [*KERNELS, "cuda"])
@pytest.mark.parametrize("num_queries", [1, 15, 16, 17])
def test_any_length(device, backend, num_queries):
    cases = [
        attention_inputs(1, num_queries, num_keys, 1, 1, 8, device=device)
        for num_keys in (1, 16, 17, 33)
    ]
    judge_pooled(cases, backend=backend)


@pytest.mark.parametrize("backend", [*KERNELS, "cuda"])
@pytest.mark.parametrize("scale", [0.0, -0.7, 1.3, 1e-30])
def test_any_scale(device, backend, scale):
    judge(*attention_inputs(1, 20, 36, 1, 1, 8, device=device), backend=backend, scale=scale)


@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (4, 1)])
def test_any_grouping_of_heads(device, backend, heads, kv_heads):
    judge(*attention_inputs(1, 18, 18, heads, kv_heads, 8, device=device), backend=backend)


@pytest.mark.parametrize("backend", [*KERNELS, "cuda"])
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 32), (32, 16)])
def test_blocks_need_not_be_square(device, backend, block_m, block_n):
    with blocks(block_m, block_n):
        judge(*attention_inputs(1, 35, 40, 1, 1, 8, device=device), backend=backend)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)  # float64 has the blocks of these tests
def test_blocks_of_the_table_are_as_good(device, dtype):
    inputs = attention_inputs(1, 150, 140, 1, 1, 64, dtype, device)
    with mock.patch.object(tuning, "plan", REAL_PLAN):
        judge(*inputs, backend="triton")


@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
@pytest.mark.parametrize(
    ("batch", "num_queries", "num_keys"), [(0, 3, 3), (2, 0, 3), (2, 3, 0), (2, 0, 0), (0, 0, 0)]
)
def test_empty_sizes(device, backend, batch, num_queries, num_keys):
    inputs = attention_inputs(batch, num_queries, num_keys, 2, 1, 8, device=device)
    out, lse, *grads = run(*inputs, backend=backend)
    assert out.shape == (batch, num_queries, 2, 8)
    assert lse.shape == (batch, 2, num_queries)
    assert not out.any()
    assert (lse == -torch.inf).all()
    for grad, x in zip(grads, inputs, strict=True):
        assert grad.shape == x.shape
        assert not grad.any()


@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
def test_queries_that_see_no_key(device, backend):
    query, key, value = attention_inputs(1, 40, 7, 2, 1, 8, device=device)
    dout, dlse = upstream(query, value)
    # nothing flows back from the lse of a row without keys, whatever arrives there
    dlse[..., :33] = torch.nan
    out, lse, dquery, dkey, dvalue = run(query, key, value, backend=backend, dout=dout, dlse=dlse)
    assert not out[:, :33].any()
    assert (lse[..., :33] == -torch.inf).all()
    assert not dquery[:, :33].any()
    seeing = run(query[:, 33:], key, value, backend=backend, dout=dout[:, 33:], dlse=dlse[..., 33:])
    expected = (out[:, 33:], lse[..., 33:], dquery[:, 33:], dkey, dvalue)
    for got, want in zip(expected, seeing, strict=True):
        torch.testing.assert_close(got, want)


def test_square_calls_agree_with_torch(device):
    query, key, value = attention_inputs(2, 40, 40, 4, 4, 16, device=device)
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, key, value)), is_causal=True
    ).transpose(1, 2)
    for backend in BACKENDS:
        out = fastlm.causal_attention(query, key, value, backend=backend)
        torch.testing.assert_close(out, expected, msg=backend)


def powers_of_two_visible(dtype, device):
    """q = 0 and integers: rows that see 1, 2, 4, ... keys are exact in any dtype."""
    num = 40
    query = torch.zeros(1, num, 2, 16, dtype=dtype, device=device)
    key = torch.randint(-8, 9, (1, num, 1, 16)).to(device, dtype)
    value = torch.randint(-4, 5, (1, num, 1, 16)).to(device, dtype)
    exact = [0, 1, 3, 7, 15, 31]
    dout = torch.zeros(1, num, 2, 16, dtype=dtype, device=device)
    dout[:, exact] = torch.randint(-4, 5, (1, len(exact), 2, 16)).to(device, dtype)
    return query, key, value, dout, exact


@pytest.mark.parametrize(("backend", "dtype"), with_dtypes("triton", "torch", "cuda"))
def test_power_of_two_means_are_exact(device, backend, dtype):
    query, key, value, dout, exact = powers_of_two_visible(dtype, device)
    out, lse, _, dkey, dvalue = run(query, key, value, backend=backend, scale=0.5, dout=dout)
    sums = value.double().cumsum(1)[:, exact]
    counts = torch.tensor(exact, device=device)[:, None, None] + 1
    assert sums.norm() > 0
    assert torch.equal(out[:, exact], (sums / counts).expand(1, -1, 2, -1).to(dtype))

    assert not dkey.any()
    if dtype.itemsize == 2:  # the cast of p makes the recomputed powers of two exact again
        rest = backward_arguments(dout, None, out, lse, query, key, value, scale=0.5)
        want = reference.truth_backward(*rest)[2]
        assert want.norm() > 0
        assert torch.equal(dvalue, want.to(dtype))


@pytest.mark.parametrize(("backend", "dtype"), with_dtypes(*ALL, "cuda"))
def test_a_query_can_select_any_key_of_its_head(device, backend, dtype):
    batch, num, heads, kv_heads, dim = 2, 40, 4, 2, 64
    generator = torch.Generator().manual_seed(3)
    order = torch.stack(
        [torch.randperm(dim, generator=generator)[:num] for _ in range(batch * kv_heads)]
    ).view(batch, kv_heads, num)
    key = F.one_hot(order, dim).transpose(1, 2).to(device, dtype)
    position = torch.arange(num)
    seen = position[:, None] + 1
    wanted = torch.randint(1 << 30, (batch, num, heads), generator=generator) % seen
    kv_of_head = torch.arange(heads) // (heads // kv_heads)
    columns = order[torch.arange(batch)[:, None, None], kv_of_head, wanted]
    # 128 above all others: exp(-128) is lost beside 1, and 128 times any factor is exact
    query = 128 * F.one_hot(columns, dim).to(device, dtype)
    value = torch.stack(torch.broadcast_tensors(
        torch.arange(batch)[:, None, None] + 1,
        position[:, None] + 1,
        torch.arange(kv_heads) + 1,
    ), -1).to(device, dtype)  # fmt: skip
    out = fastlm.causal_attention(query, key, value, scale=1.0, backend=backend)
    expected = torch.stack(torch.broadcast_tensors(
        torch.arange(batch)[:, None, None] + 1, wanted + 1, kv_of_head + 1
    ), -1)  # fmt: skip
    assert torch.equal(out, expected.to(device, dtype))


@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
@pytest.mark.parametrize("heads", [4, 2])
def test_one_query_over_a_cache_sees_all_of_it(device, backend, heads):
    query, key, value = attention_inputs(2, 20, 20, heads, 2, 16, device=device)
    caches = [torch.full((2, 50, 2, 16), torch.nan, device=device) for _ in range(2)]
    for cache, x in zip(caches, (key, value), strict=True):
        cache[:, :20] = x
    views = [cache[:, :20] for cache in caches]
    judge_pooled([(query[:, -1:], *views)], backend=backend)
    whole = fastlm.causal_attention(query, key, value, backend=backend)
    last = fastlm.causal_attention(query[:, -1:], *views, backend=backend)
    torch.testing.assert_close(last, whole[:, -1:])


@pytest.mark.parametrize("backend", [*KERNELS, "cuda"])
def test_memory_past_the_last_key_is_never_used(device, backend):
    query, key, value = attention_inputs(1, 20, 37, 2, 1, 8, device=device)
    results = []
    for tail in (0.0, torch.nan, 3e38):
        caches = [torch.full((1, 64, 1, 8), tail, device=device) for _ in range(2)]
        for cache, x in zip(caches, (key, value), strict=True):
            cache[:, :37] = x
        results.append(run(query, *(cache[:, :37] for cache in caches), backend=backend))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_later_keys_do_not_reach_earlier_queries(device, bad):
    query, key, value = attention_inputs(1, 40, 40, 1, 1, 8, device=device)
    clean = run(query, key, value, backend="triton")
    changed = key.clone()
    changed[:, 20:] = bad
    dirty = run(query, changed, value, backend="triton")
    assert torch.equal(dirty[0][:, :20], clean[0][:, :20])
    assert torch.equal(dirty[1][..., :20], clean[1][..., :20])
    # a value is weighted by 0 in its own block of 16 queries, and 0 * NaN is NaN; others skip it
    changed = value.clone()
    changed[:, 32:] = bad
    dirty = run(query, key, changed, backend="triton")
    assert torch.equal(dirty[0][:, :32], clean[0][:, :32])
    assert torch.equal(dirty[2][:, :32], clean[2][:, :32])


@pytest.mark.parametrize(
    ("backend", "block", "bad"),
    [("reference", 1, torch.nan), ("reference", 1, torch.inf), ("triton", 16, torch.nan)],
)
@pytest.mark.parametrize("position", range(4), ids=["query", "key", "value", "dout"])
def test_what_is_not_finite_reaches_nothing_out_of_sight(device, backend, block, bad, position):
    query, key, value = attention_inputs(1, 40, 40, 1, 1, 8, device=device)
    tensors = [query, key, value, upstream(query, value)[0]]
    clean = run(*tensors[:3], backend=backend, dout=tensors[3])
    # kernels keep the order of blocks alone: the first row of one, or the last
    row = 21 if block == 1 else 32 if position in (1, 2) else 15
    tensors[position] = tensors[position].clone()
    tensors[position][0, row, 0, 3] = bad
    out, lse, dquery, dkey, dvalue = run(*tensors[:3], backend=backend, dout=tensors[3])
    if position in (1, 2):  # earlier queries do not see it
        assert torch.equal(out[:, :row], clean[0][:, :row])
        assert torch.equal(lse[..., :row], clean[1][..., :row])
        assert torch.equal(dquery[:, :row], clean[2][:, :row])
        assert not dquery[:, row:].isfinite().all()
    else:  # it does not see later keys
        assert torch.equal(dkey[:, row + 1 :], clean[3][:, row + 1 :])
        assert torch.equal(dvalue[:, row + 1 :], clean[4][:, row + 1 :])
        assert not dkey[:, : row + 1].isfinite().any()


@pytest.mark.parametrize("position", range(2), ids=["query", "key"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_checked_blames_no_kernel_for_its_input(device, position, bad):
    tensors = attention_inputs(1, 40, 40, 1, 1, 8, device=device)
    tensors[position][0, 21, 0, 3] = bad
    with fastlm.checked():
        out, lse = fastlm.causal_attention(*tensors, return_lse=True, backend="triton")
    # the sum of a score of +inf and others is +inf
    assert (lse == bad).any() if bad == torch.inf else lse.isnan().any()
    assert out[0, 21:].isnan().any()
    assert out[0, :21].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_yardstick_is_the_same_for_any_value_dim(device, dtype):
    query, key, value = attention_inputs(1, 33, 40, 4, 2, 24, dtype, device, value_dim=16)
    dout = upstream(query, value)[0]
    results = []
    for extra in (0, 8):  # torch fuses equal head_dims alone
        v, do = F.pad(value, (0, extra)), F.pad(dout, (0, extra))
        out, lse = reference.plain_forward(*forward_arguments(query, key, v, scale=0.9))
        rest = backward_arguments(do, None, out, lse, query, key, v, scale=0.9)
        dquery, dkey, dvalue, _ = reference.plain_backward(*rest)
        results.append((out[..., :16], lse, dquery, dkey, dvalue[..., :16]))
    assert_same_bits(*results)


@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_query_spoils_its_own_row_only(device, backend, bad):
    query, key, value = attention_inputs(1, 20, 20, 2, 1, 8, device=device)
    clean = fastlm.causal_attention(query, key, value, backend=backend)
    query[0, 5, 1, 2] = bad
    out = fastlm.causal_attention(query, key, value, backend=backend)
    assert out[0, 5, 1].isnan().all()
    out[0, 5, 1] = clean[0, 5, 1]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("backend", [*KERNELS, "cuda"])
def test_large_scores_do_not_overflow(device, backend):
    query, key, value = attention_inputs(1, 20, 20, 1, 1, 8, device=device)
    # of scores this large torch's float32 dquery breaks the rule from a factor of 5 on
    factor = 6 if backend == "triton" else 4
    judge(factor * query, factor * key, value, backend=backend)
    for result in run(1e4 * query, 1e4 * key, value, backend=backend):
        assert result.isfinite().all()


def test_nothing_waits_for_the_device(device):
    inputs = attention_inputs(1, 20, 20, 2, 1, 8, device=device)
    for backend in KERNELS:
        if backend == "triton" and device == "cpu":
            continue  # the interpreter reads tensors on the host by nature
        with no_host_sync():
            run(*inputs, backend=backend)


def test_auto_takes_torch_on_cpu_and_says_why():
    explanation = fastlm.explain("causal_attention", *attention_inputs(1, 4, 4, 1, 1, 8))
    assert explanation.steps["forward"].backend == "torch"
    assert "CUDA only" in str(explanation)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, k, v: ([1], k, v), TypeError, "query must be a tensor, got list"),
        (lambda q, k, v: (q[0], k, v), ValueError, r"query must have shape \(B, T, H, D\)"),
        (lambda q, k, v: (q, k[..., :4], v), ValueError, r"key must have shape \(2, S, G, 8\)"),
        (lambda q, k, v: (q, k[:1], v), ValueError, r"key must have shape \(2, S, G, 8\)"),
        (lambda q, k, v: (q, k, v[:, :2]), ValueError, r"value must have shape \(2, 5, 2, Dv\)"),
        (lambda q, k, v: (q, k, v.double()), TypeError, "value must have the dtype of query"),
        (lambda q, k, v: (q.int(), k, v), TypeError, "query must be one of float32"),
        (lambda q, k, v: (q, k.to("meta"), v), ValueError, "key must be on the device of query"),
        (lambda q, k, v: (q[:, :, :3], k, v), ValueError, "divides query's, got 2 for 3"),
        (lambda q, k, v: (q[..., :0], k[..., :0], v), ValueError, "head_dim of 1 to 512, got 0"),
        (
            lambda q, k, v: (q, k, v.repeat(1, 1, 1, 65)),
            ValueError,
            "value must have a head_dim of 1 to 512, got 520",
        ),
        (lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]), ValueError, "got 0 for 4"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    inputs = attention_inputs(2, 5, 5, 4, 2, 8)
    with pytest.raises(error, match=f"causal_attention: .*{message}"):
        fastlm.causal_attention(*change(*inputs))


@pytest.mark.parametrize(
    ("dtype", "options", "width", "fused"),
    [
        (torch.bfloat16, {}, 8, True),
        (torch.float32, {}, 8, False),
        (torch.bfloat16, {"scale": 0.0}, 8, False),
        (torch.bfloat16, {"scale": -0.5}, 8, False),
        (torch.bfloat16, {}, 264, False),
        (torch.bfloat16, {"window_size": 3}, 8, False),
        (torch.bfloat16, {"softcap": 3.0}, 8, False),
        (torch.bfloat16, {"cu_seqlens_q": torch.tensor([0, 4])}, 8, False),
    ],
)
def test_torch_on_cuda_fuses_what_its_kernel_takes(dtype, options, width, fused):
    with FakeTensorMode():  # a device in name only
        query = torch.empty(1, 4, 1, 8, dtype=dtype, device="cuda")
    arguments = forward_arguments(query, query, query, **options)
    assert eager._is_fused(query, width, arguments[4:8], *arguments[8:]) == fused


def test_an_unknown_backend_is_named():
    inputs = attention_inputs(1, 2, 2, 1, 1, 8)
    with pytest.raises(ValueError, match="backend must be one of"):
        fastlm.causal_attention(*inputs, backend="fast")


def test_checked_accepts_what_is_right_and_refuses_what_is_not(device, monkeypatch):
    inputs = attention_inputs(1, 20, 20, 2, 1, 8, device=device)
    with fastlm.checked():
        for backend in KERNELS:
            run(*inputs, backend=backend)
    right = kernels.forward

    def nearly_right(*args):
        out, lse = right(*args)
        return 1.01 * out, lse

    monkeypatch.setattr(kernels, "forward", nearly_right)
    with (
        fastlm.checked(),
        pytest.raises(fastlm.KernelMismatch, match="causal_attention forward on triton"),
    ):
        run(*inputs, backend="triton")


def random_calls(dtype, device, count):
    """Inputs and scales of calls of any size, three blocks and more each way in most."""
    choose = random.Random(0)
    cases, scales = [], []
    for seed in range(count):
        kv_heads = choose.randint(1, 2)
        heads = kv_heads * choose.randint(1, 2)
        lengths = choose.randint(0, 50), choose.randint(0, 50)
        head_dim, value_dim = choose.randint(1, 40), choose.randint(1, 40)
        cases.append(attention_inputs(
            1, *lengths, heads, kv_heads, head_dim, dtype, device, value_dim=value_dim, seed=seed
        ))  # fmt: skip
        scales.append(choose.choice([None, 0.0, choose.uniform(-2, 2)]))
    return cases, scales


@pytest.mark.parametrize("count", [4, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_calls(device, dtype, count):
    cases, scales = random_calls(dtype, device, count)
    judge_pooled(cases, backend="triton", scales=scales)
