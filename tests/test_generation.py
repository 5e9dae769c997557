"""Decoding several requests together: any lengths, leaving, guessing ahead."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from support.models import tiny_model, tiny_tokenizer

import fastlm
from fastlm.model.generate import Generation, Request
from fastlm.model.lookup import PromptLookup
from fastlm.model.sampling import Sampling

LENGTHS = (3, 9, 1, 20, 7)
GREEDY = Sampling()
RULES = {
    "greedy": {},
    "temperature": {"temperature": 1.0, "seed": 5},
    "filters": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 5},
    "penalty": {"temperature": 1.0, "repetition_penalty": 1.4, "seed": 5},
    "bias": {"logit_bias": {3: 4.0, 7: -torch.inf}},
}


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(1)
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=tokenizer.get_vocab_size(), eos_token_id=0)
    return fastlm.LanguageModel(model, tokenizer)


def prompts() -> list[list[int]]:
    return [torch.randint(1, 320, (length,)).tolist() for length in LENGTHS]


def excused(model, got: list[int], want: list[int], start: int) -> int:
    """How many tokens differ, 0 or 1: after the first that does the two are other texts.

    Raises:
        AssertionError: The two tokens' logits are further apart than rounding allows.
    """
    at = next((n for n, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), None)
    if at is None:
        assert len(got) == len(want)
        return 0
    assert at >= start, "the prompt differs"
    ids = torch.tensor([want[:at]], device=model.lm_head.weight.device)
    with torch.inference_mode():
        logits = model(ids, logits_to_keep=1).logits[0, 0].double()
        truth = copy.deepcopy(model).double()(ids, logits_to_keep=1).logits[0, 0]
    allowance = 2 * (logits - truth).abs().max() + 8 * 2.0**-24 * truth.abs().max()
    assert (logits[got[at]] - logits[want[at]]).abs() <= allowance
    return 1


MODELS = {
    "qwen3": {},
    "window": {
        "model_type": "qwen2", "sliding_window": 5,
        "layer_types": ("sliding_attention", "full_attention"),
    },
    # its positions end where the longest prompt does, and all prompts together are longer
    "gpt2": {
        "model_type": "gpt2", "num_key_value_heads": 4, "head_dim": 8, "hidden_act": "gelu",
        "max_position_embeddings": 35,
    },
}  # fmt: skip


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_a_ragged_batch_gives_each_prompt_the_tokens_it_gets_alone(name, rules, device):
    model = tiny_model(**MODELS[name]).to(device)
    options = dict(RULES[rules])
    seed = options.pop("seed", None)
    batch = prompts()
    got = model.generate(batch, 30, seed=seed, **options)
    differ = 0
    for row, prompt in enumerate(batch):
        alone = model.generate([prompt], 30, seed=None if seed is None else seed + row, **options)[
            0
        ].tolist()
        differ += excused(model, got[row, : len(alone)].tolist(), alone, len(prompt))
    print(f"{differ} of {len(batch)} rows excused as ties")
    assert differ <= 1


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("guesses", [1, 4])
def test_guessing_ahead_changes_no_token(rules, guesses, device):
    model = tiny_model().to(device)
    # texts that repeat themselves, so that guesses are right now and then
    batch = [(prompt * 8)[:24] for prompt in prompts()]
    plain = model.generate(batch, 30, **RULES[rules]).tolist()
    got = model.generate(batch, 30, prompt_lookup_num_tokens=guesses, **RULES[rules]).tolist()
    differ = sum(
        excused(model, row, want, len(prompt))
        for row, want, prompt in zip(got, plain, batch, strict=True)
    )
    assert differ <= 1


@pytest.mark.parametrize("guesses", [0, 4])
@pytest.mark.parametrize("kv_cache", ["float", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_pages_change_no_token(name, kv_cache, guesses, device):
    model = tiny_model(**MODELS[name]).to(device)
    # texts that repeat themselves, one of them twice, and one whose pages end the context
    batch = [(prompt * 8)[:24] for prompt in prompts()]
    options = {
        "kv_cache": kv_cache, "prompt_lookup_num_tokens": guesses, "num_return_sequences": 2,
        "temperature": 1.0, "seed": 3,
    }  # fmt: skip
    want = model.generate(batch, 64, **options).tolist()
    got = model.generate(batch, 64, page_size=7, **options).tolist()
    if kv_cache == "float":
        differ = sum(excused(model, row, other, 24) for row, other in zip(got, want, strict=True))
        assert differ <= 1
    else:
        # prompts are read at once into one cache, and token by token of the other
        assert [row[:26] for row in got] == [row[:26] for row in want]


@pytest.mark.parametrize("guesses", [0, 4])
def test_no_page_is_larger_than_what_the_longest_row_fills(guesses, device):
    model = tiny_model().to(device)
    batch = prompts()
    options = {"num_return_sequences": 2, "prompt_lookup_num_tokens": guesses}
    want = model.generate(batch, 9, page_size=40, **options)
    assert torch.equal(model.generate(batch, 9, page_size=10**9, **options), want)


@pytest.mark.parametrize("page_size", [0, 5])
def test_eight_bits_of_keys_and_values_are_near(page_size, device):
    model = tiny_model().to(device)
    requests = [Request(prompt=tuple(p), max_new_tokens=9, sampling=GREEDY) for p in prompts()]
    whole, narrow = (
        Generation(model, requests, num_top=0, kv_cache=kind, page_size=page_size)
        for kind in ("float", "int8")
    )
    first, second = whole.step(), narrow.step()
    assert narrow._cache.scales[0] is not None
    gaps = [abs(a.logprob - b.logprob) for a, b in zip(first, second, strict=True)]
    assert 0 < max(gaps) < 0.2


def test_pages_are_shared_and_given_back(device):
    model = tiny_model().to(device)
    requests = [
        Request(prompt=(5,) * 10, max_new_tokens=count, sampling=GREEDY) for count in (1, 9, 9)
    ]
    generation = Generation(model, requests, page_size=4)
    generation.step()
    cache = generation._cache.cache
    # three pages for each, of which the prompt takes them once
    assert cache.num_pages == 3 + 5 + 5 and cache.free_pages == 13 - 3
    generation.step()
    # two rows are left, and their third pages differ
    assert cache.free_pages == 13 - 4
    while not generation.is_done:
        generation.step()
    assert cache.free_pages == 13 - 2 - 2 * 3


def test_heads_wider_than_the_kernels_take_are_decoded(device):
    sizes = {"head_dim": 320, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny_model(**sizes).to(device)
    got = model.generate([[1, 2, 3], [4]], 6)
    alone = model.generate([[4]], 6)[0].tolist()
    assert excused(model, got[1, :7].tolist(), alone, 1) == 0


def test_nothing_asked_for_is_nothing_done():
    model = tiny_model()
    for count in (0, 5):
        request = Request(prompt=(1,), max_new_tokens=count, sampling=GREEDY)
        generation = Generation(model, [request])
        generation.end(0)
        assert generation.is_done and generation.step() == []


@pytest.mark.parametrize("guesses", [0, 3])
def test_right_guesses_take_fewer_steps_and_rows_leave(guesses, device):
    model = tiny_model().to(device)
    # it says one token for ever, which is easily guessed
    bias = {5: 1e4}
    requests = [
        Request(prompt=(7, *[5] * 4), max_new_tokens=count, sampling=Sampling(logit_bias=bias))
        for count in (12, 3, 0, 1)
    ]
    generation = Generation(model, requests, num_guesses=guesses)
    steps, got = 0, []
    while not generation.is_done:
        got += generation.step()
        steps += 1
    assert [sum(drawn.request == n for drawn in got) for n in range(4)] == [12, 3, 0, 1]
    assert {drawn.token for drawn in got} == {5}
    assert [drawn.request for drawn in got if drawn.is_last] == [3, 1, 0]
    assert steps == (12 if guesses == 0 else 4)
    assert generation.step() == []


class Ahead(Generation):
    """Decodes before it reads, as on a GPU."""

    def _start(self):
        super()._start()
        self._runs_ahead = True


@pytest.mark.parametrize("rules", RULES)
def test_running_ahead_of_the_host_changes_no_token(rules, device):
    model = tiny_model().to(device)
    options = dict(RULES[rules])
    seed = options.pop("seed", None)
    requests = [
        Request(
            prompt=tuple(prompt), max_new_tokens=count, sampling=Sampling(**options), seed=seed,
            end_ids=(3, 5, 9),
        )
        for prompt, count in zip(prompts(), (12, 3, 1, 20, 7), strict=True)
    ]  # fmt: skip
    texts = []
    for kind in (Generation, Ahead):
        generation, drawn = kind(model, requests, num_top=2), []
        while not generation.is_done:
            drawn += generation.step()
        assert sum(token.is_last for token in drawn) == len(requests)
        texts.append([[t.token for t in drawn if t.request == n] for n in range(5)])
    assert texts[0] == texts[1]


def test_long_prompts_are_read_in_several_passes(device, monkeypatch):
    model = tiny_model().to(device)
    batch = prompts()
    want = model.generate(batch, 5).tolist()
    seen = []
    monkeypatch.setattr("fastlm.model.prefill._MOST_TOKENS", 13)
    handle = model.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    got = model.generate(batch, 5).tolist()
    handle.remove()
    assert seen[:3] == [3 + 9 + 1, 20, 7]
    differ = sum(excused(model, a, b, 1) for a, b in zip(got, want, strict=True))
    assert differ <= 1


def test_ids_that_no_model_has_are_named():
    model = tiny_model()
    for prompt in ([[1, 320]], [[-1]], torch.tensor([[320]])):
        with pytest.raises(ValueError, match=r"input_ids must be in \[0, 320\), got"):
            model.generate(prompt, 2)
    with pytest.raises(ValueError, match="input_ids must be lists of token ids, got 1"):
        model.generate([1, 2, 3], 2)


def test_a_request_that_is_ended_leaves(device):
    model = tiny_model().to(device)
    requests = [
        Request(prompt=tuple(prompt), max_new_tokens=10, sampling=GREEDY) for prompt in prompts()
    ]
    want = Generation(model, requests)
    whole = [want.step() for _ in range(4)]
    generation = Generation(model, requests)
    generation.step()
    generation.end(0)
    generation.end(3)
    tokens = [{d.request: d.token for d in generation.step()} for _ in range(3)]
    assert [sorted(step) for step in tokens] == [[1, 2, 4]] * 3
    for step, full in zip(tokens, whole[1:], strict=True):
        assert step.items() <= {d.request: d.token for d in full}.items()


def test_prompts_that_are_equal_are_read_once_and_drawn_apart(device):
    model = tiny_model().to(device)
    prompt = prompts()[1]
    seen = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    got = model.generate([prompt, [1, 2]], 12, temperature=1.0, seed=3, num_return_sequences=3)
    assert seen[0] == len(prompt) + 2
    assert got.shape == (6, len(prompt) + 12)
    assert len({tuple(row) for row in got[:3].tolist()}) == 3
    alone = model.generate([prompt], 12, temperature=1.0, seed=4)
    assert excused(model, got[1].tolist(), alone[0].tolist(), len(prompt)) == 0


def test_ragged_rows_are_filled_up(device):
    model = tiny_model(pad_token_id=9).to(device)
    got = model.generate([[1, 2, 3], [4]], 2)
    assert got.shape == (2, 5) and got[1, 3:].tolist() == [9, 9]


def test_log_probabilities_are_the_models(lm):
    options = {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.2, "seed": 2}
    items = list(lm.stream("the cat", 12, top_logprobs=4, **options))
    ids = lm.encode("the cat") + [item.id for item in items]
    with torch.inference_mode():
        logprobs = lm.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    start = len(ids) - len(items)
    for n, item in enumerate(items):
        values, best = logprobs[start + n - 1].topk(4)
        assert item.logprob == pytest.approx(logprobs[start + n - 1, item.id].item(), abs=1e-4)
        assert [token for token, _ in item.top_logprobs] == best.tolist()
        assert [value for _, value in item.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)


def test_a_batch_of_texts_is_what_each_text_gives(lm):
    texts = ["the cat", "on the mat, then the cat sat again. the", "sat"]
    got = lm.generate_batch(texts, 20, temperature=0.9, seed=4, num_return_sequences=2)
    assert len(got) == 6
    for n, text in enumerate(texts):
        for number in range(2):
            assert got[2 * n + number].text == lm.generate(
                text, 20, temperature=0.9, seed=4 + number
            )
    seeds = lm.generate_batch(texts, 20, temperature=0.9, seed=[6, 5, 4])
    assert seeds[2].text == got[4].text
    items = list(lm.stream("the cat", 20, temperature=0.9, seed=4))
    assert got[0].ids == tuple(item.id for item in items)
    assert got[0].finish == items[-1].finish
    assert got[0].logprob == pytest.approx(sum(item.logprob for item in items), abs=1e-3)
    assert lm.generate_batch(["the"], 0)[0] == fastlm.inference.completion.Completion(
        "", (), "length"
    )


class Broken(Generation):
    """The second request's logits are not finite after its third token."""

    def _sampled(self, logits):
        if 1 in self._rows and self._counts[1] == 3:
            logits[self._rows.index(1)] = torch.nan
        return super()._sampled(logits)


@pytest.mark.parametrize("guesses", [0, 4])
def test_a_row_without_finite_logits_ends_alone(lm, guesses, monkeypatch):
    texts = ["the cat", "on the mat, then", "sat"]
    options = {"temperature": 1.0, "seed": 9, "prompt_lookup_num_tokens": guesses}
    whole = lm.generate_batch(texts, 12, **options)
    monkeypatch.setattr("fastlm.inference.language_model.Generation", Broken)
    got = lm.generate_batch(texts, 12, **options)
    assert got[0] == whole[0] and got[2] == whole[2]
    assert got[1].finish == "error" and got[1].ids == whole[1].ids[:3]
    # no character is lost, whether whole or not
    assert got[1].text == lm.decode(got[1].ids)


@pytest.mark.parametrize("guesses", [0, 4])
def test_stop_strings_and_tokens_end_one_text_and_not_the_others(lm, guesses):
    texts = ["the cat", "on the mat"]
    whole = lm.generate_batch(texts, 30, temperature=1.0, seed=9)
    stop = whole[0].text[8:11]
    options = {"temperature": 1.0, "seed": 9, "prompt_lookup_num_tokens": guesses}
    cut = lm.generate_batch(texts, 30, stop=stop, **options)
    assert cut[0].finish == "stop" and cut[0].text == whole[0].text.partition(stop)[0]
    assert cut[1].text == whole[1].text.partition(stop)[0]
    token = whole[1].ids[5]
    ended = lm.generate_batch(texts, 30, stop_token_ids=[token], **options)
    assert ended[1].finish == "eos" and ended[1].ids[-1] == token
    assert len(ended[1].ids) == whole[1].ids.index(token) + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_return_sequences": 0}, "num_return_sequences must be a whole number of at least 1"),
        ({"top_logprobs": -1}, "top_logprobs must be a whole number of at least 0"),
        ({"prompt_lookup_num_tokens": -1}, "prompt_lookup_num_tokens must be"),
        ({"seed": [1]}, "seed must be one for each of 2 prompts, got 1"),
        ({"logit_bias": {10**6: 1.0}}, "logit_bias must name tokens below"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"kv_cache": "int4"}, "kv_cache must be one of float, int8, got 'int4'"),
        ({"page_size": -1}, "page_size must be a whole number of at least 0, got -1"),
        ({"stop_token_ids": 5}, "stop_token_ids must be token ids below"),
        ({"stop_token_ids": ["x"]}, "stop_token_ids must be token ids below"),
    ],
)
def test_wrong_options_are_named(lm, options, message):
    with pytest.raises(ValueError, match=message):
        lm.generate_batch(["the cat", "the"], 3, **options)
    with pytest.raises(ValueError, match="prompts must be several texts"):
        lm.generate_batch("the cat", 3)


def test_lookup_guesses_what_followed_the_longest_run_last():
    lookup = PromptLookup([1, 2, 3, 4, 5, 2, 3, 9, 1, 2, 3])
    assert lookup.guess(3) == [4, 5, 2]
    assert PromptLookup([7, 2, 3, 4, 8, 2, 3, 5, 6, 2, 3]).guess(2) == [5, 6]
    assert PromptLookup([1, 2, 3]).guess(4) == []
    assert PromptLookup([]).guess(4) == [] == PromptLookup([5, 5]).guess(0)
    # what follows the end of the text is the text that is guessed
    assert PromptLookup([5] * 6).guess(4) == [5] * 4
    assert PromptLookup([0, 1, 2, 3, 1, 2, 3, 1, 2]).guess(5) == [3, 1, 2, 3, 1]
    grown = PromptLookup([1, 2, 3])
    for token in (4, 1, 2, 3):
        grown.add(token)
    assert grown.guess(6) == [4, 1, 2, 3, 4, 1]


def test_a_request_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Request(prompt=(1,), max_new_tokens=1, sampling=GREEDY).seed = 3
