"""causal_attention: windows, softcaps, sinks, packed documents and padding, alone and together."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from support.attention import (
    DTYPES,
    assert_same_bits,
    backends,
    backward_arguments,
    blocks,
    judge,
    judge_pooled,
    run,
    upstream,
    with_dtypes,
)
from support.host_sync import no_host_sync
from support.interpreter import interpreted_only
from support.memory import guarded, in_child

import fastlm
from fastlm.kernels import attention as kernels
from fastlm.ops.eager import attention as eager
from fastlm.ops.reference import attention as reference
from fastlm.testing import attention_inputs

ALL = ("triton", "torch", "reference")
BACKENDS = backends(*ALL)
KERNELS = backends("triton", "torch")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(eager, "_FUSED_QUERIES", 16)
    monkeypatch.setattr(eager, "_WRITTEN_SCORES", 1 << 10)
    monkeypatch.setattr(eager, "_SMALL_SCORES", 0)
    with blocks(16, 16):
        yield


def tensor(*values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def documents(device):
    """Of 50 queries and 55 keys.  One has neither, one no keys, one no queries; some are left."""
    return {
        "cu_seqlens_q": tensor(0, 18, 18, 23, 23, 46, device=device),
        "cu_seqlens_k": tensor(0, 18, 18, 18, 24, 50, device=device),
    }


ONE_OF_EACH = {
    "window": lambda device: {"window_size": 7},
    "softcap": lambda device: {"softcap": 1.5},
    "sinks": lambda device: {"sinks": torch.tensor([0.7, -1.2], device=device)},
    "packed": documents,
    "padded": lambda device: {
        "key_start": tensor(20, device=device), "key_end": tensor(47, device=device)
    },
}  # fmt: skip
PAIRS = [
    pair
    for pair in itertools.combinations_with_replacement(ONE_OF_EACH, 2)
    if set(pair) != {"packed", "padded"}
]


def options(names, device):
    return {key: value for name in names for key, value in ONE_OF_EACH[name](device).items()}


def sizes(num_queries=50, num_keys=55):
    return 1, num_queries, num_keys, 2, 1, 16


@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_every_pair_of_options(device, backend, names):
    inputs = attention_inputs(*sizes(), device=device)
    judge(*inputs, backend=backend, **options(names, device))


@pytest.mark.parametrize(("backend", "dtype"), with_dtypes(*ALL, "cuda"))
@pytest.mark.parametrize("last", ["packed", "padded"])
def test_all_options_in_any_dtype(device, backend, dtype, last):
    names = ("window", "softcap", "sinks", last)
    inputs = attention_inputs(*sizes(), dtype, device, value_dim=12)
    judge(*inputs, backend=backend, **options(names, device), scale=-0.4)


@pytest.mark.parametrize("backend", [*KERNELS, "cuda"])
@pytest.mark.parametrize(
    "lengths",
    [(40, 40), (20, 50), pytest.param((50, 20), marks=pytest.mark.slow), (1, 40)],
    ids=str,
)
def test_windows_of_any_size(device, backend, lengths):
    windows = (1, 2, 15, 16, 17, 33, 39, 40, 1000)
    cases = [attention_inputs(*sizes(*lengths), device=device, seed=w) for w in windows]
    judge_pooled(cases, backend=backend, options=[{"window_size": w} for w in windows])


@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
def test_a_window_over_everything_is_none(device, backend):
    inputs = attention_inputs(*sizes(), device=device)
    expected = run(*inputs, backend=backend)
    assert_same_bits(run(*inputs, backend=backend, window_size=2**40), expected)


@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
def test_softcaps_that_no_float32_holds(device, backend):
    inputs = attention_inputs(1, 20, 36, 2, 1, 8, device=device)
    for softcap, same_as in ((5e-324, 1e-20), (1e-40, 1e-20), (1e39, None), (1e300, None)):
        got = run(*inputs, backend=backend, softcap=softcap)
        expected = run(*inputs, backend=backend, softcap=same_as)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_any_scale_of_square_calls_and_documents(device, backend, scale):
    inputs = attention_inputs(*sizes(40, 40), device=device)
    judge(*inputs, backend=backend, scale=scale)
    judge(*inputs, backend=backend, scale=scale, cu_seqlens_q=tensor(0, 20, 40, device=device))


@interpreted_only
def test_a_block_that_its_document_does_not_need_reads_nothing():
    """Programs are dealt by an upper bound, and a window must not send the spare ones anywhere."""

    def check():
        query, key, value = (guarded(x) for x in attention_inputs(1, 32, 32, 1, 1, 16))
        for ends, window in (((0, 15, 32), 1), ((0, 12, 32), 13), ((0, 1, 17, 32), 5)):
            bounds = torch.tensor(ends, dtype=torch.int32)
            run(query, key, value, backend="triton", cu_seqlens_q=bounds, window_size=window)
        start = torch.tensor([32], dtype=torch.int32)
        short = guarded(query[:, :1])
        run(short, key, value, backend="triton", key_start=start, window_size=4)

    in_child(check)


def per_document(tensors, bounds_q, bounds_k):
    """Each document of query, key, value, dout and dlse, as a call of its own."""
    query, key, value, dout, dlse = tensors
    for (q, q_end), (k, k_end) in zip(
        itertools.pairwise(bounds_q.tolist()), itertools.pairwise(bounds_k.tolist()), strict=True
    ):
        queries, keys = slice(q, q_end), slice(k, k_end)
        alone = (query[:, queries], key[:, keys], value[:, keys])
        yield queries, keys, alone, dout[:, queries], dlse[..., queries]


@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
@pytest.mark.parametrize("names", [(), ("window", "softcap", "sinks")], ids=["plain", "options"])
def test_packed_documents_are_calls_of_their_own(device, backend, names):
    inputs = attention_inputs(*sizes(), device=device)
    dout, dlse = upstream(inputs[0], inputs[2])
    dlse[..., 18:23] = 0.0  # their lse is constant
    more, bounds = options(names, device), documents(device)
    out, lse, dquery, dkey, dvalue, *_ = run(
        *inputs, backend=backend, dout=dout, dlse=dlse, **more, **bounds
    )
    for queries, keys, alone, do, dl in per_document((*inputs, dout, dlse), *bounds.values()):
        expected = run(*alone, backend=backend, dout=do, dlse=dl, **more)[:5]
        packed = (
            out[:, queries], lse[..., queries], dquery[:, queries], dkey[:, keys], dvalue[:, keys]
        )  # fmt: skip
        if backend in ("triton", "cuda"):
            assert_same_bits(packed, expected)
        for got, want in zip(packed, expected, strict=True):
            torch.testing.assert_close(got, want)
    # what follows the last document
    assert not out[:, 46:].any()
    assert not dquery[:, 46:].any()
    assert not dkey[:, 50:].any()
    assert not dvalue[:, 50:].any()


@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
@pytest.mark.parametrize("names", [(), ("window", "softcap", "sinks")], ids=["plain", "options"])
@pytest.mark.parametrize(("left", "right"), [(5, 0), (0, 7), (21, 3)])
def test_padding_changes_nothing(device, backend, names, left, right):
    inputs = attention_inputs(2, 20, 20, 2, 1, 16, device=device)
    dout, dlse = upstream(inputs[0], inputs[2])
    more = options(names, device)
    expected = run(*inputs, backend=backend, dout=dout, dlse=dlse, **more)[:5]

    def padded(x, filling, dim=1):
        shape = list(x.shape)
        shape[dim] = left
        before = x.new_full(shape, filling)
        shape[dim] = right
        return torch.cat([before, x, x.new_full(shape, filling)], dim)

    bounds = {"key_start": tensor(left, left, device=device)}
    bounds["key_end"] = bounds["key_start"] + 20
    results = run(
        *(padded(x, 3.0) for x in inputs), backend=backend, dout=padded(dout, 0.0),
        dlse=padded(dlse, 0.0, 2), **more, **bounds,
    )[:5]  # fmt: skip
    inside = slice(left, left + 20)
    out, lse, *grads = results
    kept = (out[:, inside], lse[..., inside], *(grad[:, inside] for grad in grads))
    if backend in ("triton", "cuda"):
        assert_same_bits(kept, expected)
    for got, want in zip(kept, expected, strict=True):
        torch.testing.assert_close(got, want)
    for grad in grads:
        assert not grad[:, :left].any()
        assert not grad[:, left + 20 :].any()


@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
def test_rows_are_padded_each_in_its_own_way(device, backend):
    query, key, value = attention_inputs(4, 30, 33, 2, 1, 8, device=device)
    bounds = {
        "key_start": tensor(0, 17, 33, 12, device=device),
        "key_end": tensor(33, 30, 33, 5, device=device),  # the last two have no keys
    }
    judge(query, key, value, backend=backend, **bounds)
    out, lse = fastlm.causal_attention(
        query, key, value, return_lse=True, backend=backend, **bounds
    )
    assert not out[2:].any()
    assert (lse[2:] == -torch.inf).all()
    # one bound alone
    for name in bounds:
        judge(query, key, value, backend=backend, window_size=9, **{name: bounds[name]})


def test_small_rows_padded_each_in_its_own_way_are_one_call(monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return flash(*args, **kwargs)

    flash = eager.flash
    monkeypatch.setattr(eager, "flash", counted)
    monkeypatch.setattr(eager, "_SMALL_SCORES", 1 << 16)
    query, key, value = attention_inputs(4, 30, 33, 2, 1, 8)
    fastlm.causal_attention(query, key, value, key_start=tensor(0, 17, 33, 12, device="cpu"))
    assert len(calls) == 1
    test_rows_are_padded_each_in_its_own_way("cpu", "torch")


@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
def test_boundaries_may_be_64_bits_wide_and_shared(device, backend):
    inputs = attention_inputs(*sizes(50, 50), device=device)
    bounds = tensor(0, 9, 40, device=device)
    expected = run(*inputs, backend=backend, cu_seqlens_q=bounds, cu_seqlens_k=bounds.clone())
    everything = torch.tensor([2**63 - 1], device=device)
    assert_same_bits(
        run(*inputs, backend=backend, key_end=everything), run(*inputs, backend=backend)
    )
    for given in ({"cu_seqlens_q": bounds.long()}, dict.fromkeys(
        ("cu_seqlens_q", "cu_seqlens_k"), bounds
    )):  # fmt: skip
        assert_same_bits(run(*inputs, backend=backend, **given), expected)


def test_more_documents_than_a_program_looks_at_in_one_step(device):
    query, key, value = attention_inputs(1, 30, 30, 1, 1, 8, device=device)
    # most are empty
    ends = torch.randint(0, 29, (140,), generator=torch.Generator().manual_seed(0)).sort().values
    bounds = torch.cat([torch.zeros(1), ends]).to(device, torch.int32)
    out, expected = (
        fastlm.causal_attention(query, key, value, cu_seqlens_q=bounds, backend=backend)
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
def test_a_sink_is_a_key_without_a_value(device, backend):
    query, key, value = attention_inputs(1, 20, 20, 2, 2, 8, torch.float64, device)
    sinks = torch.tensor([0.5, -2.0], dtype=torch.float64, device=device)
    out, lse = fastlm.causal_attention(
        query, key, value, sinks=sinks, return_lse=True, backend=backend
    )
    without, before = fastlm.causal_attention(query, key, value, return_lse=True, backend=backend)
    torch.testing.assert_close(lse, torch.logaddexp(before, sinks[:, None]))
    share = (before - lse).exp().transpose(1, 2)[..., None]
    torch.testing.assert_close(out, without * share)
    # of any strides
    spread = torch.stack([sinks, sinks + 9], 1)[:, 0]
    assert torch.equal(
        fastlm.causal_attention(query, key, value, sinks=spread, backend=backend), out
    )
    # one of -inf is none
    nothing = torch.full_like(sinks, -torch.inf)
    same = fastlm.causal_attention(
        query, key, value, sinks=nothing, return_lse=True, backend=backend
    )
    torch.testing.assert_close(same, (without, before))


@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
def test_queries_that_see_a_sink_alone(device, backend):
    query, key, value = attention_inputs(1, 30, 9, 2, 1, 8, device=device)
    sinks = torch.tensor([0.5, -2.0], device=device)
    out, lse, dquery, *_, dsinks = run(query, key, value, backend=backend, sinks=sinks)
    assert not out[:, :21].any()
    torch.testing.assert_close(lse[..., :21], sinks[:, None].expand(-1, 21)[None])
    assert not dquery[:, :21].any()
    assert dsinks.isfinite().all()
    # nothing is seen at all
    results = run(query, key, value, backend=backend, sinks=torch.full_like(sinks, -torch.inf))
    assert not results[0][:, :21].any()
    assert (results[1][..., :21] == -torch.inf).all()
    assert not results[-1].any()


# in random directions first: all of the Jacobian takes a minute in the interpreter
@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
@pytest.mark.parametrize("last", [pytest.param("packed", marks=pytest.mark.slow), "padded"])
def test_gradients_are_those_of_the_function(device, backend, fast, last):
    block = 16 if device == "cuda" else 2
    count = 3 * block
    inputs = attention_inputs(1, count, count + 1, 2, 1, 2, torch.float64, device, value_dim=3)
    sinks = torch.tensor([0.3, -0.8], dtype=torch.float64, device=device)
    leaves = [x.requires_grad_() for x in (*inputs, sinks)]
    if last == "packed":
        bounds = {
            "cu_seqlens_q": tensor(0, block + 1, 2 * block + 1, device=device),
            "cu_seqlens_k": tensor(0, block + 1, 3 * block, device=device),
        }
    else:
        bounds = {"key_start": tensor(1, device=device), "key_end": tensor(count, device=device)}

    def function(query, key, value, sinks):
        return fastlm.causal_attention(
            query, key, value, sinks=sinks, scale=0.8, softcap=1.3, window_size=block + 1,
            return_lse=True, backend=backend, **bounds,
        )  # fmt: skip

    with blocks(block, block):
        assert torch.autograd.gradcheck(
            function, leaves, eps=1e-6, atol=1e-7, rtol=1e-5, nondet_tol=0.0, fast_mode=fast
        )


@pytest.mark.parametrize("backend", [*KERNELS, "cuda"])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
def test_any_subset_of_gradients(device, backend, needs):
    inputs = attention_inputs(1, 18, 18, 2, 1, 8, device=device)
    sinks = torch.tensor([0.3, -0.8], device=device)
    more = {"window_size": 5, "softcap": 2.0}
    dout = torch.ones_like(inputs[0])
    expected = run(*inputs, backend=backend, sinks=sinks, dout=dout, **more)[2:]
    leaves = [x.requires_grad_(need) for x, need in zip((*inputs, sinks), needs, strict=True)]
    out = fastlm.causal_attention(*leaves[:3], sinks=leaves[3], backend=backend, **more)
    assert out.requires_grad == any(needs)
    if any(needs):
        out.sum().backward()
    for x, need, grad in zip(leaves, needs, expected, strict=True):
        assert (x.grad is not None) == need
        assert x.grad is None or torch.equal(x.grad, grad)


@pytest.mark.parametrize("backend", [*KERNELS, "cuda"])
def test_compiled_calls_give_the_same_bits_for_any_lengths(device, backend):
    def function(query, key, value, sinks, bounds):
        return fastlm.causal_attention(
            query, key, value, sinks=sinks, cu_seqlens_q=bounds, window_size=5, softcap=2.0,
            backend=backend,
        )  # fmt: skip

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    sinks = torch.tensor([0.3, -0.8], device=device)
    cases = [(20, (0, 7, 20)), (33, (0, 1, 5, 30)), (40, (0, 40, 40))]
    for at, (length, ends) in enumerate(cases):
        bounds, results = tensor(*ends, device=device), []
        for call in (function, compiled):
            inputs = attention_inputs(1, length, length, 2, 1, 8, device=device)
            leaves = [x.requires_grad_() for x in inputs]
            with torch.compiler.set_stance("fail_on_recompile" if at else "default"):
                out = call(*leaves, sinks, bounds)
            results.append((out, out, *torch.autograd.grad(out.square().sum(), leaves)))
        assert_same_bits(results[1], results[0])


def test_nothing_waits_for_the_device(device):
    inputs = attention_inputs(*sizes(), torch.bfloat16, device)
    for backend in KERNELS:
        if device == "cpu":
            continue  # there is nothing to wait for
        for last in ("packed", "padded"):
            with no_host_sync():
                run(*inputs, backend=backend, **options(("window", "sinks", last), device))


def test_what_torch_does_not_read_on_a_gpu_gives_the_same(device, monkeypatch):
    for last in ("packed", "padded"):
        inputs = attention_inputs(*sizes(), torch.float64, device)
        more = options(("window", "softcap", "sinks", last), device)
        expected = run(*inputs, backend="torch", **more)
        with monkeypatch.context() as patch:
            patch.setattr(
                eager, "_blocks", lambda q, k, s, scale, w, fused: eager._unread_blocks(q, k, s, w)
            )
            results = run(*inputs, backend="torch", **more)
        for got, want in zip(results, expected, strict=True):
            torch.testing.assert_close(got, want)


@interpreted_only
@pytest.mark.parametrize(
    "bounds",
    [(5, 9, 40), (0, 30, 20), (0, -7, 50), (-(2**31), 2**31 - 1, 0), (99,) * 3, (0, 5, -(2**31))],
    ids=str,
)  # fmt: skip
def test_wrong_boundaries_reach_no_memory_beyond_the_tensors(bounds):
    def check():
        ends = guarded(torch.tensor(bounds, dtype=torch.int32))
        start, end = guarded(ends[1:2]), guarded(ends[2:])
        for length in (50, 10):
            inputs = [guarded(x) for x in attention_inputs(1, length, length, 1, 1, 16)]
            dout, dlse = map(guarded, upstream(inputs[0], inputs[2]))
            more = {"backend": "triton", "dout": dout, "dlse": dlse, "window_size": 7}
            run(*inputs, cu_seqlens_q=ends, **more)
            run(*inputs, key_start=start, key_end=end, **more)

    in_child(check)


def test_checked_accepts_what_is_right_and_refuses_what_is_not(device, monkeypatch):
    inputs = attention_inputs(*sizes(), torch.bfloat16, device)
    everything = [options(("window", "softcap", "sinks", x), device) for x in ("packed", "padded")]
    with fastlm.checked():
        for backend, more in itertools.product(KERNELS, everything):
            run(*inputs, backend=backend, **more)
    right = kernels.forward

    def without_window(*args):
        return right(*args[:-2], None, args[-1])

    monkeypatch.setattr(kernels, "forward", without_window)
    with (
        fastlm.checked(),
        pytest.raises(fastlm.KernelMismatch, match="causal_attention forward on triton"),
    ):
        run(*inputs, backend="triton", **everything[0])


BOUNDS = torch.tensor([0, 3, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"window_size": 0}, ValueError, "window_size must be at least 1, got 0"),
        ({"window_size": 2.5}, TypeError, "window_size must be an integer, got float"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive and finite, got 0.0"),
        ({"softcap": torch.inf}, ValueError, "softcap must be positive and finite, got inf"),
        ({"softcap": "1"}, TypeError, "softcap must be a number, got str"),
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks must have shape \(4,\) to match query"),
        ({"sinks": torch.zeros(4).int()}, TypeError, "sinks must be one of float32"),
        ({"cu_seqlens_q": BOUNDS.float()}, TypeError, "cu_seqlens_q must be one of int32, int64"),
        ({"cu_seqlens_q": [0, 5]}, TypeError, "cu_seqlens_q must be a tensor, got list"),
        ({"cu_seqlens_q": BOUNDS[:0]}, ValueError, r"cu_seqlens_q must have shape \(documents"),
        ({"cu_seqlens_k": BOUNDS}, ValueError, "cu_seqlens_k must come with cu_seqlens_q"),
        (
            {"cu_seqlens_q": BOUNDS, "cu_seqlens_k": BOUNDS[:2]},
            ValueError,
            r"cu_seqlens_k must have shape \(3,\) to match cu_seqlens_q, got \(2,\)",
        ),
        (
            {"cu_seqlens_q": BOUNDS, "key_start": BOUNDS[:1]},
            ValueError,
            "key_start must be None with cu_seqlens_q",
        ),
        ({"key_end": BOUNDS}, ValueError, r"key_end must have shape \(1,\) to match query"),
        ({"key_end": BOUNDS[:1].to("meta")}, ValueError, "key_end must be on the device of query"),
        ({"cu_seqlens_q": BOUNDS + 1}, ValueError, r"must begin with 0, .*, got \[1, 4, 6\]"),
        (
            {"cu_seqlens_q": torch.tensor([0, 2**32 + 5])},
            ValueError,
            "must begin with 0, never fall and end by 5",
        ),
        ({"cu_seqlens_q": BOUNDS * 2}, ValueError, r"end by 5, got \[0, 6, 10\]"),
        ({"cu_seqlens_q": BOUNDS.flip(0) - 5}, ValueError, "must begin with 0, never fall"),
    ],
)
def test_wrong_options_are_named(wrong, error, message):
    inputs = attention_inputs(1, 5, 5, 4, 2, 8)
    with pytest.raises(error, match=f"causal_attention: .*{message}"):
        fastlm.causal_attention(*inputs, **wrong)


def test_documents_need_one_row_and_as_many_keys():
    inputs = attention_inputs(2, 5, 5, 4, 2, 8)
    with pytest.raises(ValueError, match="query must have B == 1 with cu_seqlens_q, got 2"):
        fastlm.causal_attention(*inputs, cu_seqlens_q=BOUNDS)
    inputs = attention_inputs(1, 5, 6, 4, 2, 8)
    with pytest.raises(ValueError, match=r"key must have shape \(1, 5, 2, 8\) without cu_seq"):
        fastlm.causal_attention(*inputs, cu_seqlens_q=BOUNDS)


def random_options(choose, num_queries, num_keys, heads, device):
    """Any options that go together."""
    more = {"scale": choose.choice([None, choose.uniform(-1, 1)])}
    if choose.random() < 0.5:
        more["window_size"] = choose.randint(1, 40)
    if choose.random() < 0.5:
        more["softcap"] = choose.uniform(0.5, 5.0)
    if choose.random() < 0.5:
        more["sinks"] = torch.tensor([choose.gauss(0, 1) for _ in range(heads)], device=device)
    kind = choose.choice(["packed", "padded", ""])
    if kind == "packed":
        count = choose.randint(0, 4)
        for name, length in (("cu_seqlens_q", num_queries), ("cu_seqlens_k", num_keys)):
            ends = sorted(choose.randint(0, length) for _ in range(count))
            more[name] = tensor(0, *ends, device=device)
    elif kind == "padded":
        more["key_start"] = tensor(choose.randint(-2, num_keys + 2), device=device)
        more["key_end"] = tensor(choose.randint(-2, num_keys + 2), device=device)
    return more


@pytest.mark.parametrize("count", [6, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("backend", "dtype"), with_dtypes("triton", "torch", "cuda", dtypes=DTYPES[:3])
)
def test_random_calls(device, backend, dtype, count):
    choose = random.Random(1)
    cases, more = [], []
    for seed in range(count):
        lengths = choose.randint(1, 50), choose.randint(1, 50)
        cases.append(attention_inputs(
            1, *lengths, 2, choose.choice([1, 2]), choose.randint(1, 24), dtype, device,
            value_dim=choose.randint(1, 24), seed=seed,
        ))  # fmt: skip
        more.append(random_options(choose, *lengths, 2, device))
    judge_pooled(cases, backend=backend, options=more)


def test_the_gradient_of_a_sink_is_that_of_its_queries(device):
    inputs = attention_inputs(*sizes(), device=device)
    more = options(("window", "softcap", "sinks", "packed"), device)
    out, lse, *grads = run(*inputs, backend="reference", **more)
    rest = backward_arguments(*upstream(inputs[0], inputs[2]), out, lse, *inputs, **more)
    rows = reference.backward(*rest)[3]
    assert rows.shape == lse.shape
    assert torch.equal(rows.sum((0, 2)), grads[3])
