"""Generation: token ids, text, streams, stops, scores."""

from __future__ import annotations

import copy
import json
import random
import re

import pytest
import torch
from support.models import tiny_config, tiny_model, tiny_tokenizer
from transformers import GenerationConfig

import fastlm
from fastlm._errors import ArgumentError
from fastlm.inference.text import StopStrings, TextStream
from fastlm.model.sampling import Sampling

EOS = 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("run")
    tokenizer = tiny_tokenizer()
    tiny_model(vocab_size=tokenizer.get_vocab_size(), eos_token_id=EOS).save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def lm(folder):
    return fastlm.load(folder)


@pytest.mark.parametrize("changes", [{"model_type": "qwen3"}, {"model_type": "llama"}])
@torch.inference_mode()
def test_cached_decoding_gives_the_tokens_of_recomputing(changes, device):
    model = tiny_model(**changes).to(device)
    prompt = torch.randint(320, (3, 9), device=device)
    got = model.generate(prompt, 40)
    assert got.shape == (3, 49) and torch.equal(got[:, :9], prompt)
    # one pass over the whole result, without a cache, predicts every position again
    logits = model(got).logits[:, 8:-1]
    tokens = got[:, 9:]
    differs = tokens != logits.argmax(-1)
    # the most likely two may change places where their gap is within the allowed error
    truth = copy.deepcopy(model).double()(got).logits[:, 8:-1]
    error = (logits - truth).abs().amax(-1)
    allowance = 2 * error + 8 * 2.0**-24 * truth.abs().amax(-1)
    gap = logits.amax(-1) - logits.gather(-1, tokens[..., None])[..., 0]
    assert (gap <= allowance)[differs].all()
    excused = int(differs.sum())
    print(f"{excused} of {3 * 40} tokens excused as ties")
    assert excused <= 3


def test_equal_seeds_give_equal_tokens(device):
    model = tiny_model().to(device)
    prompt = torch.randint(320, (2, 5), device=device)
    state = torch.get_rng_state()
    runs = [model.generate(prompt, 20, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_end_at_eos_and_are_filled_up(device):
    model = tiny_model().to(device)
    prompt = torch.randint(320, (3, 5), device=device)
    free = model.generate(prompt, 30)
    # a token that one row says early and another later or never
    eos = int(free[0, 8])
    got = model.generate(prompt, 30, eos_token_id=eos)
    for row, want in zip(got[:, 5:].tolist(), free[:, 5:].tolist(), strict=True):
        end = want.index(eos) + 1 if eos in want else len(want)
        assert row[:end] == want[: len(row)][:end]
        assert all(token == eos for token in row[end:])
    alone = model.generate(prompt[:1], 30, eos_token_id=(eos, 319))
    assert alone.shape[1] <= 9 and alone[0, -1] == eos


def test_generation_stops_at_the_context(device):
    model = tiny_model().to(device)
    prompt = torch.randint(320, (1, 60), device=device)
    assert model.generate(prompt, 100).shape == (1, 64)
    assert torch.equal(model.generate(prompt, 0), prompt)
    full = torch.randint(320, (1, 64), device=device)
    assert torch.equal(model.generate(full, 5), full)
    with pytest.raises(ValueError, match="prompt must fit in the context of 64 tokens, got 65"):
        model.generate(torch.zeros(1, 65, dtype=torch.long, device=device), 1)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(1, 0, dtype=torch.long), 1), {}, "prompt must have at least one token"),
        ((torch.zeros(1, 2, dtype=torch.long), -1), {}, "max_new_tokens must be .*, got -1"),
        ((torch.zeros(2, dtype=torch.long), 1), {}, r"input_ids must be \(B, T\)"),
        ((torch.zeros(1, 2, dtype=torch.long), 1), {"temperature": -1}, "temperature must be"),
    ],
)
def test_wrong_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().generate(*arguments, **options)


def test_broken_weights_raise_and_do_not_make_tokens():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        model.generate(torch.zeros(1, 2, dtype=torch.long), 3)


def test_text_is_that_of_the_tokens(lm):
    prompt = "the cat sat"
    ids = lm.model.generate(torch.tensor([lm.encode(prompt)]), 30)[0].tolist()
    assert lm.generate(prompt, 30) == lm.decode(ids[len(lm.encode(prompt)) :])
    sampled = [
        lm.generate(prompt, 30, temperature=1.2, top_p=0.95, seed=seed) for seed in (3, 3, 4)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_stream_joins_to_the_text_and_knows_its_probabilities(lm):
    prompt, options = "the cat", {"temperature": 1.5, "seed": 5}
    items = list(lm.stream(prompt, 40, **options))
    assert "".join(item.text for item in items) == lm.generate(prompt, 40, **options)
    assert [item.finish for item in items[:-1]] == [None] * (len(items) - 1)
    assert items[-1].finish in ("length", "eos")
    # bytes of incomplete characters are held back
    assert any(item.text == "" for item in items)
    ids = lm.encode(prompt) + [item.id for item in items]
    with torch.inference_mode():
        logprobs = lm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    start = len(lm.encode(prompt))
    want = [logprobs[start + n - 1, item.id].item() for n, item in enumerate(items)]
    assert [item.logprob for item in items] == pytest.approx(want, abs=1e-4)


def test_stream_says_why_it_ends(lm):
    assert list(lm.stream("the cat", 3))[-1].finish == "length"
    long = "the cat sat " * 12
    length = len(lm.encode(long))
    items = list(lm.stream(long, 500, temperature=1.0, seed=0))
    assert items[-1].finish in ("context", "eos") and length + len(items) <= 64
    text = lm.generate("the cat", 40, temperature=1.0, seed=7)
    stop = text[10:13]
    *_, last = lm.stream("the cat", 40, temperature=1.0, seed=7, stop=stop)
    assert last.finish == "stop"
    cut = lm.generate("the cat", 40, temperature=1.0, seed=7, stop=["never there", stop])
    assert cut == text[: text.index(stop)]


def test_stream_checks_its_arguments_before_the_first_item(lm):
    wrong = ({"temperature": -1.0}, {"stop": ""}, {"max_new_tokens": -1}, {"seed": 2**64})
    for options in wrong:
        with pytest.raises(ValueError, match="must"):
            lm.stream("the", **options)
    with pytest.raises(ValueError, match="prompt must fit in the context of 64 tokens, got"):
        lm.stream("the cat " * 100)
    with pytest.raises(ValueError, match="prompt must have at least one token"):
        lm.generate("")


def test_eos_ends_the_text(lm):
    model = copy.deepcopy(lm.model)
    first = next(iter(lm.stream("the cat", 1))).id
    object.__setattr__(model.config, "eos_token_id", first)
    items = list(fastlm.LanguageModel(model, lm.tokenizer).stream("the cat", 20))
    assert [(item.id, item.text, item.finish) for item in items] == [(first, "", "eos")]


def test_pieces_join_to_whole_characters():
    tokenizer = tiny_tokenizer()
    text = "the cät sät ☃ on 𝄞 日本語 mat"
    ids = tokenizer.encode(text).ids
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) + stream.finish() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_are_no_character_become_replacements_and_nothing_is_lost():
    tokenizer = tiny_tokenizer()
    generator = random.Random(0)
    for _ in range(50):
        ids = [generator.randrange(1, 257) for _ in range(30)]
        stream = TextStream(tokenizer)
        got = "".join([*(stream.add(token) for token in ids), stream.finish()])
        got.encode()
        # how many replacements a bad sequence makes may differ, all other characters may not
        want = tokenizer.decode(ids)
        assert got.replace("\ufffd", "") == want.replace("\ufffd", "")


@pytest.mark.parametrize(
    ("pieces", "stop", "want"),
    [
        (["ab", "cd"], None, "abcd"),
        (["ab", "cd"], "bc", "a"),
        (["a", "b", "c", "d"], ["cd", "bc"], "a"),
        (["aab", "aac"], "aac", "aab"),
        (["ab", "a"], "aba", ""),
        (["xab"], "abc", "xab"),
        (["end", "\n", "\n", "more"], "\n\n", "end"),
    ],
)
def test_stop_strings_cut_wherever_pieces_break(pieces, stop, want):
    stops = StopStrings(stop)
    assert "".join([*(stops.add(piece) for piece in pieces), stops.finish()]) == want


def test_held_back_text_is_only_what_may_be_a_stop():
    stops = StopStrings("stop")
    assert stops.add("a st") == "a "
    assert stops.add("ay") == "stay"


def test_score_is_the_probability_of_the_continuation(lm):
    score = lm.score("the cat", " sat on")
    before, ids = lm.encode("the cat"), lm.encode("the cat sat on")
    with torch.inference_mode():
        logprobs = lm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    want = [logprobs[n - 1, ids[n]].item() for n in range(len(before), len(ids))]
    assert list(score.ids) == ids[len(before) :]
    assert list(score.logprobs) == pytest.approx(want, abs=1e-4)
    assert score.logprob == pytest.approx(sum(want), abs=1e-3)
    with pytest.raises(ValueError, match="continuation must have at least one token"):
        lm.score("the cat", "")
    with pytest.raises(ValueError, match="continuation must fit in the context of 64 tokens"):
        lm.score("the cat", "x" * 100)
    with pytest.raises(ValueError, match="score: prompt must fit in the context of 64 tokens"):
        lm.score("x" * 100, "the cat")


def test_score_after_nothing_needs_a_token_that_starts_a_text(lm):
    for continuation in ("the cat", "", "t"):
        with pytest.raises(ValueError, match="score: prompt must have at least one token"):
            lm.score("", continuation)
    config = tiny_config(vocab_size=lm.model.config.vocab_size, bos_token_id=EOS)
    model = fastlm.CausalLM(config)
    model.load_state_dict(lm.model.state_dict())
    starting = fastlm.LanguageModel(model, lm.tokenizer)
    ids = [EOS, *lm.encode("the cat")]
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    want = [logprobs[n, token].item() for n, token in enumerate(ids[1:])]
    assert list(starting.score("", "the cat").logprobs) == pytest.approx(want, abs=1e-4)
    # nothing is left of a character that the tokenizer does not know, but that is no empty prompt
    starting.encode = lambda text: []
    with pytest.raises(ValueError, match="prompt must have at least one token"):
        starting.generate("☃", 1)


def test_score_splits_at_the_seam_where_a_token_would_span_it(lm):
    # "ca" + "t": together one token
    assert len(lm.encode("cat")) < len(lm.encode("ca")) + len(lm.encode("t"))
    assert list(lm.score("the ca", "t").ids) == lm.encode("t")


FAULTS = {
    "missing": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "damaged": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "tokenizer.json: cannot be read as a tokenizer",
    ),
    "too large": (
        lambda f: tiny_model(vocab_size=100, eos_token_id=EOS).save_pretrained(f),
        r"tokenizer.json: has token \d+, the model knows 100",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_without_its_tokenizer_is_named(fault, folder, tmp_path):
    change, message = FAULTS[fault]
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    change(tmp_path)
    with pytest.raises(fastlm.ModelFileError, match=message) as caught:
        fastlm.load(tmp_path)
    assert "\n" not in str(caught.value)


def with_generation_config(folder, path, values):
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    (path / "generation_config.json").write_text(json.dumps(values))
    return path


def test_sampling_of_the_folder_holds_where_the_caller_says_nothing(folder, lm, tmp_path):
    values = {"do_sample": True, "temperature": 0.7, "top_k": 9, "repetition_penalty": 1.2}
    own = fastlm.load(with_generation_config(folder, tmp_path, values))
    said = {"temperature": 0.7, "top_k": 9, "repetition_penalty": 1.2, "seed": 3}
    want = lm.generate("the cat", 30, **said)
    assert own.generate("the cat", 30, seed=3) == want
    assert own.generate_batch(["the cat"], 30, seed=3)[0].text == want
    # what is said wins, number by number
    changed = lm.generate("the cat", 30, **{**said, "temperature": 2.0})
    assert own.generate("the cat", 30, temperature=2.0, seed=3) == changed != want
    greedy = lm.generate("the cat", 30, repetition_penalty=1.2)
    assert own.generate("the cat", 30, temperature=0) == greedy
    assert own.generate("the cat", 30, temperature=0, repetition_penalty=1.0) == lm.generate(
        "the cat", 30
    )


def test_a_folder_that_does_not_sample_is_greedy(folder, lm, tmp_path):
    values = {"do_sample": False, "temperature": 0.7, "top_k": 9}
    own = fastlm.load(with_generation_config(folder, tmp_path, values))
    assert own.sampling.is_greedy
    assert own.generate("the cat", 20) == lm.generate("the cat", 20)
    assert own.generate("the cat", 20, top_p=0.9, seed=1) == lm.generate(
        "the cat", 20, top_p=0.9, seed=1
    )


@pytest.mark.parametrize("top_k", [{}, {"top_k": None}, {"top_k": 0}, {"top_k": 7}])
def test_a_folder_that_samples_means_what_transformers_makes_of_it(top_k, folder, tmp_path):
    values = {"do_sample": True, **top_k}
    theirs = GenerationConfig(**values)
    theirs.update(**GenerationConfig._get_default_generation_params(), defaults_only=True)
    ours = fastlm.load(with_generation_config(folder, tmp_path, values)).sampling
    assert (ours.top_k, ours.temperature) == (theirs.top_k, theirs.temperature)
    assert (ours.top_p or 1.0, ours.min_p) == (theirs.top_p, theirs.min_p)
    assert (ours.repetition_penalty or 1.0) == theirs.repetition_penalty


# name and value in the file, what is said of them, and an argument that wins over them
IMPOSSIBLE = [
    ("temperature", -1, "be a number of at least 0, got -1", 0.7),
    ("temperature", "x", "be a number of at least 0, got 'x'", 0.7),
    pytest.param("temperature", 10**400, "be finite in float64, got 10", 0.7, id="400 digits"),
    ("temperature", True, "be a number of at least 0, got True", 0),
    ("top_k", -1, "be a whole number of at least 0, got -1", 5),
    ("top_k", "many", "be a whole number of at least 0, got 'many'", 5),
    ("top_p", 2, "be above 0 and at most 1, got 2", 0.5),
    ("min_p", "x", "be from 0 to 1, got 'x'", 0.5),
    ("repetition_penalty", "1", "be a finite number above 0 in float32, got '1'", 1.1),
    ("do_sample", "false", "be true or false, got 'false'", None),
    ("do_sample", 1, "be true or false, got 1", None),
]


@pytest.mark.parametrize(("name", "value", "message", "instead"), IMPOSSIBLE)
def test_impossible_sampling_of_a_folder_is_named(name, value, message, instead, folder, tmp_path):
    values = {"do_sample": True, "top_k": 3, name: value}
    own = fastlm.load(with_generation_config(folder, tmp_path, values))
    whole = re.escape(f"{tmp_path / 'generation_config.json'}: {name} must {message}")
    for call in (own.generate, own.stream, lambda *args: own.generate_batch([args[0]], args[1])):
        with pytest.raises(fastlm.ModelFileError, match=f"^{whole}") as caught:
            call("the cat", 3)
        assert "\n" not in str(caught.value)
    # what does not look at the value does not mind it
    own.next_token("the cat")
    own.score("the", " cat")
    if instead is not None:
        own.generate("the cat", 3, **{name: instead})
    if name != "repetition_penalty":
        own.generate("the cat", 3, temperature=0)
    # an argument is refused as one
    with pytest.raises(ArgumentError, match=r"^generate: top_p must be above 0"):
        own.generate("the cat", 3, top_p=2.0)


def test_a_number_that_no_json_reader_takes_is_named(folder, tmp_path):
    path = with_generation_config(folder, tmp_path, {})
    (path / "generation_config.json").write_text('{"temperature": 1' + "0" * 5000 + "}")
    with pytest.raises(fastlm.ModelFileError, match=r"generation_config.json: cannot be read as"):
        fastlm.load(path)


def test_without_do_sample_values_of_drawing_are_not_judged(folder, lm, tmp_path):
    values = {"do_sample": None, "temperature": "x", "top_k": -1}
    own = fastlm.load(with_generation_config(folder, tmp_path, values))
    assert own.generate("the cat", 9) == lm.generate("the cat", 9)


def test_other_sampling_may_be_set(folder, tmp_path):
    own = fastlm.load(with_generation_config(folder, tmp_path, {"do_sample": True, "top_k": -1}))
    own.sampling = Sampling(top_k=4)
    assert own.sampling == Sampling(top_k=4)
    assert own.generate("the cat", 9, seed=1) == own.generate("the cat", 9, seed=1, top_k=4)


def test_what_a_tokenizer_cut_in_training_it_does_not_cut_here(folder, lm, tmp_path):
    path = with_generation_config(folder, tmp_path, {})
    tokenizer = tiny_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path / "tokenizer.json"))
    for text in ("the cat sat on the mat", "the"):
        assert fastlm.load(path).encode(text) == lm.encode(text)


def test_low_precision_files_run_in_float32_on_cpu(folder, tmp_path):
    model = fastlm.CausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert fastlm.load(tmp_path, device="cpu").model.lm_head.weight.dtype == torch.float32
    asked = fastlm.load(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert asked.model.lm_head.weight.dtype == torch.bfloat16
