"""Text in, reproducible batches of token ids out.

A corpus is a sequence of documents.  Its tokens, each document closed by end of text, lie in two
flat files (training and validation) of little-endian uint16 or uint32, which are memory-mapped.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastlm._errors import UserError
from fastlm.training.tokenizer import encode_documents, end_of_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BLOCK_CHARACTERS = 1 << 20
"""Longer documents are read and tokenised in pieces of about this size."""

STANDARD_LIBRARY_BYTES = 4_000_000
"""How much of the standard library the default corpus takes."""

# folders of the standard library with tests, tables, or nothing of its own
_NO_SOURCE = {
    *("test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__"),
    *("encodings", "pydoc_data", "turtledemo", "ensurepip"),
}


class DataError(UserError, ValueError):
    """The corpus cannot be used; the message says what is wrong and where."""


@dataclass(frozen=True)
class Piece:
    """Some text, and whether its document ends here."""

    text: str
    closes: bool


class Corpus:
    """The documents under a path, read again at each iteration.

    Args:
        path: A text file, a folder (every file in it that is not hidden), a ``.jsonl`` file with
            ``{"text": ...}`` on each line, or None for the standard library's source.

    Raises:
        DataError: There is no such path, or a folder without files.  While iterating: a file that
            cannot be read, is not UTF-8 (with the offset of the byte), or a row without a text.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.name = "Python standard library" if path is None else str(path)
        if path is None:
            self.files = _standard_library()
            return
        path = Path(path)
        if path.is_dir():
            self.files = _shuffled(
                [file for file in path.rglob("*") if file.is_file() and not _hidden(file, path)],
                path,
            )
            if not self.files:
                raise DataError(f"data: {path} must hold text files, got an empty folder")
        elif path.exists():
            self.files = [path]
        else:
            raise DataError(f"data: {path} must be a file or a folder, got nothing there")

    def __iter__(self) -> Iterator[Piece]:
        for file in self.files:
            yield from _read_jsonl(file) if file.suffix == ".jsonl" else _read_text(file)


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _shuffled(files: list[Path], root: Path) -> list[Path]:
    """An order that is the same everywhere and has all kinds of files in its last tenth too."""

    def key(file: Path) -> bytes:
        return hashlib.sha256(file.relative_to(root).as_posix().encode()).digest()

    return sorted(files, key=key)


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    sources = list(_sources(root))
    if not sources:
        raise DataError(
            f"data: {root} must hold the standard library's source, got none; pass data"
        )
    chosen, size = [], 0
    for file in _shuffled(sources, root):
        if size < STANDARD_LIBRARY_BYTES and _is_utf8(file):
            chosen.append(file)
            size += file.stat().st_size
    return chosen


def _sources(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir():
            if path.name not in _NO_SOURCE:
                yield from _sources(path)
        elif path.suffix == ".py" and not path.name.startswith(("_sysconfigdata", "test_")):
            yield path


def _is_utf8(file: Path) -> bool:
    try:
        file.read_text("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _read_text(file: Path) -> Iterator[Piece]:
    """Pieces that end at line ends, so that a token seldom loses its neighbour at a seam."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    read, held = 0, ""
    try:
        with file.open("rb") as stream:
            while block := stream.read(BLOCK_CHARACTERS):
                pending = len(decoder.getstate()[0])
                try:
                    held += decoder.decode(block)
                except UnicodeDecodeError as error:
                    raise _not_utf8(file, read - pending + error.start) from None
                read += len(block)
                if (cut := held.rfind("\n") + 1) and len(held) >= BLOCK_CHARACTERS:
                    yield Piece(held[:cut], closes=False)
                    held = held[cut:]
    except OSError as error:
        raise DataError(f"data: {file} cannot be read: {error.strerror}") from None
    if trailing := decoder.getstate()[0]:
        raise _not_utf8(file, read - len(trailing))
    if held or read:
        yield Piece(held, closes=True)


def _not_utf8(file: Path, offset: int) -> DataError:
    return DataError(f"data: {file} must be UTF-8 text, got another byte at offset {offset}")


def _read_jsonl(file: Path) -> Iterator[Piece]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"data: {file} line {number} is not JSON: {error.msg}") from None
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise DataError(f'data: {file} line {number} must be {{"text": "..."}}, got {line:.40}')
        if text:
            yield Piece(text, closes=True)


def _lines(file: Path) -> Iterator[str]:
    held = ""
    for piece in _read_text(file):
        *lines, held = (held + piece.text).split("\n")
        yield from lines
    yield held


# ---- token files


@dataclass(frozen=True)
class Tokens:
    """Both splits as flat arrays of ids, memory-mapped."""

    train: np.ndarray
    validation: np.ndarray


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def write_tokens(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, *, context: int, validation: float
) -> Tokens:
    """Tokenise the corpus into ``folder``: train.bin, validation.bin and tokens.json.

    The last ``validation`` of the tokens are held out.

    Raises:
        DataError: The corpus is empty, or either split is shorter than one sequence.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = tokenizer.get_vocab_size()
    dtype = token_dtype(vocab_size)
    everything = folder / "everything.bin"
    end = end_of_text(tokenizer)
    with everything.open("wb") as stream:
        for piece, ids in encode_documents(tokenizer, corpus):
            stream.write(np.asarray([*ids, end] if piece.closes else ids, dtype).tobytes())
    count = everything.stat().st_size // dtype.itemsize
    held_out = int(count * validation)
    if count <= 1:
        everything.unlink()
        raise DataError(f"data: {corpus.name} must hold text, got an empty corpus")
    if min(held_out, count - held_out) <= context:
        everything.unlink()
        raise DataError(
            f"data: {corpus.name} must give more than context = {context} tokens to train on and "
            f"to hold out, got {count - held_out} and {held_out}"
        )
    tokens: np.ndarray = np.memmap(everything, dtype, "r")
    description = {"vocab_size": vocab_size, "dtype": dtype.str}
    for name, part in (
        ("train", tokens[: count - held_out]),
        ("validation", tokens[count - held_out :]),
    ):
        part.tofile(folder / f"{name}.bin")
        description[name] = len(part)
        description[f"{name}_sha256"] = hashlib.sha256(part.data).hexdigest()
    (folder / "tokens.json").write_text(json.dumps(description, indent=2) + "\n", "utf-8")
    del tokens
    everything.unlink()
    return read_tokens(folder)


def read_tokens(folder: Path) -> Tokens:
    """Map the two token files.

    Raises:
        DataError: A file is missing or is not the one that was written.
    """
    try:
        description = json.loads((folder / "tokens.json").read_text("utf-8"))
        dtype = np.dtype(description["dtype"])
        splits = [
            _map_tokens(
                folder / f"{name}.bin",
                dtype,
                description[name],
                description["vocab_size"],
                description[f"{name}_sha256"],
            )
            for name in ("train", "validation")
        ]
    except OSError as error:
        raise DataError(f"data: {error.filename} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise DataError(f"data: {folder / 'tokens.json'} is damaged") from None
    return Tokens(*splits)


def _map_tokens(
    file: Path, dtype: np.dtype[Any], count: int, vocab_size: int, sha256: str
) -> np.ndarray:
    size = file.stat().st_size
    if size != count * dtype.itemsize:
        raise DataError(f"data: {file} must hold {count * dtype.itemsize} bytes, got {size}")
    tokens: np.ndarray = np.memmap(file, dtype, "r")
    place = int(tokens.argmax())
    if tokens[place] >= vocab_size:
        raise DataError(
            f"data: {file} must hold ids below {vocab_size}, got {tokens[place]} at token {place}"
        )
    if hashlib.sha256(tokens.data).hexdigest() != sha256:
        raise DataError(f"data: {file} is damaged: its SHA-256 is not the one in tokens.json")
    return tokens


# ---- batches


class Batches:
    """Sequences of the training tokens; which ones is a function of (seed, row) alone.

    An epoch cuts the tokens into windows, each of which predicts ``context`` tokens from the one
    before each, so that no token is predicted twice; it starts at another place each epoch and
    visits the windows in random order.

    Args:
        tokens: Flat ids, at least ``context + 1``.
        context: Tokens in a sequence.
        batch_size: Sequences in a batch.
        seed: Chooses starts and orders.
    """

    def __init__(self, tokens: np.ndarray, context: int, batch_size: int, seed: int) -> None:
        self.tokens, self.context, self.batch_size, self.seed = tokens, context, batch_size, seed
        # one window fewer than fit, so that the start can move by a whole window
        self.windows = max(1, (len(tokens) - 1) // context - 1)
        self.slack = len(tokens) - 1 - self.windows * context
        self._epoch, self._starts = -1, np.empty(0, np.int64)

    def __call__(self, batch: int) -> tuple[Tensor, Tensor]:
        """A batch by its number: ids and the ids that follow them, ``(batch_size, context)``."""
        first = batch * self.batch_size
        rows = range(first, first + self.batch_size)
        return _sequences(self.tokens, [self._start(row) for row in rows], self.context)

    def _start(self, row: int) -> int:
        epoch, index = divmod(row, self.windows)
        if epoch != self._epoch:
            draw = np.random.default_rng([self.seed, epoch])
            offset = draw.integers(self.slack + 1)
            self._starts = offset + draw.permutation(self.windows) * self.context
            self._epoch = epoch
        return int(self._starts[index])


def validation_batches(
    tokens: np.ndarray, context: int, batch_size: int, most_tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Evenly spread sequences of the held-out tokens, about ``most_tokens`` at most."""
    windows = (len(tokens) - 1) // context
    chosen = min(windows, max(1, most_tokens // context))
    starts = (np.arange(chosen) * windows // chosen * context).tolist()
    for first in range(0, chosen, batch_size):
        yield _sequences(tokens, starts[first : first + batch_size], context)


def _sequences(tokens: np.ndarray, starts: list[int], context: int) -> tuple[Tensor, Tensor]:
    windows = np.stack([tokens[start : start + context + 1] for start in starts]).astype(np.int64)
    ids = torch.from_numpy(windows)
    return ids[:, :-1], ids[:, 1:]
