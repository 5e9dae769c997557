"""attention_with_kv_cache: results, what is written, and that rows depend on nothing else."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch
from support.attention import DTYPES
from support.host_sync import no_host_sync
from support.kv_cache import (
    assert_equal,
    call,
    judge,
    judge_pooled,
    placed,
    same,
    small_splits,
)

import fastlm
from fastlm.kernels._launch import recorded
from fastlm.kernels.attention_with_kv_cache import tuning

BACKENDS = ("triton", "cuda", "torch", "reference")
OPTIONS = {
    "window": {"window_size": 20},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.tensor([0.7, -1.2])},
    "scale": {"scale": -0.4},
    "rotary": {"rotary": 12},
    "interleaved": {"rotary": 8, "rotary_interleaved": True},
    "pages": {"page_size": 16},
    "odd pages": {"page_size": 7},
    "values": {"value_dim": 11},
    "reading": {"appends": False},
}
ALL = {
    "window_size": 20, "softcap": 1.5, "sinks": torch.tensor([0.7, -1.2]), "rotary": 12,
    "page_size": 7, "value_dim": 11,
}  # fmt: skip
LENGTHS = (37, 0, 63)


@pytest.fixture
def real_plans():
    """Instead of small ones."""


@pytest.fixture(autouse=True)
def _small_splits(request):
    if "real_plans" in request.fixturenames:
        yield
    else:
        with small_splits():
            yield


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_queries", [1, 5])
@pytest.mark.parametrize("option", ["none", *OPTIONS])
def test_every_option(device, backend, num_queries, option):
    options = placed(OPTIONS.get(option, {}), device)
    judge(call(LENGTHS, num_queries, device=device, **options), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_queries", [1, 10])
def test_all_options_in_any_dtype(device, backend, dtype, num_queries):
    judge(call(LENGTHS, num_queries, dtype=dtype, device=device, **placed(ALL, device)), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_chunk_is_not_split(device, backend):
    chunk = call((0, 30), 40, heads=6, device=device, rotary=16)
    judge(chunk, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_softcaps_that_no_float32_holds(device, backend):
    one = call(LENGTHS, device=device)
    for softcap, same_as in ((1e-300, 1e-20), (1e-45, 1e-20), (1e39, None), (1e300, None)):
        expected = one(backend, softcap=same_as)
        for got, want in zip(one(backend, softcap=softcap), expected, strict=True):
            torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_views_that_negate_are_read(device, backend, name):
    one = call(LENGTHS, device=device)
    if name == "query":
        negated = dataclasses.replace(one, query=torch._neg_view(-one.query))
    else:
        options = one.options | {name: torch._neg_view(-one.options[name])}
        negated = dataclasses.replace(one, options=options)
    assert_equal(negated(backend), one(backend))


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (17, 1)], ids=str)
def test_any_group_of_heads(device, heads):
    judge(call((20, 3), 2, *heads, device=device), "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_length_on_the_host_is_that_of_every_row(device, backend):
    one = call((33, 33, 33), 2, device=device, rotary=16)
    assert_equal(one(backend, cache_seqlens=33), one(backend))


def test_64_bit_lengths_are_the_same(device):
    one = call(LENGTHS, device=device)
    assert_equal(one("triton", cache_seqlens=one.seqlens.long()), one("triton"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_without_keys_gives_nothing(device, backend):
    one = call((0, 2), 3, device=device, appends=False)
    out, lse, *_ = one(backend)
    assert (out[0] == 0).all()
    assert (lse[0] == -torch.inf).all()
    # two keys: the first of three queries sees none
    assert (out[1, 0] == 0).all()
    assert lse[1].isfinite().sum(1).tolist() == [2] * 2


# ---- the numbers of training


@pytest.mark.parametrize("backend", ["triton", "cuda", "torch"])
def test_token_by_token_gives_what_the_whole_sequence_gives(device, backend):
    """Prefill, then tokens one at a time, then a chunk: the rule holds for all of it."""
    length, options = 30, {"window_size": 15, "softcap": 3.0}
    whole = call((0,), length, device=device, rotary=16, capacity=length, **options)
    judge(whole, backend)
    k_cache, v_cache = whole.k_cache.clone(), whole.v_cache.clone()
    parts = []
    for start, stop in itertools.pairwise([0, 20, 21, 22, 23, length]):
        tokens = {name: whole.options[name][:, start:stop] for name in ("key", "value")}
        with torch.no_grad():
            parts.append(
                fastlm.attention_with_kv_cache(
                    whole.query[:, start:stop], k_cache, v_cache, cache_seqlens=start,
                    backend=backend, **{**whole.options, **tokens},
                )
            )  # fmt: skip
    expected = whole(backend)
    assert same(k_cache, expected[2]).all()
    torch.testing.assert_close(torch.cat(parts, 1), expected[0])


# ---- rows depend on nothing else


@pytest.mark.parametrize("page_size", [0, 7])
def test_a_row_has_the_bits_it_has_alone(device, page_size):
    options = placed(ALL, device) | {"page_size": page_size}
    one = call(LENGTHS, 2, device=device, **options)
    out, lse, *_ = one("triton")
    for row in range(len(LENGTHS)):
        alone, alone_lse, *_ = one.of_row(row)("triton")
        assert torch.equal(alone, out[row : row + 1])
        assert torch.equal(alone_lse, lse[row : row + 1])


@pytest.mark.parametrize("spare", [1, 16, 5000])
def test_the_size_of_the_cache_changes_no_bit(device, spare):
    one = call(LENGTHS, 2, device=device, rotary=16)
    more = {
        name: torch.nn.functional.pad(x, (0, 0, 0, 0, 0, spare), value=torch.nan)
        for name, x in (("k_cache", one.k_cache), ("v_cache", one.v_cache))
    }
    assert_equal(dataclasses.replace(one, **more)("triton")[:2], one("triton")[:2])


@pytest.mark.parametrize("page_size", [1, 7, 100])
def test_pages_change_no_bit(device, page_size):
    one = call(LENGTHS, 2, device=device, page_size=page_size, rotary=16)
    assert_equal(one.whole()("triton")[:2], one("triton")[:2])


def test_what_stands_behind_the_last_token_changes_no_bit(device):
    one = call(LENGTHS, 3, device=device, page_size=16)
    zeros = {name: getattr(one, name).nan_to_num(0.0) for name in ("k_cache", "v_cache")}
    assert_equal(dataclasses.replace(one, **zeros)("triton")[:2], one("triton")[:2])


def test_a_fixed_number_of_splits_is_as_accurate(device):
    one = call(LENGTHS, 2, device=device, sinks=torch.randn(2, device=device))
    for num_splits in (1, 3, 20, 2**31):
        judge(one, "triton", num_splits=num_splits)


def test_splits_come_from_the_length(device):
    with recorded() as log:
        call((63,), device=device)("triton")
    assert [launch.name for launch in log] == ["append_kernel", "decode_kernel", "combine_kernel"]
    assert log[1].grid == (3,)
    with recorded() as log:
        call((10,), device=device, capacity=16)("triton")
    assert [launch.name for launch in log] == ["append_kernel", "decode_kernel"]


# ---- inside torch


def test_nothing_waits_for_the_device(device):
    one = call(LENGTHS, 2, device=device, **placed(ALL, device))
    seqlens, k_cache, v_cache = one.seqlens, one.k_cache.clone(), one.v_cache.clone()
    with no_host_sync(), torch.no_grad():
        fastlm.attention_with_kv_cache(
            one.query, k_cache, v_cache, cache_seqlens=seqlens, backend="triton", **one.options
        )


@pytest.mark.parametrize("lengths", ["device", "host"])
def test_compiles_whole_and_writes_in_place(device, lengths):
    one = call((5, 5), device=device, rotary=16)
    expected = one("triton")
    k_cache, v_cache = one.k_cache.clone(), one.v_cache.clone()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(query, k_cache, v_cache, seqlens, key, value):
        tables = {name: one.options[name] for name in ("rotary_cos", "rotary_sin")}
        return fastlm.attention_with_kv_cache(
            query * 1.0, k_cache, v_cache, cache_seqlens=seqlens, key=key, value=value,
            backend="triton", **tables,
        )  # fmt: skip

    seqlens = 5 if lengths == "host" else one.seqlens
    with torch.no_grad():
        tokens = (one.options["key"], one.options["value"])
        out = step(one.query, k_cache, v_cache, seqlens, *tokens)
    assert torch.equal(out, expected[0])
    assert same(k_cache, expected[2]).all()
    assert same(v_cache, expected[3]).all()


def test_the_operator_is_registered_as_torch_wants_it(device):
    one = call((5, 9), device=device, page_size=16)
    # opcheck compares tensors, and NaN is not NaN
    cleared = [x.nan_to_num(0.0) for x in (one.k_cache, one.v_cache)]
    arguments = (one.query, *cleared, *one.arguments()[3:], "triton")
    torch.library.opcheck(torch.ops.fastlm.attention_with_kv_cache_forward.default, arguments)


def test_checked_runs_beside_it(device):
    one = call(LENGTHS, 2, device=device, rotary=16)
    expected = one("triton")
    with fastlm.checked():
        assert_equal(one("triton"), expected)


def test_autograd_knows_what_was_written(device):
    one = call((5,), device=device)
    weight = torch.ones_like(one.k_cache).requires_grad_()
    k_cache = one.k_cache.nan_to_num(0.0)
    total = (k_cache * weight).sum()
    with torch.no_grad():
        fastlm.attention_with_kv_cache(
            one.query, k_cache, one.v_cache, cache_seqlens=5, backend="triton", **one.options
        )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_autocast_follows_the_caches(device):
    one = call((5,), dtype=torch.bfloat16, device=device)
    wide = {name: x.float() for name, x in one.options.items()}
    with torch.autocast(device, torch.bfloat16), torch.no_grad():
        out = fastlm.attention_with_kv_cache(
            one.query.float(), *list(one.tensors().values())[1:], cache_seqlens=5, **wide
        )
    assert torch.equal(out, one("auto")[0])


def test_explain_names_the_backend(device):
    one = call((5,), device=device)
    steps = fastlm.explain(
        "attention_with_kv_cache", one.query, one.k_cache, one.v_cache,
        cache_seqlens=one.seqlens, **one.options,
    ).steps  # fmt: skip
    assert steps["forward"].backend == ("triton" if device == "cuda" else "torch")


# ---- wrong arguments


def wrong(**changes):
    one = call((5, 9), 2, heads=4, kv_heads=2)
    arguments = {
        "query": one.query, "k_cache": one.k_cache, "v_cache": one.v_cache,
        "cache_seqlens": 5, **one.options, **changes,
    }  # fmt: skip
    return fastlm.attention_with_kv_cache(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cache_seqlens": 99}, ValueError, "cache_seqlens must be from 0 to 98, .* got 99"),
        ({"cache_seqlens": -1}, ValueError, "cache_seqlens must be from 0 to 98, .* got -1"),
        ({"cache_seqlens": 1.0}, TypeError, "cache_seqlens must be an integer, got float"),
        ({"cache_seqlens": torch.zeros(2)}, TypeError, "cache_seqlens must be one of int32, int64"),
        ({"cache_seqlens": torch.zeros(3, dtype=torch.int32)}, ValueError, r"shape \(2,\)"),
        ({"key": None}, ValueError, "value must come with key"),
        ({"value": None}, ValueError, "value must come with key"),
        ({"k_cache": torch.zeros(2, 9, 2, 8)}, ValueError, "k_cache must have shape"),
        ({"k_cache": torch.zeros(2, 100, 3, 16)}, ValueError, "v_cache must have shape"),
        ({"key": torch.zeros(2, 1, 2, 16)}, ValueError, "key must have shape"),
        ({"query": torch.zeros(2, 2, 4, 16).half()}, TypeError, "k_cache must have the dtype of"),
        ({"query": torch.zeros(2, 0, 4, 16)}, ValueError, "query must have T of at least 1"),
        ({"query": torch.zeros(2, 2, 3, 16)}, ValueError, "number of heads that divides query's"),
        ({"rotary_cos": torch.zeros(100, 8)}, ValueError, "rotary_sin must come with"),
        (
            {"rotary_cos": torch.zeros(100, 9), "rotary_sin": torch.zeros(100, 9)},
            ValueError, "rotary_cos must rotate at most 16, got 18",
        ),
        (
            {"rotary_cos": torch.zeros(6, 8), "rotary_sin": torch.zeros(6, 8)},
            ValueError, "cache_seqlens must be from 0 to 4",
        ),
        ({"block_table": torch.zeros(2, 3)}, TypeError, "block_table must be one of int32"),
        ({"scale": torch.tensor(0.3)}, TypeError, "scale must be a number, got Tensor"),
        ({"k_cache": torch.zeros(100, 2, 16).expand(2, -1, -1, -1)}, ValueError, "memory of its"),
        ({"window_size": 0}, ValueError, "window_size must be at least 1, got 0"),
        ({"num_splits": 0}, ValueError, "num_splits must be at least 1, got 0"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive and finite"),
        ({"k_cache": torch._neg_view(torch.zeros(2, 100, 2, 16))}, ValueError, "resolve_neg"),
        ({"v_cache": torch._neg_view(torch.zeros(2, 100, 2, 16))}, ValueError, "v_cache must be n"),
        ({"sinks": torch.zeros(3)}, ValueError, "sinks must have shape"),
        ({"query": torch.zeros(2, 2, 4, 16).requires_grad_()}, ValueError, "no_grad"),
        ({"sinks": torch.zeros(4).requires_grad_()}, ValueError, "sinks must not require"),
        ({"backend": "gluon"}, NotImplementedError, "no gluon backend"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)  # fmt: skip
def test_wrong_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=f"attention_with_kv_cache.*{message}"):
        wrong(**changes)


# ---- fuzz


def random_call(seed, device="cpu"):
    rng = random.Random(seed)
    kv_heads = rng.choice((1, 2))
    num_queries = rng.choice((1, 1, 2, 5, 17))
    head_dim = rng.choice((4, 8, 13, 16))
    capacity = rng.choice((20, 60, 200))
    options = {"appends": rng.random() < 0.7}
    new = num_queries if options["appends"] else 0
    if rng.random() < 0.5:
        options["page_size"] = rng.choice((1, 7, 16, 64))
    if options["appends"] and rng.random() < 0.6:
        options |= {
            "rotary": rng.choice((4, head_dim // 2 * 2)),
            "rotary_interleaved": rng.random() < 0.5,
        }
    heads = kv_heads * rng.choice((1, 2, 9))
    for name, value in (
        ("window_size", rng.choice((1, 5, 40, 1000))),
        ("softcap", rng.choice((0.5, 20.0))),
        ("sinks", torch.randn(heads, device=device)),
        ("scale", rng.choice((0.0, -0.7, 2.0))),
        ("value_dim", rng.choice((3, 16))),
    ):
        if rng.random() < 0.3:
            options[name] = value
    lengths = [rng.randint(0, capacity - new) for _ in range(rng.choice((1, 2, 3)))]
    dtype = rng.choice(DTYPES)
    return call(
        lengths, num_queries, heads, kv_heads, head_dim, dtype, device,
        capacity=capacity, seed=seed, **options,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["triton", "cuda", "torch"])
@pytest.mark.parametrize(
    "seeds", [range(8), pytest.param(range(8, 200), marks=pytest.mark.slow)], ids=len
)
def test_random_calls(device, backend, seeds):
    judge_pooled([random_call(seed, device) for seed in seeds], backend)


def test_the_real_plans(real_plans, device):
    for num_queries, head_dim in ((1, 16), (1, 80), (20, 16)):
        judge(call((300,), num_queries, device=device, head_dim=head_dim, capacity=400), "triton")
    assert tuning.SPLIT_KEYS % 128 == 0
