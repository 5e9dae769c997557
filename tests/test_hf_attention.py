"""attn_implementation="fastlm": the logits and texts of torch's attention, whatever hides keys."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import transformers
from support import hf_zoo
from torch import nn
from transformers.masking_utils import and_masks, causal_mask_function, or_masks, sdpa_mask

import fastlm.hf
from fastlm.hf import masks
from fastlm.ops._tolerance import compare

pytestmark = pytest.mark.filterwarnings("ignore")
TYPES = ["llama", "mistral", "gemma2", "gpt_oss"]  # plain, windows, softcap, sinks
LENGTH = 12
HIDDEN = "the mask is a tensor, and only its values could tell whom it hides"


def pair(model_type: str) -> tuple[nn.Module, nn.Module]:
    """A model on transformers' own attention, and the same on ours."""
    theirs = hf_zoo.build(model_type)
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation("fastlm")
    return theirs, ours


def ids(rows: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, hf_zoo.VOCABULARY, (rows, LENGTH), generator=generator)


def padded(side: str) -> dict[str, torch.Tensor]:
    seen = torch.ones(2, LENGTH, dtype=torch.long)
    seen[1, slice(4) if side == "left" else slice(-4, None)] = 0
    return {"input_ids": ids(), "attention_mask": seen}


def packed(rows: int) -> dict[str, torch.Tensor]:
    position_ids = torch.tensor(
        [[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]
    )
    return {"input_ids": ids(rows), "position_ids": position_ids[:rows]}


def with_a_hole() -> dict[str, torch.Tensor]:
    seen = torch.ones(2, LENGTH, dtype=torch.long)
    seen[0, 5] = 0
    return {"input_ids": ids(), "attention_mask": seen}


CALLS = {
    "whole": {"input_ids": ids()},
    "left": padded("left"),
    "right": padded("right"),
    "packed row": packed(1),
    "packed rows": packed(2),
}


def assert_same(ours, theirs, inputs, **more):
    truth = hf_zoo.in_double(theirs)(**inputs, **more).logits
    got, usual = ours(**inputs, **more).logits, theirs(**inputs, **more).logits
    seen = inputs.get("attention_mask", torch.ones(got.shape[:2])).bool()
    mismatch = compare(got[seen], usual[seen], truth[seen])
    assert mismatch is None, mismatch


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("call", CALLS)
@torch.no_grad()
def test_masks_are_kept_and_served_by_ours(model_type, call):
    theirs, ours = pair(model_type)
    assert_same(ours, theirs, CALLS[call], use_cache=False)
    routes = fastlm.hf.explain(ours, **CALLS[call], use_cache=False)
    assert [to for _, to, _ in routes.calls] == ["causal_attention"] * 2


@pytest.mark.parametrize("call", ["left", "packed rows"])
@torch.no_grad()
def test_a_mask_that_is_dropped_would_be_noticed(call, monkeypatch):
    theirs, ours = pair("llama")
    mapping = transformers.AttentionMaskInterface._global_mapping
    monkeypatch.setitem(mapping, "fastlm", lambda **_: None)
    with pytest.raises(AssertionError, match="error"):
        assert_same(ours, theirs, CALLS[call], use_cache=False)


@pytest.mark.parametrize(("model_type", "to"), [("llama", "sdpa"), ("gpt_oss", "eager")])
@torch.no_grad()
def test_what_ours_cannot_say_goes_elsewhere_and_is_explained(model_type, to):
    theirs, ours = pair(model_type)
    assert_same(ours, theirs, with_a_hole())
    routes = fastlm.hf.explain(ours, **with_a_hole())
    assert {route[1:] for route in routes.calls} == {(to, HIDDEN)}
    assert f"model.layers.0.self_attn: {to}, {HIDDEN}" in str(routes)


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@torch.no_grad()
def test_boundaries_that_collators_pass_hide_other_documents(model_type):
    """transformers reads them from positions; with a cache, only flash attention reads them."""
    theirs, ours = pair(model_type)
    inputs = packed(1)
    bounds = torch.tensor([0, 4, 12], dtype=torch.int32)
    told = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 8, "max_length_k": 8}
    want = theirs(**inputs, use_cache=False).logits
    for use_cache in (False, True):
        got = ours(**inputs, **told, use_cache=use_cache).logits
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_weights_and_masks_of_ones_own_are_served_too():
    theirs, ours = pair("llama")
    theirs.set_attn_implementation("eager")
    wanted = theirs(ids(), output_attentions=True)
    got = ours(ids(), output_attentions=True)
    for each, other in zip(got.attentions, wanted.attentions, strict=True):
        torch.testing.assert_close(each, other)
    seen = torch.rand(2, 1, LENGTH, LENGTH) < 0.7
    seen |= torch.eye(LENGTH, dtype=torch.bool)
    theirs.set_attn_implementation("sdpa")
    torch.testing.assert_close(
        ours(ids(), attention_mask=seen).logits, theirs(ids(), attention_mask=seen).logits
    )


def test_dropout_is_left_to_torch():
    model = hf_zoo.build("llama").train()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.set_attn_implementation("fastlm")
    routes = fastlm.hf.explain(model, ids())
    assert {why for *_, why in routes.calls} == {"causal_attention has no dropout"}


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_generates_the_same_text(model_type, cache):
    theirs, ours = pair(model_type)
    options = {
        **padded("left"), "max_new_tokens": 6, "do_sample": False, "cache_implementation": cache,
    }  # fmt: skip
    assert torch.equal(ours.generate(**options), theirs.generate(**options))
    routes = []
    with fastlm.hf.attention.listening(lambda call, *_: routes.append(call.to)):
        ours.generate(**options)
    assert set(routes) == {"causal_attention"}


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@torch.no_grad()
def test_a_prompt_in_parts_gives_the_logits_of_the_whole(implementation):
    theirs, ours = pair("mistral")
    want = theirs(ids()).logits
    cache = (
        transformers.DynamicCache(config=ours.config)
        if implementation == "dynamic"
        else transformers.StaticCache(config=ours.config, max_cache_len=16)
    )
    parts = [ours(part, past_key_values=cache).logits for part in ids().split((5, 4, 1, 2), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("side", ["left", "right", "both", "none"])
@pytest.mark.parametrize(
    ("queries", "keys", "offset"),
    [
        (9, 9, 0),
        (1, 9, 8),
        (4, 9, 5),
        (3, 12, 6),
        (1, 12, torch.tensor(8)),
        (9, 12, torch.tensor(0)),
    ],
)
def test_the_numbers_of_a_mask_are_its_values(window, side, queries, keys, offset):
    """Whatever a mask's numbers say, its dense form, which transformers makes, says the same."""
    function = causal_mask_function
    if window is not None:
        function = masks.masking_utils.sliding_window_causal_mask_function(window)
    padding = torch.ones(3, 9, dtype=torch.bool)
    padding[1, :2] = side not in ("left", "both")
    padding[2, -3:] = side not in ("right", "both")
    call = {
        "batch_size": 3, "q_length": queries, "kv_length": keys, "q_offset": offset,
        "mask_function": function, "attention_mask": None if side == "none" else padding,
    }  # fmt: skip
    dense = sdpa_mask(**call, allow_is_causal_skip=False)
    ours = masks.attention_mask(**call)
    if ours is None:
        assert sdpa_mask(**call) is None or queries == 1
        ours = masks.attention_mask(**call, allow_is_causal_skip=False)
    visible = masks.visible_of(ours)
    query = torch.arange(queries)[:, None] + visible.used_keys - queries
    key = torch.arange(keys)
    seen = (key <= query) & (key < visible.used_keys)
    if visible.window_size is not None:
        seen = seen & (key > query - visible.window_size)
    seen = seen.expand(3, 1, queries, keys)
    if visible.key_start is not None:
        start, end = (
            x.expand(3)[:, None, None, None] for x in (visible.key_start, visible.key_end)
        )
        seen = seen & (key >= start) & (key < end)
    assert torch.equal(seen, dense)
    assert torch.equal(torch.ones_like(dense) & ours, dense)
    assert ours.shape == dense.shape and ours.dtype == torch.bool


def test_other_patterns_stay_dense():
    def every_other(batch, head, query, key):
        return key % 2 == query % 2

    chunks = masks.masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int))
    for function in (
        and_masks(causal_mask_function, every_other), or_masks(causal_mask_function, every_other),
        chunks, masks.masking_utils.bidirectional_mask_function,
    ):  # fmt: skip
        call = {"batch_size": 1, "q_length": 8, "kv_length": 8, "mask_function": function}
        mask = masks.attention_mask(**call, allow_is_causal_skip=False)
        assert masks.visible_of(mask) is None
        assert torch.equal(mask, sdpa_mask(**call, allow_is_causal_skip=False))


@torch.no_grad()
def test_models_that_attend_themselves_get_the_mask_they_add():
    theirs = hf_zoo.build("bloom")
    ours = copy.deepcopy(theirs)
    ours.config._attn_implementation_internal = "fastlm"
    assert torch.equal(ours(**padded("left")).logits, theirs(**padded("left")).logits)


def test_is_registered_by_an_import_that_changes_nothing_else():
    """Here before transformers; in the other tests after it."""
    code = """
import torch.nn.functional as F
before = {name: id(value) for name, value in vars(F).items()}
import fastlm
import sys
assert "transformers" not in sys.modules
import fastlm.hf
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
assert "fastlm" in AttentionInterface() and "fastlm" in AttentionMaskInterface()
assert LOSS_MAPPING["ForCausalLM"] is ForCausalLMLoss
assert before == {name: id(vars(F)[name]) for name in before}
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_without_transformers_the_error_says_what_to_install():
    code = """
import sys
sys.modules["transformers"] = None
import fastlm
try:
    fastlm.optimize
except ModuleNotFoundError as error:
    assert "fastlm.hf needs transformers" in str(error) and "fastlm[hf]" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


@pytest.mark.parametrize("length", [1, 4])
def test_what_is_written_into_a_mask_is_not_dropped(length):
    seen = torch.tensor([[False, True, True, True]])
    call = dict(batch_size=1, q_length=length, kv_length=4, q_offset=4 - length)
    mask = masks.attention_mask(**call, attention_mask=seen, allow_is_causal_skip=False)
    assert masks.visible_of(mask) is not None
    assert not mask[0, 0, -1, 0]  # read alone it stays what it is
    assert masks.visible_of(mask) is not None
    mask[:, :, :, 1] = False
    assert masks.visible_of(mask) is None
