"""Tokenizers: every text comes back exactly, here and through transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from fastlm.training.data import Piece
from fastlm.training.tokenizer import (
    END_OF_TEXT,
    encode_documents,
    save_tokenizer,
    token_bytes,
    train_bpe,
    train_characters,
)

CODE = "def add(a, b):\n\treturn a  +   b  # café, 漢字, 🙂\r\n\n\n" * 8
AWKWARD = [
    " leading and trailing ",
    "\n\n \n\t\r\n",
    "   three spaces, don't , stop . n't 's",
    "a\x00b",
    "🙂" + CODE[:50],
    f"before {END_OF_TEXT} after",
]


def pieces(*texts: str) -> list[Piece]:
    return [Piece(text, closes=True) for text in texts]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(pieces(CODE), 300)


@pytest.fixture(scope="module")
def characters() -> Tokenizer:
    return train_characters(pieces(CODE, *AWKWARD))


@pytest.mark.parametrize("text", AWKWARD)
@pytest.mark.parametrize("kind", ["bpe", "characters"])
def test_text_comes_back_exactly(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_bpe_spells_any_text(text: str) -> None:
    tokenizer = _ANY_TEXT
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


_ANY_TEXT = train_bpe(pieces(CODE), 300)


def test_each_character_is_one_token(characters: Tokenizer) -> None:
    assert len(characters.encode(CODE).ids) == len(CODE)
    assert characters.get_vocab_size() == len(set(CODE + "".join(AWKWARD))) + 1


def test_characters_leave_out_what_the_corpus_has_not(characters: Tokenizer) -> None:
    assert characters.decode(characters.encode("a☃b").ids) == "ab"


@pytest.mark.parametrize("kind", ["bpe", "characters"])
def test_transformers_reads_the_same_tokens(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoTokenizer

    tokenizer: Tokenizer = request.getfixturevalue(kind)
    save_tokenizer(tokenizer, tmp_path, context=64)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in AWKWARD:
        assert theirs(text).input_ids == tokenizer.encode(text).ids
        assert theirs.decode(theirs(text).input_ids) == text
    assert theirs.eos_token == END_OF_TEXT
    assert theirs.model_max_length == 64


@pytest.mark.parametrize("kind", ["bpe", "characters"])
def test_corpus_cannot_spell_the_end_of_text(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    end = tokenizer.token_to_id(END_OF_TEXT)
    text = f"one {END_OF_TEXT} then"
    [(_, ids)] = encode_documents(tokenizer, pieces(text))
    assert end not in ids
    assert tokenizer.decode(ids) == text
    # whoever writes it in a prompt means the token
    assert end in tokenizer.encode(text).ids


@pytest.mark.parametrize("kind", ["bpe", "characters"])
def test_bytes_of_tokens_add_up_to_the_bytes_of_the_text(
    kind: str, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    lengths = token_bytes(tokenizer)
    assert sum(lengths[id] for id in tokenizer.encode(CODE).ids) == len(CODE.encode())
    assert lengths[tokenizer.token_to_id(END_OF_TEXT)] == 0


def test_training_twice_gives_the_same_tokenizer(bpe: Tokenizer) -> None:
    assert train_bpe(pieces(CODE), 300).to_str() == bpe.to_str()
