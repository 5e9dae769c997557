"""The static key/value cache."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import tiny_model
from support.poison import poisoned

from fastlm.model.prefill import prefill
from fastlm.testing import assert_as_accurate

VARIANTS = [{"model_type": "qwen3"}, {"model_type": "llama", "num_key_value_heads": 1}]


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("pieces", [(20,), (1,) * 20, (7, 1, 5, 1, 6), (19, 1)])
@torch.inference_mode()
def test_pieces_give_the_logits_of_the_whole(pieces, changes, device):
    model = tiny_model(**changes).to(device)
    ids = torch.randint(320, (3, 20), device=device)
    # memory behind the length is NaN: reading it would show
    with poisoned():
        cache = model.new_cache(3, 30)
    parts = [model(part, cache=cache).logits for part in ids.split(pieces, dim=1)]
    truth = copy.deepcopy(model).double()(ids).logits
    assert_as_accurate("logits", torch.cat(parts, 1), plain=model(ids).logits, truth=truth)
    assert cache.length == 20


@torch.inference_mode()
def test_a_full_cache_raises_before_anything_is_written(device):
    model = tiny_model().to(device)
    ids = torch.randint(320, (2, 6), device=device)
    cache = model.new_cache(2, 8)
    model(ids, cache=cache)
    keys, values = cache.keys.clone(), cache.values.clone()
    with pytest.raises(
        ValueError, match="input must fit in the 2 of 8 tokens that are free, got 3"
    ):
        model(ids[:, :3], cache=cache)
    with pytest.raises(ValueError, match="input must have batch 2, got 1"):
        model(ids[:1, :1], cache=cache)
    assert cache.length == 6
    assert torch.equal(cache.keys.nan_to_num(), keys.nan_to_num())
    assert torch.equal(cache.values.nan_to_num(), values.nan_to_num())
    model(ids[:, :2], cache=cache)
    assert cache.length == cache.max_length == 8


@torch.inference_mode()
def test_reset_forgets_what_came_after(device):
    model = tiny_model().to(device)
    ids = torch.randint(320, (1, 12), device=device)
    cache = model.new_cache(1)
    assert cache.max_length == 64
    model(ids, cache=cache)
    cache.reset(5)
    again = model(ids[:, 5:], cache=cache).logits
    torch.testing.assert_close(again, model(ids).logits[:, 5:])
    with pytest.raises(ValueError, match=r"length must be in \[0, 12\], got 13"):
        cache.reset(13)


@pytest.mark.parametrize("max_length", [0, -1, 65])
def test_a_cache_beyond_the_context_is_refused(max_length):
    with pytest.raises(ValueError, match=rf"max_length must be in \[1, 64\].*, got {max_length}"):
        tiny_model().new_cache(1, max_length)


@pytest.mark.parametrize("lengths", [(1, 7, 3), (5, 5, 5), (20, 1, 20)])
@torch.inference_mode()
def test_sequences_of_any_lengths_give_the_logits_they_give_alone(lengths, device):
    model = tiny_model(num_key_value_heads=1).to(device)
    prompts = [torch.randint(320, (length,)).tolist() for length in lengths]
    more = torch.randint(320, (3, 4), device=device)
    with poisoned():
        cache = model.new_cache(3, 30)
    first = prefill(model, prompts, cache)
    assert cache.lengths == list(lengths) == cache.seqlens.tolist()
    parts = [first[:, None], *(model(ids, cache=cache).logits for ids in more.split((1, 3), 1))]
    got = torch.cat(parts, 1)
    double = copy.deepcopy(model).double()
    for row, prompt in enumerate(prompts):
        ids = torch.cat((torch.tensor([prompt], device=device), more[row : row + 1]), 1)
        plain, truth = (m(ids, logits_to_keep=5).logits for m in (model, double))
        assert_as_accurate("logits", got[row : row + 1], plain=plain, truth=truth)


@torch.inference_mode()
def test_sequences_leave_and_the_others_keep_their_tokens(device):
    model = tiny_model().to(device)
    prompts = [torch.randint(320, (length,)).tolist() for length in (4, 9, 2, 6)]
    cache = model.new_cache(4, 16)
    prefill(model, prompts, cache)
    keys = cache.keys.clone()
    cache.keep([0, 3])
    assert cache.lengths == [4, 6] == cache.seqlens.tolist() and cache.batch == 2
    assert torch.equal(cache.keys[:, 1, :6], keys[:, 3, :6])
    ids = torch.randint(320, (2, 1), device=device)
    want = model(torch.tensor([[*prompts[3], int(ids[1])]], device=device)).logits[0, -1]
    torch.testing.assert_close(model(ids, cache=cache).logits[1, -1], want)
    for rows in ([0, 0], [2], [-1]):
        with pytest.raises(ValueError, match="rows must be different ones below 2"):
            cache.keep(rows)


@torch.inference_mode()
def test_prompts_that_do_not_fit_are_refused_before_anything_is_written(device):
    model = tiny_model().to(device)
    cache = model.new_cache(2, 8)
    cache.keys.zero_()
    with pytest.raises(ValueError, match=r"input must fit in the 8 of 8 tokens .*, got 9"):
        prefill(model, [[1] * 3, [1] * 9], cache)
    with pytest.raises(ValueError, match="prompts must have at least one token each"):
        prefill(model, [[1], []], cache)
    assert cache.lengths == [0, 0] and not cache.keys.any()
    prefill(model, [[1], [1, 2]], cache)
    with pytest.raises(ValueError, match=r"cache must be empty, got lengths \[1, 2\]"):
        prefill(model, [[1], [1, 2]], cache)
    for lengths in ([1], [1, 9], [-1, 1]):
        with pytest.raises(ValueError, match="lengths must be 2 numbers from 0 to 8"):
            cache.set_lengths(lengths)


def test_nothing_is_recorded_for_a_gradient(device):
    model = tiny_model().to(device)
    ids = torch.randint(320, (1, 5), device=device)
    cache = model.new_cache(1, 8)
    hidden = model.model(ids, cache=None)
    assert hidden.requires_grad
    model(ids, cache=cache)
    assert not cache.keys.requires_grad


@torch.inference_mode()
def test_attending_allocates_nothing_of_the_caches_size(device):
    model = tiny_model(num_hidden_layers=1).to(device)
    cache = model.new_cache(1, 64)
    ids = torch.randint(320, (1, 1), device=device)
    model(ids, cache=cache)
    with torch.profiler.profile(profile_memory=True) as profile:
        model(ids, cache=cache)
    allocated = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < allocated < cache.keys.nbytes


@pytest.mark.parametrize("paged", [False, True])
@torch.inference_mode()
def test_a_cache_in_8_bits_takes_a_quarter_and_loses_little(paged, device):
    model = tiny_model(head_dim=32).to(device)
    prompts = [torch.randint(320, (length,)).tolist() for length in (5, 12, 1)]
    more = torch.randint(320, (3, 3), device=device)
    results = []
    for dtype in (None, torch.int8):
        cache = (
            model.new_paged_cache(12, 4, dtype=dtype)
            if paged
            else model.new_cache(3, 16, dtype=dtype)
        )
        rows = cache.rows([cache.add() for _ in prompts]) if paged else cache
        first = prefill(model, prompts, rows)
        results.append(torch.cat((first[:, None], model(more, cache=rows).logits), 1))
        assert rows.lengths == [8, 15, 4]
        stored = [cache.keys, cache.values, *(x for x in cache.scales if x is not None)]
        results.append(sum(x.nbytes for x in stored))
    exact, whole, got, narrow = results
    # a byte for each of 32 channels and four for their scale, where there were 128
    assert narrow / whole == 36 / 128
    # half a step of at most 127: each of two layers' keys and values is 0.4 % off at the most
    assert 0 < (got - exact).norm() / exact.norm() < 0.02
    if not paged:
        keys, scales = rows.keys.clone(), rows.scales[0].clone()
        rows.keep([2, 1])
        assert torch.equal(rows.keys[:, 0, :4], keys[:, 2, :4])
        assert torch.equal(rows.scales[0][:, 0, :4], scales[:, 2, :4])
    with pytest.raises(ValueError, match=r"dtype must be torch.float32 or torch.int8, got torch.f"):
        model.new_cache(1, 8, dtype=torch.float16)
