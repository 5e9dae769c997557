"""flash_attn's functions: their arguments, their meaning, and a refusal by name of the rest."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch

import fastlm
from fastlm.compat.flash_attn import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from fastlm.testing import assert_all_as_accurate, assert_as_accurate, attention_inputs, run

DENSE = {
    "q": ..., "k": ..., "v": ..., "dropout_p": 0.0, "softmax_scale": None, "causal": False,
    "window_size": (-1, -1), "softcap": 0.0, "alibi_slopes": None, "deterministic": False,
    "return_attn_probs": False,
}  # fmt: skip
PACKED = {
    "q": ..., "k": ..., "v": ..., "cu_seqlens_q": ..., "cu_seqlens_k": ..., "max_seqlen_q": ...,
    "max_seqlen_k": ..., "dropout_p": 0.0, "softmax_scale": None, "causal": False,
    "window_size": (-1, -1), "softcap": 0.0, "alibi_slopes": None, "deterministic": False,
    "return_attn_probs": False, "block_table": None,
}  # fmt: skip

CACHED = {
    "q": ..., "k_cache": ..., "v_cache": ..., "k": None, "v": None, "rotary_cos": None,
    "rotary_sin": None, "cache_seqlens": None, "cache_batch_idx": None, "cache_leftpad": None,
    "block_table": None, "softmax_scale": None, "causal": False, "window_size": (-1, -1),
    "softcap": 0.0, "rotary_interleaved": True, "alibi_slopes": None, "num_splits": 0,
    "return_softmax_lse": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (flash_attn_func, DENSE),
        (flash_attn_varlen_func, PACKED),
        (flash_attn_with_kvcache, CACHED),
    ],
)
def test_has_the_signature_of_version_2_8(function, names):
    found = inspect.signature(function).parameters.values()
    assert {p.name: ... if p.default is p.empty else p.default for p in found} == names
    assert [p.name for p in found] == list(names)
    assert {p.kind for p in found} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def defined(q, k, v, *, left, right, softcap=0.0, softmax_scale=None):
    """Key j is seen when i + S - T - left <= j <= i + S - T + right; -1 is no limit."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(q.shape[1], device=q.device)[:, None] + k.shape[1] - q.shape[1]
    key = torch.arange(k.shape[1], device=q.device)
    seen = (left < 0) | (key >= position - left)
    seen &= (right < 0) | (key <= position + right)
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1).nan_to_num()
    return torch.einsum("bhts,bshd->bthd", weights, v)


def assert_is_defined(function, *inputs, plain, multiple=2.0):
    results = [run(f, *inputs) for f in (function, plain)]
    truth = run(plain, *inputs, dtype=torch.float64)
    assert_all_as_accurate(
        "flash_attn", results[0], plain=results[1], truth=truth, multiple=multiple
    )


@pytest.mark.parametrize(("queries", "keys"), [(60, 60), (33, 70), (70, 33), (1, 50)])
@pytest.mark.parametrize(
    ("options", "left", "right"),
    [
        ({"causal": True}, -1, 0),
        ({"window_size": (-1, 0)}, -1, 0),
        ({"causal": True, "window_size": (7, 0)}, 7, 0),
        ({"causal": True, "window_size": [2, 5]}, 2, 0),
        ({"window_size": (20, 0), "softmax_scale": 0.3}, 20, 0),
    ],
    ids=str,
)
def test_windows_are_aligned_at_the_ends(device, queries, keys, options, left, right):
    inputs = attention_inputs(2, queries, keys, 4, 2, 16, device=device)

    def plain(q, k, v):
        scale = options.get("softmax_scale")
        return defined(q, k, v, left=left, right=right, softmax_scale=scale)

    assert_is_defined(lambda *x: flash_attn_func(*x, **options), *inputs, plain=plain)


def test_a_window_of_0_is_the_key_of_its_own_position(device):
    query, key, value = attention_inputs(2, 5, 9, 2, 2, 16, device=device)
    assert torch.equal(flash_attn_func(query, key, value, window_size=(0, 0)), value[:, 4:])


def test_softcap(device):
    inputs = attention_inputs(2, 33, 40, 4, 2, 16, device=device)
    assert_is_defined(
        lambda *x: flash_attn_func(*x, causal=True, softcap=0.7, deterministic=True),
        *inputs,
        plain=lambda *x: defined(*x, left=-1, right=0, softcap=0.7),
        multiple=3.0,
    )


def test_a_single_query_sees_all_keys_without_being_causal(device):
    inputs = attention_inputs(2, 1, 40, 4, 2, 16, device=device)
    assert torch.equal(flash_attn_func(*inputs), flash_attn_func(*inputs, causal=True))
    wide = flash_attn_func(*inputs, window_size=(5, 5))
    assert torch.equal(wide, flash_attn_func(*inputs, causal=True, window_size=(5, 0)))


def test_single_queries_of_packed_sequences_see_all_keys_without_being_causal(device):
    query, key, value = (x[0] for x in attention_inputs(1, 2, 40, 4, 2, 16, device=device))
    bounds = [torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 1, 2], [0, 9, 40])]
    packed = flash_attn_varlen_func(query, key, value, *bounds, 1, 31)
    assert torch.equal(
        packed, flash_attn_varlen_func(query, key, value, *bounds, 1, 31, causal=True)
    )
    alone = flash_attn_func(query[None, 1:], key[None, 9:], value[None, 9:])
    torch.testing.assert_close(packed[1:], alone[0])
    wide = flash_attn_varlen_func(query, key, value, *bounds, 1, 31, window_size=(5, 5))
    alone = flash_attn_func(query[None, 1:], key[None, 34:], value[None, 34:])
    torch.testing.assert_close(wide[1:], alone[0])


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("window_size", [(-1, -1), (4, 0)])
def test_packed_sequences(device, window_size, softcap):
    lengths_q, lengths_k = (12, 1, 0, 30), (12, 40, 3, 25)
    bounds_q, bounds_k = (
        torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32, device=device)
        for x in (lengths_q, lengths_k)
    )
    # two more queries and keys than any sequence has
    inputs = [x[0] for x in attention_inputs(1, 45, 82, 4, 2, 16, device=device)]
    options = {"causal": True, "window_size": window_size, "softcap": softcap}

    def plain(q, k, v):
        parts = (x.split((*lengths, 2)) for x, lengths in zip(
            (q, k, v), (lengths_q, lengths_k, lengths_k), strict=True
        ))  # fmt: skip
        outs = [
            defined(*(x[None] for x in part), left=window_size[0], right=0, softcap=softcap)[0]
            for part in zip(*parts, strict=True)
        ]
        return torch.cat([*outs[:-1], torch.zeros_like(outs[-1])])

    def packed(q, k, v):
        # the longest lengths are not looked at
        return flash_attn_varlen_func(q, k, v, bounds_q, bounds_k, 1, None, **options)

    assert_is_defined(packed, *inputs, plain=plain, multiple=3.0 if softcap else 2.0)


def test_is_causal_attention_and_differentiable(device):
    inputs = attention_inputs(1, 20, 20, 2, 2, 16, torch.bfloat16, device)
    ours = run(fastlm.causal_attention, *inputs, window_size=8, scale=0.2)
    theirs = run(lambda *x: flash_attn_func(*x, 0.0, 0.2, True, (7, -1), 0.0, None, True), *inputs)
    for got, want in zip(theirs, ours, strict=True):
        assert torch.equal(got, want)


REFUSED = {
    "dropout_p": (0.1, "dropout_p must be 0, got 0.1"),
    "alibi_slopes": (torch.zeros(2), "alibi_slopes must be None, got Tensor"),
    "return_attn_probs": (True, "return_attn_probs must be False, got True"),
    "causal": (False, r"causal must be True, or window_size end with 0, got causal=False and "
               r"window_size=\(-1, -1\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(name):
    value, message = REFUSED[name]
    query, key, value_ = attention_inputs(1, 6, 6, 2, 2, 8)
    bounds = torch.tensor([0, 6], dtype=torch.int32)
    options = {"causal": True, name: value}
    with pytest.raises(NotImplementedError, match=f"flash_attn_func: {message}"):
        flash_attn_func(query, key, value_, **options)
    packed = query[0], key[0], value_[0], bounds, bounds, 6, 6
    with pytest.raises(NotImplementedError, match=f"flash_attn_varlen_func: {message}"):
        flash_attn_varlen_func(*packed, **options)


def test_a_block_table_and_a_window_to_the_right_are_refused():
    query, key, value = (x[0] for x in attention_inputs(1, 1, 6, 2, 2, 8))
    bounds = torch.tensor([0, 1]), torch.tensor([0, 6])
    with pytest.raises(NotImplementedError, match="block_table must be None, got Tensor"):
        flash_attn_varlen_func(
            query, key, value, *bounds, 1, 6, causal=True, block_table=torch.zeros(1, 1)
        )
    # of packed sequences nobody knows on the host whether they have one query each, if not told
    for longest in (2, None, torch.tensor(1)):
        with pytest.raises(NotImplementedError, match="causal must be True"):
            flash_attn_varlen_func(query, key, value, *bounds, longest, 6)
    with pytest.raises(NotImplementedError, match=r"window_size=\(3, 1\)"):
        flash_attn_func(query[None].expand(1, 2, 2, 8), key[None], value[None], window_size=(3, 1))


def test_refuses_what_means_nothing():
    query, key, value = attention_inputs(1, 6, 6, 2, 2, 8)
    with pytest.raises(ValueError, match=r"flash_attn_func: q must have shape \(B, T, H, D\)"):
        flash_attn_func(query[0], key, value, causal=True)
    with pytest.raises(TypeError, match="flash_attn_func: q must be a tensor, got list"):
        flash_attn_func([1.0], key, value, causal=True)
    with pytest.raises(ValueError, match=r"window_size must be a pair \(left, right\), got 3"):
        flash_attn_func(query, key, value, causal=True, window_size=3)
    with pytest.raises(TypeError, match="window_size must be an integer, got float"):
        flash_attn_func(query, key, value, causal=True, window_size=(3.0, 0))
    with pytest.raises(ValueError, match="softcap must be 0 or positive, got -1"):
        flash_attn_func(query, key, value, causal=True, softcap=-1.0)
    bounds = torch.tensor([0, 6])
    with pytest.raises(ValueError, match=r"flash_attn_varlen_func: k must have shape \(total_k, "):
        flash_attn_varlen_func(query[0], key, value, bounds, bounds, 6, 6, causal=True)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("k", lambda x: x[..., :7], r"k must have shape \((1, S|total_k), G, 8\) to match q, got"),
        ("k", lambda x: x[..., :0, :], "v must have shape"),
        ("v", lambda x: x[..., :5, :, :], r"v must have shape \((1, )?6, 2, Dv\) to match k, got"),
        ("v", lambda x: None, "v must be a tensor, got NoneType"),
        ("q", lambda x: x[..., :1, :], "k must have a number of heads that divides q's, got 2 for"),
    ],
)
def test_errors_have_the_names_and_shapes_of_the_caller(name, change, message):
    tensors = dict(zip("qkv", attention_inputs(1, 6, 6, 2, 2, 8), strict=True))
    bounds = torch.tensor([0, 6])
    packed = {key: x[0] for key, x in tensors.items()}
    tensors[name], packed[name] = change(tensors[name]), change(packed[name])
    with pytest.raises((ValueError, TypeError), match=f"flash_attn_func: {message}"):
        flash_attn_func(**tensors, causal=True)
    with pytest.raises((ValueError, TypeError), match=f"flash_attn_varlen_func: {message}"):
        flash_attn_varlen_func(*packed.values(), bounds, bounds, 6, 6, causal=True)


def test_softcap_is_a_number():
    with pytest.raises(TypeError, match="flash_attn_func: softcap must be "):
        flash_attn_func(*attention_inputs(1, 6, 6, 2, 2, 8), causal=True, softcap=None)


# ---- over a cache


def cached(num_queries, lengths=(30, 0), device="cpu", rows=(0, 1), size=60):
    """q, both caches of two rows more than needed, k, v."""
    batch, generator = len(lengths), torch.Generator().manual_seed(1)
    count = max(rows) + 3
    shapes = [(batch, num_queries, 4, 16), *[(count, size, 2, 16)] * 2]
    shapes += [(batch, num_queries, 2, 16)] * 2
    q, k_cache, v_cache, k, v = (torch.randn(s, generator=generator).to(device) for s in shapes)
    for row in range(count):
        # what nothing may read
        length = lengths[rows.index(row)] if row in rows else 0
        k_cache[row, length:], v_cache[row, length:] = torch.nan, torch.nan
    return q, k_cache, v_cache, k, v


def angles(device, count=60, pairs=6):
    x = torch.linspace(0, 5, count * pairs, device=device).view(count, pairs)
    return x.cos(), x.sin()


def defined_over_cache(
    q, k_cache, v_cache, k, v, lengths, rows=(0, 1), tables=None, interleaved=True, **options
):
    """Row by row.  The caches are not written; what they must hold is returned beside the out."""
    outs, k_cache, v_cache = [], k_cache.clone(), v_cache.clone()
    for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        one, end = q[b : b + 1], length + q.shape[1]
        if k is None:
            end = length
        else:
            new = k[b : b + 1]
            if tables is not None:
                turns = (x[length:end].to(q.dtype) for x in tables)
                one, new = fastlm.apply_rotary(one, new, *turns, interleaved=interleaved)
            k_cache[row, length:end], v_cache[row, length:end] = new[0], v[b]
        stored = (x[row : row + 1, :end] for x in (k_cache, v_cache))
        outs.append(defined(one, *stored, right=0, **options))
    return torch.cat(outs), k_cache, v_cache


def assert_over_cache(inputs, lengths, call, **meaning):
    """``call`` of copies of the inputs gives, and writes, what the definition does."""
    q, k_cache, v_cache, *_ = inputs
    written = k_cache.clone(), v_cache.clone()
    out = call(q, *written)
    plain, *_ = defined_over_cache(*inputs, lengths, **meaning)
    wide = (None if x is None else x.double() for x in inputs)
    truth, *stored = defined_over_cache(*wide, lengths, **meaning)
    assert_as_accurate("out", out, plain=plain, truth=truth)
    for got, want in zip(written, stored, strict=True):
        torch.testing.assert_close(got, want.float(), equal_nan=True)


@pytest.mark.parametrize("num_queries", [1, 5])
@pytest.mark.parametrize(
    ("options", "meaning"),
    [
        ({"causal": True}, {"left": -1}),
        ({"window_size": (-1, 0)}, {"left": -1}),
        ({"causal": True, "window_size": (7, 3)}, {"left": 7}),
        ({"window_size": (7, 0), "softcap": 0.7}, {"left": 7, "softcap": 0.7}),
        (
            {"causal": True, "softmax_scale": 0.6, "num_splits": 3},
            {"left": -1, "softmax_scale": 0.6},
        ),
    ],
    ids=str,
)
def test_a_cache_is_extended_and_attended_over(device, num_queries, options, meaning):
    inputs, lengths = cached(num_queries, device=device), (30, 0)
    *_, k, v = inputs
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
    for tables in (None, angles(device)):
        turns = () if tables is None else tables

        def call(*tensors, turns=turns):
            names = dict(zip(("rotary_cos", "rotary_sin"), turns, strict=False))
            return flash_attn_with_kvcache(
                *tensors, k, v, cache_seqlens=seqlens, **names, **options
            )

        assert_over_cache(inputs, lengths, call, tables=tables, **meaning)


def test_rotation_pairs_neighbours_if_not_said_otherwise(device):
    inputs = cached(2, (30, 30), device=device)
    tables = angles(device)
    for interleaved, said in ((True, {}), (False, {"rotary_interleaved": False})):
        assert_over_cache(
            inputs,
            (30, 30),
            lambda *x, said=said: flash_attn_with_kvcache(
                *x, *inputs[3:], *tables, 30, causal=True, **said
            ),
            tables=tables,
            interleaved=interleaved,
            left=-1,
        )


@pytest.mark.parametrize("window_size", [(-1, -1), (4, 4)])
def test_a_single_query_sees_all_that_is_cached_without_being_causal(device, window_size):
    inputs = cached(1, device=device)
    seqlens = torch.tensor([30, 0], device=device)
    assert_over_cache(
        inputs,
        (30, 0),
        lambda *x: flash_attn_with_kvcache(
            *x, *inputs[3:], cache_seqlens=seqlens, window_size=window_size
        ),
        left=window_size[0],
    )


def test_without_lengths_the_caches_are_full(device):
    q, k_cache, v_cache, *_ = cached(3, (60, 60), device=device)
    inputs = q, k_cache[:2], v_cache[:2], None, None
    whole = [x[:2].reshape(12, 10, 2, 16) for x in (k_cache, v_cache)]
    table = torch.arange(12, dtype=torch.int32, device=device).view(2, 6)
    assert_over_cache(
        inputs, (60, 60), lambda *x: flash_attn_with_kvcache(*x, causal=True), left=-1
    )
    paged = flash_attn_with_kvcache(q, *whole, block_table=table, causal=True)
    torch.testing.assert_close(paged, flash_attn_with_kvcache(*inputs[:3], causal=True))


@pytest.mark.parametrize("lengths", ["host", "device"])
def test_rows_of_the_caches_are_chosen(device, lengths):
    rows = (4, 1)
    inputs = cached(3, (30, 30), device=device, rows=rows)
    index = torch.tensor(rows, dtype=torch.int32, device=device)
    seqlens = 30 if lengths == "host" else torch.tensor([30, 30], device=device)
    assert_over_cache(
        inputs,
        (30, 30),
        lambda *x: flash_attn_with_kvcache(
            *x, *inputs[3:], cache_seqlens=seqlens, cache_batch_idx=index, causal=True
        ),
        rows=rows,
        left=-1,
    )


def test_the_lse_comes_when_asked_for(device):
    q, k_cache, v_cache, *_ = cached(2, (60, 60), device=device)
    out, lse = flash_attn_with_kvcache(q, k_cache, v_cache, causal=True, return_softmax_lse=True)
    assert torch.equal(out, flash_attn_with_kvcache(q, k_cache, v_cache, causal=True))
    ours = fastlm.attention_with_kv_cache(
        q, k_cache[:2], v_cache[:2], cache_seqlens=60, return_lse=True
    )
    assert torch.equal(lse, ours[1])
    assert lse.shape == (2, 4, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache_leftpad": torch.zeros(2)}, "cache_leftpad must be None, got Tensor"),
        ({"alibi_slopes": torch.zeros(4)}, "alibi_slopes must be None, got Tensor"),
        ({"causal": False}, "causal must be True, or window_size end with 0"),
        ({"causal": False, "window_size": (3, 1)}, r"causal must be True, .*\(3, 1\)"),
        ({"k": torch.zeros(2, 1, 2, 16)}, "k must have as many tokens as q, 3, got 1"),
        (
            {"cache_batch_idx": torch.zeros(2).int(), "block_table": torch.zeros(2, 1).int()},
            "cache_batch_idx must be None with block_table",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_what_a_cache_cannot_have_is_refused_by_name(changes, message):
    q, k_cache, v_cache, k, v = cached(3)
    arguments = {"k": k, "v": v, "cache_seqlens": 5, "causal": True, **changes}
    with pytest.raises(NotImplementedError, match=f"flash_attn_with_kvcache: {message}"):
        flash_attn_with_kvcache(q, k_cache, v_cache, **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cache_seqlens": None}, ValueError, "cache_seqlens must be given with k"),
        ({"v": None}, ValueError, "v must come with k"),
        ({"k": None, "v": None, "rotary_cos": ...}, ValueError, "k must be given with rotary_cos"),
        ({"q": torch.zeros(3, 4, 16)}, ValueError, r"q must have shape \(B, T, H, D\)"),
        (
            {"q": torch.zeros(9, 3, 4, 16), "k": None, "v": None},
            ValueError,
            "k_cache must have a row",
        ),
        ({"k_cache": torch.zeros(2, 60, 2, 8)}, ValueError, "k_cache must have shape .* match q"),
        ({"v_cache": torch.zeros(2, 9, 2, 8)}, ValueError, "v_cache must have shape .* k_cache"),
        ({"k": torch.zeros(2, 3, 1, 16)}, ValueError, "k must have shape .* k_cache"),
        ({"q": torch.zeros(2, 3, 3, 16)}, ValueError, "k_cache must have a number of heads"),
        ({"cache_batch_idx": torch.zeros(3).int()}, ValueError, "cache_batch_idx must have shape"),
        ({"cache_batch_idx": torch.zeros(2)}, TypeError, "cache_batch_idx must be one of int32"),
        ({"num_splits": -1}, ValueError, "num_splits must be 0 or more, got -1"),
        ({"num_splits": 1.0}, TypeError, "num_splits must be an integer"),
        ({"softcap": -1.0}, ValueError, "softcap must be 0 or positive"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_errors_over_a_cache_have_the_names_of_the_caller(changes, error, message):
    q, k_cache, v_cache, k, v = cached(3)
    arguments = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    arguments |= {"cache_seqlens": 5, "causal": True, **changes}
    if "rotary_cos" in changes:
        arguments |= dict(zip(("rotary_cos", "rotary_sin"), angles("cpu"), strict=True))
    with pytest.raises(error, match=f"flash_attn_with_kvcache: {message}"):
        flash_attn_with_kvcache(**arguments)


def test_a_cache_that_cannot_hold_the_tokens_is_left_alone(device):
    q, k_cache, v_cache, k, v = cached(3, device=device)
    before = k_cache.clone()
    with pytest.raises(ValueError, match="cache_seqlens must be from 0 to 57"):
        flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=58, causal=True)
    torch.testing.assert_close(k_cache, before, equal_nan=True)
    with pytest.raises(ValueError, match="must not require a gradient"):
        flash_attn_with_kvcache(q.requires_grad_(), k_cache, v_cache, causal=True)
