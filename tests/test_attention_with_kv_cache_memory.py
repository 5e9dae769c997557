"""attention_with_kv_cache: which bytes it touches, and what becomes of rows that do not fit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.host_sync import no_host_sync
from support.interpreter import interpreted_only, permuted_grid
from support.kv_cache import (
    assert_equal,
    call,
    placed,
    same,
    small_splits,
)
from support.layouts import layouts
from support.memory import guarded, in_child, sparse
from support.poison import poisoned

import fastlm
from fastlm.ops.eager import attention_with_kv_cache as eager

ALL = {
    "window_size": 20, "softcap": 1.5, "sinks": torch.tensor([0.7, -1.2]), "rotary": 12,
    "page_size": 7, "value_dim": 11,
}  # fmt: skip
LENGTHS = (37, 0, 63)


@pytest.fixture(autouse=True)
def _small_splits():
    with small_splits():
        yield


@interpreted_only
def test_order_of_programs_changes_no_bit():
    one = call(LENGTHS, 5, **ALL)
    expected = one("triton")
    for seed in (1, 2):
        with permuted_grid(seed):
            assert_equal(one("triton"), expected)


def test_workspaces_need_no_clearing(device):
    one = call(LENGTHS, 2, device=device, **placed(ALL, device))
    expected = one("triton")
    for byte in (0, 255, 127):
        with poisoned(byte):
            assert_equal(one("triton"), expected)


@pytest.mark.parametrize("name", ["query", "k_cache", "v_cache", "key", "value"])
def test_layout_changes_no_bit(device, name):
    one = call((7, 12), 2, device=device, capacity=20, rotary=16)
    expected = one("triton")
    tensor = one.options[name] if name in one.options else getattr(one, name)
    for layout, view in layouts(tensor, last_contiguous=True):
        options = {"cache_seqlens": one.seqlens, **one.options}
        tensors = one.tensors()
        (options if name in options else tensors)[name] = view
        with torch.no_grad():
            out, lse = fastlm.attention_with_kv_cache(
                **tensors, **options, return_lse=True, backend="triton"
            )
        got = (out, lse, tensors["k_cache"], tensors["v_cache"])
        assert all(same(a, b).all() for a, b in zip(got, expected, strict=True)), layout


@interpreted_only
@pytest.mark.parametrize("end", ["back", "front"])
@pytest.mark.parametrize("page_size", [0, 7])
def test_nothing_outside_is_touched(end, page_size):
    one = call(
        (33, 0, 17), 3, value_dim=11, head_dim=13, capacity=36, page_size=page_size, rotary=8
    )

    def inside():
        tensors = [guarded(x, end) for x in (one.query, one.k_cache, one.v_cache)]
        options = {
            name: guarded(x, end) if torch.is_tensor(x) else x for name, x in one.options.items()
        }
        with torch.no_grad():
            fastlm.attention_with_kv_cache(
                *tensors, cache_seqlens=guarded(one.seqlens, end), backend="triton", **options
            )

    in_child(inside)


@interpreted_only
@pytest.mark.parametrize("name", ["k_cache", "v_cache", "query", "key", "value"])
def test_strides_beyond_32_bits(name):
    one = call((3, 5), 2, heads=2, kv_heads=2, head_dim=4, capacity=8)
    expected = one("triton")
    tensor = one.options[name] if name in one.options else getattr(one, name)
    for dim in range(3):
        strides = [*tensor.stride()]
        strides[dim] = 2**31 + 64
        far = sparse(tensor.shape, strides, tensor.dtype).copy_(tensor)
        options = {"cache_seqlens": one.seqlens, **one.options}
        tensors = one.tensors()
        (options if name in options else tensors)[name] = far
        with torch.no_grad():
            out = fastlm.attention_with_kv_cache(**tensors, **options, backend="triton")
        assert torch.equal(out, expected[0])
        assert same(tensors["k_cache"], expected[2]).all()
        assert same(tensors["v_cache"], expected[3]).all()


# ---- what does not fit


@pytest.mark.parametrize("lengths", [(98, 5), (-1, 5), (2**31 - 1, 5)], ids=str)
@pytest.mark.parametrize("page_size", [0, 10])
def test_a_row_that_does_not_fit_is_nan_and_its_neighbours_are_untouched(
    device, lengths, page_size
):
    fitting = call((0, 5), 3, device=device, capacity=100, page_size=page_size, rotary=16)
    one = dataclasses.replace(fitting, lengths=list(lengths))
    for run in (lambda: one("triton"), lambda: unread(one)):
        out, lse, k_cache, v_cache = run()
        assert out[0].isnan().all()
        assert lse[0].isnan().all()
        expected = fitting("torch")
        torch.testing.assert_close(out[1], expected[0][1])
        for got, before, usual in (
            (k_cache, one.k_cache, expected[2]),
            (v_cache, one.v_cache, expected[3]),
        ):
            ours = of_row(usual, fitting, 1)
            torch.testing.assert_close(of_row(got, fitting, 1), ours, equal_nan=True)
            changed = ~same(got, before)
            allowed = ~same(of_row(got, fitting, 1), of_row(before, fitting, 1))
            assert changed.sum() == allowed.sum()


def of_row(cache, one, row):
    table = one.options.get("block_table")
    return cache[row] if table is None else cache[table[row].long()]


def test_a_cache_without_a_row_that_fits_is_unchanged(device):
    one = dataclasses.replace(call((0, 0), device=device), lengths=[100, 101])
    for out, lse, k_cache, v_cache in (one("triton"), unread(one)):
        assert out.isnan().all()
        assert lse.isnan().all()
        assert same(k_cache, one.k_cache).all()
        assert same(v_cache, one.v_cache).all()


@pytest.mark.parametrize(
    ("length", "num_queries", "page_size", "at"), [(29, 2, 10, 3), (30, 1, 10, 3), (140, 1, 1, 135)]
)
def test_each_page_that_a_row_needs_is_looked_at(device, length, num_queries, page_size, at):
    """Those that new tokens reach, and those beyond what is looked at together."""
    one = call((length,), num_queries, device=device, page_size=page_size, capacity=150)
    one.options["block_table"][0, at] = 2**20
    for out, lse, k_cache, v_cache in (one("triton"), unread(one)):
        assert out.isnan().all()
        assert lse.isnan().all()
        assert same(k_cache, one.k_cache).all()
        assert same(v_cache, one.v_cache).all()


@pytest.mark.parametrize("wide", [-1 + 2**32, 2**32], ids=["minus one", "zero"])
def test_a_64_bit_page_is_not_cut_to_32(device, wide):
    one = call((5,), device=device, page_size=10)
    table = one.options["block_table"].long()
    table[0, 0] = wide
    out, *_ = one("triton", block_table=table)
    assert out.isnan().all()


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_caches_without_room(device, backend):
    nothing = call((0, 0), capacity=0, appends=False, device=device)
    out, lse, *_ = nothing(backend, cache_seqlens=0)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    none = call((), capacity=9, device=device)
    assert none(backend)[0].shape == (0, 1, 2, 16)


@pytest.mark.parametrize("page", [-1, 1000])
def test_a_page_that_is_none(device, page):
    one = call((25, 25), 2, device=device, page_size=10)
    one.options["block_table"][0, 1] = page
    one.options["block_table"][1, 3] = page  # which no token needs
    for out, _, k_cache, _ in (one("triton"), unread(one)):
        assert out[0].isnan().all()
        assert out[1].isfinite().all()
        table = one.options["block_table"][0, [0, *range(2, 10)]].long()
        assert same(k_cache[table], one.k_cache[table]).all()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_on_a_cpu_a_page_that_is_none_raises(backend):
    one = call((25,), 2, page_size=10)
    one.options["block_table"][0, 1] = 1000
    with pytest.raises(ValueError, match=r"block_table must name pages from 0 to 12 .* got .*1000"):
        one(backend)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_on_a_cpu_lengths_that_do_not_fit_raise_and_write_nothing(backend):
    one = call((5, 99), 2)
    k_cache = one.k_cache.clone()
    with pytest.raises(ValueError, match=r"cache_seqlens must be from 0 to 98, .* got \[5, 99\]"):
        fastlm.attention_with_kv_cache(
            one.query,
            k_cache,
            one.v_cache,
            cache_seqlens=one.seqlens,
            backend=backend,
            **one.options,
        )
    assert same(k_cache, one.k_cache).all()


def unread(one):
    """The torch backend as on a GPU, where it does not look at lengths."""
    written = [x.clone() for x in one.written.values()]
    *_, key, value, lengths, table, _, cos, sin, sinks, _, interleaved, scale, window, cap, _ = (
        one.arguments()
    )
    caches = eager._Caches(*written, *[None] * (4 - len(written)), table)
    capacity = caches.capacity if cos is None else min(caches.capacity, len(cos))
    with no_host_sync():
        out, lse = eager._unread(
            one.query, caches, key, value, lengths, capacity,
            None if cos is None else eager._Tables(cos, sin, interleaved),
            eager._Options(sinks, scale, window, cap),
        )  # fmt: skip
    return out, lse, *written


@pytest.mark.parametrize(
    "options",
    [{}, {"page_size": 7}, ALL, ALL | {"int8": True}],
    ids=["none", "pages", "all", "int8"],
)
@pytest.mark.parametrize("num_queries", [1, 5])
def test_torch_without_looking_gives_what_it_gives_looking(
    device, options, num_queries, monkeypatch
):
    monkeypatch.setattr(eager, "_WRITTEN_SCORES", 1 << 10)
    one = call(LENGTHS, num_queries, device=device, **placed(options, device))
    for got, want in zip(unread(one), one("torch"), strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)
