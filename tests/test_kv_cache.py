"""The static key/value cache."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import tiny_model
from support.poison import poisoned

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


@torch.inference_mode()
def test_extending_allocates_nothing_of_the_caches_size(device):
    model = tiny_model().to(device)
    cache = model.new_cache(1, 64)
    keys, values = cache.extend(1, *torch.randn(2, 1, 3, 2, 16, device=device))
    assert keys.data_ptr() == cache.keys[1].data_ptr()
    assert values.data_ptr() == cache.values[1].data_ptr()
    assert cache.length == 0
