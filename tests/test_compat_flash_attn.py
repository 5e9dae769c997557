"""flash_attn's functions: their arguments, their meaning, and a refusal by name of the rest."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch

import fastlm
from fastlm.compat.flash_attn import flash_attn_func, flash_attn_varlen_func
from fastlm.testing import assert_all_as_accurate, attention_inputs, run

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


@pytest.mark.parametrize(
    ("function", "names"), [(flash_attn_func, DENSE), (flash_attn_varlen_func, PACKED)]
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
