"""Bugs planted in attention_with_kv_cache: each must make a short check fail."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.interpreter import interpreted_only
from support.kv_cache import call, judge, same, small_splits
from support.memory import guarded, sparse
from support.mutants import Mutant, killed

import fastlm

APPEND = "kernels/attention_with_kv_cache/append.py"
CACHE = "kernels/attention_with_kv_cache/cache.py"
DECODE = "kernels/attention_with_kv_cache/decode.py"
LAUNCH = "kernels/attention_with_kv_cache/launch.py"
TORCH = "fastlm/ops/eager/attention_with_kv_cache.py"


def accurate() -> None:
    """Several splits, shared keys, a window, sinks, both ways of turning."""
    with small_splits():
        judge(call((37, 63, 5), 2, 4, 2, head_dim=8, rotary=6), "triton")
        sinks = torch.tensor([0.7, -1.2])
        rotary = {"rotary": 8, "rotary_interleaved": True}
        judge(call((40,), 3, head_dim=8, window_size=20, sinks=sinks, **rotary), "triton")


def paged() -> None:
    with small_splits():
        judge(call((37, 20), 2, head_dim=8, value_dim=7, page_size=7, rotary=8), "triton")


def inside() -> None:
    """Full caches, and rows that are beyond them, at the edge of memory."""
    with small_splits():
        for end, lengths in (("back", (17, 18)), ("back", (2**30, 19)), ("front", (-1, 18))):
            one = dataclasses.replace(call((0, 0), 2, capacity=20), lengths=list(lengths))
            tensors = [guarded(x, end) for x in (one.query, one.k_cache, one.v_cache)]
            options = {name: guarded(x) for name, x in one.options.items()}
            fastlm.attention_with_kv_cache(
                *tensors, cache_seqlens=one.seqlens, backend="triton", **options
            )


def missing() -> None:
    """A page that new tokens need is none, beside memory that may not be touched."""
    with small_splits():
        one = call((30,), 2, page_size=10, capacity=40)
        one.options["block_table"][0, 3] = -1
        tensors = [guarded(x, "front") for x in (one.query, one.k_cache, one.v_cache)]
        fastlm.attention_with_kv_cache(
            *tensors, cache_seqlens=one.seqlens, backend="triton", **one.options
        )


def refused() -> None:
    """A row that does not fit, or lacks a page, is NaN, and writes nothing."""
    with small_splits():
        one = dataclasses.replace(call((0, 5), 2), lengths=[99, 5])
        short = call((25, 25), 2, page_size=10, capacity=40)
        short.options["block_table"][0, 1] = -1
        new = call((30, 25), 2, page_size=10, capacity=40)
        new.options["block_table"][0, 3] = -1
        unsplit = dataclasses.replace(call((0, 5), 2, capacity=12), lengths=[11, 5])
        for refusing in (one, short, new, unsplit):
            out, lse, k_cache, _ = refusing("triton")
            assert out[0].isnan().all()
            assert lse[0].isnan().all()
            assert out[1].isfinite().all()
            written = ~same(k_cache, refusing.k_cache)
            assert written.sum() == 2 * 16


def wide() -> None:
    one = call((3,), 1, 1, 1, head_dim=4, capacity=5)
    expected = one("triton")
    tensors = one.tensors()
    for name in ("k_cache", "v_cache"):
        far = sparse((1, 5, 1, 4), (20, 2**30 + 64, 4, 1), torch.float32)
        tensors[name] = far.copy_(tensors[name])
    out = fastlm.attention_with_kv_cache(
        **tensors, cache_seqlens=one.seqlens, backend="triton", **one.options
    )
    assert torch.equal(out, expected[0])


def eight_bits() -> None:
    """Scales of two heads with strides of their own, what is stored and what is read."""
    with small_splits():
        one = call((37, 20), 2, 4, 2, head_dim=8, value_dim=7, page_size=7, int8=True)
        apart = torch.full((*one.options["v_scale"].shape, 3), torch.nan)[..., 1]
        one.options["v_scale"] = apart.copy_(one.options["v_scale"])
        # a copy of the call's arguments would be contiguous
        written = {name: x.clone() for name, x in one.written.items()} | {"v_scale": apart}
        out = fastlm.attention_with_kv_cache(
            one.query, cache_seqlens=one.seqlens, backend="triton", **(one.options | written)
        )
        judge(one, "triton")
        torch.testing.assert_close(out, one("reference")[0])
        assert same(apart, one("reference")[5]).all()
        judge(call((3,), 1, head_dim=8, int8=True), "triton")


def eight_bits_inside() -> None:
    """The same at the edge of memory, and beyond it."""
    with small_splits():
        for lengths in ((17, 18), (2**30, 18)):
            one = dataclasses.replace(call((0, 0), 2, capacity=20, int8=True), lengths=[*lengths])
            tensors = {name: guarded(x) for name, x in {**one.options, **one.tensors()}.items()}
            fastlm.attention_with_kv_cache(**tensors, cache_seqlens=one.seqlens, backend="triton")


def packed() -> None:
    """Counts for each of three launches, more than 128 rows, and splits at both kinds of place."""
    with small_splits():
        judge(call((37, 5, 50), 20, 4, 1, head_dim=4).with_counts((4, 20, 16)), "triton")
        judge(call((37, 5), 20, 16, 1, head_dim=4).with_counts((3, 20)), "triton")
        counts = [row in (0, 127, 128, 139) for row in range(140)]
        rows = call([row % 7 for row in range(140)], 1, 1, 1, 4, capacity=9)
        judge(rows.with_counts(counts), "triton")


MUTANTS = [
    (Mutant("heads are dealt out", DECODE, "kv_head * group_size + pairs % group_size",
            "pairs % group_size * kv_heads + kv_head"), accurate),
    (Mutant("one key too many", DECODE, "stored = keys < length", "stored = keys <= length"),
     accurate),
    (Mutant("the ends are not aligned", DECODE, "offset = length - count",
            "offset = length - 1"), accurate),
    (Mutant("a sink for every split", DECODE, "inside & (split == 0)", "inside"), accurate),
    (Mutant("splits that are not there are summed", DECODE,
            "    there = tl.cdiv(tl.maximum(length, 1), split_keys)", "    there = splits"),
     accurate),
    (Mutant("the largest weight for their sum", DECODE, "total += tl.sum(weight, 0)",
            "total += tl.max(weight, 0)"), accurate),
    (Mutant("splits are not weighted", DECODE, "part * weight[:, None]", "part"), accurate),
    (Mutant("the lse keeps its base", DECODE, "(largest + tl.log2(total)) * LN_2",
            "largest + tl.log2(total)"), accurate),
    (Mutant("a window hides too much", DECODE, "offset + 1 - window, 0)",
            "offset + 17 - window, 0)"), accurate),
    (Mutant("queries turn at the beginning", DECODE, "inside & fits, queries + offset",
            "inside & fits, queries"), accurate),
    (Mutant("keys turn at the beginning", APPEND, "inside, positions, cos_ptr",
            "inside, tokens, cos_ptr"), accurate),
    (Mutant("no partner", CACHE, "cols ^ 1", "cols"), accurate),
    (Mutant("halves turn alike", CACHE, "tl.where(is_first[None, :], -sin, sin)", "sin"), accurate),
    (Mutant("the first slot of a page", CACHE, "tokens % page_size * stride_token",
            "tokens * stride_token"), paged),
    (Mutant("one table for all rows", CACHE, "table_ptr + row * max_pages + tokens // page_size",
            "table_ptr + tokens // page_size"), paged),
    (Mutant("the append may pass the end", CACHE, "(start <= capacity - new)",
            "(start <= capacity)"), inside),
    (Mutant("lengths below 0 count", CACHE, "(start >= 0) & (start", "(start"), inside),
    (Mutant("a row that does not fit is written", APPEND,
            "inside = (tokens < count) & fits", "inside = tokens < count"), inside),
    (Mutant("one page is enough", CACHE, "all_exist = tl.min(", "all_exist = tl.max("), refused),
    (Mutant("pages of new tokens are not looked at", APPEND,
            "tl.where(fits, start + count, 0)", "tl.where(fits, start, 0)"), missing),
    (Mutant("pages are not looked at before they are read", DECODE,
            "fits = fits & pages_exist(", "fits = fits | pages_exist("), missing),
    (Mutant("a row that does not fit is 0", DECODE, "out = tl.where(fits, out,",
            "out = tl.where(split >= 0, out,"), refused),
    (Mutant("32-bit offsets", CACHE, "tokens = tokens.to(tl.int64)\n", "pass\n"), wide),
    (Mutant("room for fewer splits", LAUNCH, "max(1, triton.cdiv(longest, tuning.SPLIT_KEYS))",
            "max(1, longest // tuning.SPLIT_KEYS - 4)"), accurate),
    (Mutant("scores keep the scale of integers", DECODE, "scores *= k_scale.to(ACC)[None, :]",
            "pass"), eight_bits),
    (Mutant("values keep it", DECODE, "v.to(ACC) * v_scale.to(ACC)[:, None]", "v.to(ACC)"),
     eight_bits),
    (Mutant("one scale for all heads", DECODE, "kv_head * stride_ksg + offsets", "offsets"),
     eight_bits),
    (Mutant("a scale from the first token", DECODE, "stride_vsb, stride_vss, IS_PAGED",
            "stride_vsb, 0, IS_PAGED"), eight_bits),
    (Mutant("one scale for all heads is written", APPEND, "at + heads * stride_vsg", "at"),
     eight_bits),
    (Mutant("integers are cut off", CACHE, "(ratio + 12582912.0) - 12582912.0", "ratio"),
     eight_bits),
    (Mutant("128 parts", CACHE, "tl.full(largest.shape, 127.0, ACC)",
            "tl.full(largest.shape, 128.0, ACC)"), eight_bits),
    (Mutant("a scale of what does not fit is written", APPEND,
            "tl.store(k_scale_ptr + at + heads * stride_ksg, scale, mask=inside)",
            "tl.store(k_scale_ptr + at + heads * stride_ksg, scale)"), eight_bits_inside),
    (Mutant("a scale behind the last is read", DECODE,
            "k_scale_ptr + kv_head * stride_ksg + offsets, mask=stored, other=0.0",
            "k_scale_ptr + kv_head * stride_ksg + offsets"), eight_bits_inside),
    (Mutant("rows behind the first 128 are not found", CACHE,
            "for start in range(0, rows, 128):\n        candidates",
            "for start in range(0, 1, 128):\n        candidates"), packed),
    (Mutant("a program for each row alone", CACHE, "bounds * per_token // BLOCK + candidates",
            "bounds * 0 + candidates"), packed),
    (Mutant("all queries are the last row's", DECODE, "offset = length - count",
            "offset = length - num_queries"), packed),
    (Mutant("no launch takes a row of 16 pairs", DECODE, "(pairs > most)", "(pairs >= most)"),
     packed),
    (Mutant("queries from the first token on", DECODE,
            "tokens = first_token + queries.to(tl.int64)", "tokens = queries.to(tl.int64)"),
     packed),
    (Mutant("keys from the first token on", APPEND, "(first_token + tokens).to(tl.int64)",
            "tokens.to(tl.int64)"), packed),
    (Mutant("rows write over each other's splits", DECODE,
            "tl.where(row_slots > 0, row * row_slots, first_token)", "first_token * 0"), packed),
    (Mutant("long rows are put together too", DECODE,
            "(pairs > least) & (pairs <= most)", "pairs > least"), packed),
    (Mutant("one query of a row is put together", DECODE, "for query in range(queries):",
            "for query in range(tl.minimum(queries, 1)):"), packed),
]  # fmt: skip


@interpreted_only
@pytest.mark.slow
@pytest.mark.parametrize(("mutant", "check"), MUTANTS, ids=lambda x: getattr(x, "name", ""))
def test_a_planted_bug_is_noticed(mutant, check):
    assert killed(mutant, check)
