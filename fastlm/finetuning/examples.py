"""Rows as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fastlm.finetuning.config import COMMAND
from fastlm.finetuning.rows import Row
from fastlm.training.data import DataError


@dataclass(frozen=True)
class Example:
    """A sequence of tokens.

    Attributes:
        ids: Of all tokens.
        learned: For each, whether the loss is on it; never on the first, which nothing predicts.
        prompt: How many come before the last thing to learn.
        label: Which of the labels it has, or None.
    """

    ids: tuple[int, ...]
    learned: tuple[bool, ...]
    prompt: int = 0
    label: int | None = None

    @property
    def num_learned(self) -> int:
        return sum(self.learned)


class Encoder:
    """Makes examples of rows.

    Prompt and answer are encoded apart, so that a prompt is the same tokens with any answer and
    with none, as it is when the model is used.

    Args:
        tokenizer: Of transformers.
        max_length: Tokens of an example.
        labels: All labels that there are.

    Attributes:
        labels: As they were given.
        label_ids: Tokens of each, as the model is to write it.
        shortened: Rows that lost the beginning of their prompt.
        split: Texts that became several examples.

    Raises:
        DataError: Two labels cannot be told apart.
    """

    def __init__(self, tokenizer: Any, max_length: int, labels: Sequence[str] = ()) -> None:
        self.tokenizer, self.max_length, self.labels = tokenizer, max_length, tuple(labels)
        end = tokenizer.eos_token_id
        self.end: tuple[int, ...] = () if end is None else (end,)
        self.label_ids = self._label_ids()
        self.shortened = self.split = 0

    def _label_ids(self) -> tuple[tuple[int, ...], ...]:
        found = [self._encode(f" {label}", starts=False) for label in self.labels]
        # a label that begins another one is never less likely, unless its end counts too
        # with the end of text that every answer has
        self.longest_label = max(map(len, found), default=0) + len(self.end)
        begins = any(b[: len(a)] == a for a, b in pairwise(sorted(found)))
        if begins:
            found = [ids + self.end for ids in found]
        if begins and (not self.end or len(set(found)) < len(found)):
            raise DataError(
                f"{COMMAND}: labels must differ in their tokens, and none may begin another, got "
                f"{', '.join(map(repr, self.labels))}"
            )
        return tuple(found)

    def prompt_ids(
        self, text: str, *, spelled: bool = False, whose: str = "prompt"
    ) -> tuple[int, ...]:
        """Tokens of a prompt, with what the tokenizer begins a text with; never none.

        Raises:
            DataError: It is empty, and the tokenizer has no token that begins or ends a text; the
                message begins with ``whose``.
        """
        ids = self._encode(text, starts=not spelled)
        if ids:
            return ids
        start = self.tokenizer.bos_token_id
        if start is None and not self.end:
            raise DataError(
                f"{COMMAND}: {whose} must not be empty: the tokenizer has no token that begins or "
                "ends a text"
            )
        return self.end if start is None else (start,)

    def encode(self, row: Row) -> list[Example]:
        """One example, or several of a text that is longer than ``max_length``.

        Raises:
            DataError: There is nothing to learn in it, or its answer is longer than that.
        """
        ids, learned = list[int](), list[bool]()
        prompt = 0
        for number, piece in enumerate(row.pieces):
            starts = number == 0 and not row.spelled
            if piece is row.pieces[-1]:
                prompt = len(ids)
            if starts and not piece.learned:
                new = self.prompt_ids(piece.text, whose=f"{row.place}: prompt")
            else:
                new = self._encode(piece.text, starts=starts)
            ids += new
            learned += [piece.learned] * len(new)
        if not row.spelled:
            ids += self.end
            learned += [True] * len(self.end)
        if len(row.pieces) == 1:
            return self._of_text(row, ids)
        room = self.max_length
        if row.label is not None:
            # as much of the text as there is with the longest label, whichever this row has
            room += len(ids) - prompt - self.longest_label
        answer = len(ids) - prompt
        if answer >= self.max_length or room <= answer:
            raise DataError(
                f"{COMMAND}: {row.place}: the answer must be shorter than max_length, which is "
                f"{self.max_length} tokens, got {answer}"
            )
        cut = max(0, len(ids) - room)
        self.shortened += cut > 0
        ids, learned = ids[cut:], learned[cut:]
        learned[0] = False
        if not any(learned):
            raise DataError(f"{COMMAND}: {row.place}: nothing comes before its one token to learn")
        label = None if row.label is None else self.labels.index(row.label)
        return [Example(tuple(ids), tuple(learned), prompt - cut, label)]

    def _of_text(self, row: Row, ids: list[int]) -> list[Example]:
        parts = [ids[at : at + self.max_length] for at in range(0, len(ids), self.max_length)]
        # of the first token nothing is known, so one alone has nothing to learn
        parts = [part for part in parts if len(part) > 1]
        if not parts:
            raise DataError(f"{COMMAND}: {row.place}: text must have two tokens, got {len(ids)}")
        self.split += len(parts) > 1
        return [Example(tuple(part), (False, *[True] * (len(part) - 1))) for part in parts]

    def _encode(self, text: str, *, starts: bool) -> tuple[int, ...]:
        ids = self.tokenizer.encode(text, add_special_tokens=starts, verbose=False)
        if starts and self.end and ids[-1:] == list(self.end):
            ids = ids[:-1]  # some tokenizers end a text too, and this one goes on
        return tuple(ids)
