"""Tokenizers learned from a corpus, saved so that ``tokenizers`` and transformers open them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from fastlm.training.data import Piece

END_OF_TEXT = "<|endoftext|>"

PIECES_AT_ONCE = 64
"""Documents given to the tokenizer's threads together."""


def train_bpe(pieces: Iterable[Piece], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: any text is a sequence of its tokens, and comes back exactly.

    Args:
        pieces: The corpus.
        vocab_size: At least 257: the bytes and end of text.  A small corpus may give fewer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece.text for piece in pieces), trainer)
    return tokenizer


def train_characters(pieces: Iterable[Piece]) -> Tokenizer:
    """One token for each character of the corpus, in the order of their code points.

    Other characters cannot be encoded: ``encode`` leaves them out.
    """
    characters: set[str] = set()
    for piece in pieces:
        characters.update(piece.text)
    vocabulary = {END_OF_TEXT: 0} | {char: id for id, char in enumerate(sorted(characters), 1)}
    # BPE without merges: each character of the input is its own token
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def encode_documents(
    tokenizer: Tokenizer, pieces: Iterable[Piece]
) -> Iterator[tuple[Piece, list[int]]]:
    """The ids of each piece.  A corpus that spells out a special token gets it as plain text."""
    tokenizer.encode_special_tokens = True
    try:
        held: list[Piece] = []
        for piece in pieces:
            held.append(piece)
            if len(held) == PIECES_AT_ONCE:
                yield from _encode(tokenizer, held)
                held = []
        yield from _encode(tokenizer, held)
    finally:
        tokenizer.encode_special_tokens = False


def _encode(tokenizer: Tokenizer, pieces: list[Piece]) -> Iterator[tuple[Piece, list[int]]]:
    encodings = tokenizer.encode_batch_fast([piece.text for piece in pieces])
    yield from zip(pieces, (encoding.ids for encoding in encodings), strict=True)


def token_bytes(tokenizer: Tokenizer) -> list[int]:
    """How many UTF-8 bytes of text each id stands for; 0 for end of text."""
    by_id = {id: token for token, id in tokenizer.get_vocab().items()}
    # byte-level BPE spells each byte as one character of its own alphabet
    is_byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
    lengths = [
        len(token) if is_byte_level else len(token.encode())
        for token in (by_id[id] for id in range(tokenizer.get_vocab_size()))
    ]
    lengths[end_of_text(tokenizer)] = 0
    return lengths


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id that closes each document."""
    return tokenizer.get_vocab()[END_OF_TEXT]


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write tokenizer.json and the tokenizer_config.json that transformers wants beside it."""
    # not by tokenizer.save: it raises a bare Exception where the disk is full
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), "utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
