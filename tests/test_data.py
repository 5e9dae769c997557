"""Corpora, token files and batches."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from fastlm.training import data
from fastlm.training.data import (
    Batches,
    Corpus,
    DataError,
    read_tokens,
    token_dtype,
    validation_batches,
    write_tokens,
)
from fastlm.training.tokenizer import END_OF_TEXT, train_characters

TEXT = "All happy families are alike;\neach unhappy one is unhappy in its own way. é漢\n" * 40


def text_of(corpus: Corpus) -> str:
    return "".join(piece.text for piece in corpus)


def documents(corpus: Corpus) -> list[str]:
    whole, held = [], ""
    for piece in corpus:
        held += piece.text
        if piece.closes:
            whole.append(held)
            held = ""
    assert not held
    return whole


def prepared(folder: Path, text: str = TEXT, context: int = 16) -> tuple[data.Tokens, Tokenizer]:
    folder.mkdir(exist_ok=True)
    (folder / "corpus.txt").write_text(text, "utf-8", newline="")
    corpus = Corpus(folder / "corpus.txt")
    tokenizer = train_characters(corpus)
    tokens = write_tokens(corpus, tokenizer, folder / "tokens", context=context, validation=0.1)
    return tokens, tokenizer


# ---- corpora


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 1 << 20])
def test_file_is_read_whole_whatever_the_block(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "BLOCK_CHARACTERS", block)
    (tmp_path / "a.txt").write_text(TEXT[:300], "utf-8")
    assert documents(Corpus(tmp_path / "a.txt")) == [TEXT[:300]]


def test_line_ends_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert text_of(Corpus(tmp_path / "a.txt")) == "one\r\ntwo\rthree\n"


def test_folder_gives_every_file_but_hidden_ones(tmp_path: Path) -> None:
    for name in ("a.txt", "sub/b.md", "sub/deeper/c", ".git/d", "sub/.e"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert sorted(documents(Corpus(tmp_path))) == ["a.txt", "sub/b.md", "sub/deeper/c"]


def test_order_of_a_folder_depends_on_names_alone(tmp_path: Path) -> None:
    for root, names in (("x", "abcdef"), ("y", "fedcba")):
        (tmp_path / root).mkdir()
        for name in names:
            (tmp_path / root / name).write_text(name)
    assert documents(Corpus(tmp_path / "x")) == documents(Corpus(tmp_path / "y"))


def test_jsonl_gives_a_document_for_each_row(tmp_path: Path) -> None:
    rows = ["one\nline", "", "two é\u2028"]
    lines = [json.dumps({"text": text, "more": 1}, ensure_ascii=False) for text in rows]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, ""]), "utf-8")
    assert documents(Corpus(tmp_path / "a.jsonl")) == ["one\nline", "two é\u2028"]


def test_standard_library_is_the_default() -> None:
    files = Corpus(None).files
    assert files == Corpus(None).files
    assert 3e6 < sum(file.stat().st_size for file in files) < 6e6
    assert not any({"test", "tests", "site-packages"} & set(file.parts[-4:]) for file in files)


@pytest.mark.parametrize("block", [3, 1 << 20])
@pytest.mark.parametrize(
    ("content", "offset"),
    [(b"\xff", 0), (b"ab\xe9cd", 2), ("aé漢".encode()[:-1], 3), (b"x" * 10 + b"\x80", 10)],
)
def test_byte_that_is_not_utf8_is_named(
    content: bytes, offset: int, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "BLOCK_CHARACTERS", block)
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"bad\.txt must be UTF-8 text, .* offset {offset}$"):
        list(Corpus(tmp_path / "bad.txt"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('{"txt": "a"}', 'line 2 must be {"text"'),
        ('{"text": 3}', 'line 2 must be {"text"'),
        ('["text"]', 'line 2 must be {"text"'),
    ],
)
def test_bad_row_is_named(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        list(Corpus(tmp_path / "a.jsonl"))


def test_missing_path_and_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere must be a file or a folder"):
        Corpus(tmp_path / "nowhere")
    with pytest.raises(DataError, match="got an empty folder"):
        Corpus(tmp_path)


# ---- token files


def test_tokens_spell_the_corpus_and_end_each_document(tmp_path: Path) -> None:
    tokens, tokenizer = prepared(tmp_path)
    ids = [*tokens.train, *tokens.validation]
    assert ids[-1] == tokenizer.token_to_id(END_OF_TEXT)
    assert tokenizer.decode(ids[:-1]) == TEXT
    assert len(tokens.validation) == int(len(ids) * 0.1)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(257, "<u2"), (65_536, "<u2"), (65_537, "<u4"), (128_000, "<u4")]
)
def test_dtype_holds_the_largest_id(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(dtype)
    assert np.array(vocab_size - 1).astype(dtype) == vocab_size - 1


@pytest.mark.parametrize("text", ["", "\n", "short"])
def test_corpus_that_is_empty_or_shorter_than_the_context_is_refused(
    text: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="empty corpus" if not text else "more than context = 16"):
        prepared(tmp_path, text)
    assert not list((tmp_path / "tokens").iterdir())


@pytest.mark.parametrize("damage", ["flip", "truncate", "append", "delete", "description"])
@pytest.mark.parametrize("name", ["train.bin", "validation.bin"])
def test_damaged_token_file_is_never_used(name: str, damage: str, tmp_path: Path) -> None:
    prepared(tmp_path)
    file = tmp_path / "tokens" / name
    content = file.read_bytes()
    if damage == "flip":
        file.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    elif damage == "truncate":
        file.write_bytes(content[:-2])
    elif damage == "append":
        file.write_bytes(content + b"\0\0")
    elif damage == "delete":
        file.unlink()
    else:
        (tmp_path / "tokens" / "tokens.json").write_text("{")
    with pytest.raises(DataError, match=name if damage != "description" else "tokens.json"):
        read_tokens(tmp_path / "tokens")


def test_id_beyond_the_vocabulary_is_named_with_its_place(tmp_path: Path) -> None:
    tokens, tokenizer = prepared(tmp_path)
    ids = np.array(tokens.train)
    ids[123] = 60_000
    ids.tofile(tmp_path / "tokens" / "train.bin")
    limit = tokenizer.get_vocab_size()
    with pytest.raises(DataError, match=f"ids below {limit}, got 60000 at token 123"):
        read_tokens(tmp_path / "tokens")


# ---- batches


def test_batches_are_a_function_of_seed_and_number() -> None:
    tokens = np.arange(1000, dtype="<u2")
    forwards = [Batches(tokens, 8, 4, seed=5)(n)[0] for n in range(70)]
    # one object asked in another order, across three epochs
    one = Batches(tokens, 8, 4, seed=5)
    for n in reversed(range(70)):
        assert torch.equal(one(n)[0], forwards[n])
    assert not torch.equal(Batches(tokens, 8, 4, seed=6)(0)[0], forwards[0])


def test_targets_are_the_ids_that_follow() -> None:
    ids, targets = Batches(np.arange(100, dtype="<u2"), 8, 4, seed=0)(0)
    assert ids.dtype == torch.int64
    assert ids.shape == (4, 8)
    assert torch.equal(targets, ids + 1)


@pytest.mark.parametrize("count", [9, 16, 17, 18, 100, 1000])
def test_epoch_predicts_no_token_twice_and_leaves_out_little(count: int) -> None:
    batches = Batches(np.arange(count, dtype="<u2"), 8, 1, seed=3)
    for epoch in range(3):
        rows = range(epoch * batches.windows, (epoch + 1) * batches.windows)
        seen = Counter(int(t) for row in rows for t in batches(row)[1].flatten())
        assert max(seen.values()) == 1
        # what the moving start leaves out at both ends
        assert len(seen) >= min(8, count - 1)
        assert count - 1 - len(seen) < 2 * 8


def test_epochs_differ_in_order_and_in_cuts() -> None:
    batches = Batches(np.arange(1000, dtype="<u2"), 8, 1, seed=3)
    starts = [
        [
            int(batches(row)[0][0, 0])
            for row in range(e * batches.windows, (e + 1) * batches.windows)
        ]
        for e in range(4)
    ]
    assert len({start % 8 for epoch in starts for start in epoch[:1]}) > 1
    assert all(epoch != sorted(epoch) for epoch in starts)


@pytest.mark.parametrize("most", [1, 40, 80, 10_000])
def test_validation_reads_what_it_may_and_spreads_it(most: int) -> None:
    tokens = np.arange(1001, dtype="<u2")
    rows = torch.cat([ids for ids, _ in validation_batches(tokens, 8, 3, most)])
    assert len(rows) == min(1000 // 8, max(1, most // 8))
    assert len({int(row[0]) for row in rows}) == len(rows)
    if len(rows) > 4:
        assert rows[-1, 0] > 700
