"""The next-token distribution."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from support.models import tiny_model, tiny_tokenizer

import fastlm
from fastlm.inference.next_token import NextToken
from fastlm.inference.picture import KINDS

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(2)
    tokenizer = tiny_tokenizer()
    return fastlm.LanguageModel(tiny_model(vocab_size=tokenizer.get_vocab_size()), tokenizer)


@pytest.fixture
def known():
    """Probabilities 1/2, 1/4, 1/8, 1/16, 1/16."""
    logits = torch.tensor([0.25, 0.0625, 0.5, 0.0625, 0.125]).log()
    tokenizer = tiny_tokenizer()
    return NextToken.of(logits, tokenizer, "so", 3, 1.0)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_is_the_softmax_of_the_last_logits(temperature, lm):
    got = lm.next_token("the cat", top_k=7, temperature=temperature)
    with torch.inference_mode():
        logits = lm.model(torch.tensor([lm.encode("the cat")])).logits[0, -1].double()
    probs, ids = (logits / temperature).softmax(-1).topk(7)
    assert list(got.ids) == ids.tolist()
    assert list(got.probs) == pytest.approx(probs.tolist(), rel=1e-4)
    assert list(got.logprobs) == pytest.approx(probs.log().tolist(), abs=1e-4)
    assert got.tokens == tuple(lm.tokenizer.decode([i]) for i in got.ids)
    assert got.covered == pytest.approx(probs.sum().item(), rel=1e-4)
    assert got.vocab_size == len(logits)


@pytest.mark.parametrize("temperature", [1e-30, 1e-300, 5e-324])
def test_a_tiny_temperature_leaves_the_most_likely_alone(temperature, lm):
    got = lm.next_token("the cat", top_k=3, temperature=temperature)
    assert got.ids[0] == lm.next_token("the cat", top_k=1).ids[0]
    assert got.probs == (1.0, 0.0, 0.0) and got.entropy == 0

    def no_constant(name):
        raise AssertionError(f"{name} is no JSON")

    rows = json.loads(json.dumps(got.to_dict()), parse_constant=no_constant)["top_logprobs"]
    assert rows[0]["logprob"] == 0 and rows[1]["logprob"] in (None, pytest.approx(got.logprobs[1]))


def test_entropy_is_in_nats(known):
    assert known.entropy == pytest.approx(1.875 * math.log(2))
    certain = NextToken.of(torch.tensor([0.0, -torch.inf]), tiny_tokenizer(), "", 2, 1.0)
    assert certain.entropy == 0 and certain.probs == (1.0, 0.0)


def test_more_than_the_vocabulary_is_the_vocabulary(lm):
    got = lm.next_token("the", top_k=10_000)
    assert len(got.ids) == got.vocab_size and got.covered == pytest.approx(1)


def test_dict_is_json_in_openais_shape(known):
    values = json.loads(json.dumps(known.to_dict()))
    first = values["top_logprobs"][0]
    assert first["id"] == 2 and first["prob"] == pytest.approx(0.5)
    assert first["logprob"] == pytest.approx(math.log(0.5))
    assert bytes(first["bytes"]).decode() == first["token"]


def test_a_token_of_half_a_character_has_no_bytes():
    tokenizer = tiny_tokenizer()
    half = tokenizer.encode("☃").ids[0]
    logits = torch.zeros(tokenizer.get_vocab_size())
    logits[half] = 9
    first = NextToken.of(logits, tokenizer, "", 1, 1.0).to_dict()["top_logprobs"][0]
    assert first["token"] == "\ufffd" and first["bytes"] is None


def test_bars_are_as_long_as_probabilities(known):
    lines = known.bars(width=8).splitlines()
    assert [line.count("█") for line in lines] == [8, 4, 2]
    assert [line.split()[-2] for line in lines] == ["50.0%", "25.0%", "12.5%"]
    assert known.bars(width=1).splitlines()[2].endswith("▎")


def test_plot_draws_one_bar_per_token(lm, tmp_path):
    got = lm.next_token("the $cat$ sat_on {the} mat\n" * 3, top_k=12)
    got.plot(tmp_path / "next.png")
    got.plot(tmp_path / "next.svg")
    assert (tmp_path / "next.png").read_bytes().startswith(PNG)
    drawing = (tmp_path / "next.svg").read_text()
    assert drawing.count('id="patch_') >= 12


@pytest.mark.parametrize("name", ["next.foo", "next", "next.png.txt", ".png"])
def test_plot_says_which_pictures_there_are(name, known, tmp_path):
    with pytest.raises(ValueError, match=r"plot: path must end in \.png, \.svg, \.pdf, \.jpg, got"):
        known.plot(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [*KINDS, ".PNG"])
def test_plot_draws_each_of_them(kind, known, tmp_path):
    known.plot(tmp_path / f"next{kind}")
    assert (tmp_path / f"next{kind}").stat().st_size > 1000


def test_plot_without_matplotlib_says_what_to_install(known, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"plot needs matplotlib: pip install"):
        known.plot(tmp_path / "next.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be a whole number above 0, got 0"),
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"temperature": "hot"}, "temperature must be above 0, got 'hot'"),
        ({"temperature": float("nan")}, "temperature must be above 0, got nan"),
        ({"temperature": float("inf")}, "temperature must be above 0, got inf"),
        ({"prompt": ""}, "prompt must have at least one token"),
        ({"prompt": "the cat " * 99}, "^next_token: prompt must fit in the context of 64 tokens"),
        ({"prompt": "the \udcff"}, r"text must be text that UTF-8 can hold, got '\\udcff' at .* 4"),
    ],
)
def test_values_out_of_range_are_named(options, message, lm):
    with pytest.raises(ValueError, match=message):
        lm.next_token(**{"prompt": "the", **options})


def test_a_prompt_that_fills_the_context_has_a_next_token(lm):
    ids = lm.encode("the cat sat on the mat, then " * 20)[:64]
    prompt = lm.decode(ids)
    assert len(lm.encode(prompt)) == 64
    assert len(lm.next_token(prompt).ids) == 10
