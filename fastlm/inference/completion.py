"""What a model answers, as text: tokens one by one, whole completions, scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from fastlm.inference.text import StopStrings, TextStream
from fastlm.model.generate import Drawn, Request


@dataclass(frozen=True)
class StreamItem:
    """One generated token.

    Attributes:
        text: Text that became certain with it: empty while a character or a stop string may be
            incomplete.  The texts of all items join to what ``generate`` returns.
        id: The token.
        logprob: Its natural log probability under the model, before temperature and filters.
        finish: Why it is the last, or None: ``"eos"`` (a token that ends a text), ``"stop"`` (a
            stop string), ``"length"`` (``max_new_tokens``) or ``"context"`` (the context is full).
        top_logprobs: The most likely tokens in its place, ``(id, logprob)``, most likely first, as
            many as were asked for.
    """

    text: str
    id: int
    logprob: float
    finish: str | None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """A whole continuation.

    Attributes:
        text: Without the prompt, stop string and special tokens.
        items: Its tokens.
        finish: As in :class:`StreamItem`; ``"length"`` where no token was asked for, ``"error"``
            where the model's logits were not finite, after ``items``.
    """

    text: str
    items: tuple[StreamItem, ...]
    finish: str

    @property
    def ids(self) -> tuple[int, ...]:
        """Token ids, a last one that ends the text among them."""
        return tuple(item.id for item in self.items)

    @property
    def logprob(self) -> float:
        """Natural log probability of all its tokens under the model."""
        return sum(item.logprob for item in self.items)


@dataclass(frozen=True)
class Score:
    """How likely a model finds a continuation.

    Attributes:
        ids: Tokens of the continuation.
        logprobs: Natural log probability of each, given what is before it.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def logprob(self) -> float:
        """Of the whole continuation."""
        return sum(self.logprobs)


class Reader:
    """Makes text of the tokens of one request.

    Args:
        tokenizer: Knows the tokens.
        request: What was asked for.
        stop: Strings to end before.
        limit: Why a request with all its tokens ends: ``"length"`` or ``"context"``.
    """

    def __init__(
        self, tokenizer: Tokenizer, request: Request, stop: str | Sequence[str] | None, limit: str
    ) -> None:
        self._stops = StopStrings(stop)
        self._texts = TextStream(tokenizer, request.prompt)
        self._end_ids, self._limit = request.end_ids, limit
        self._tail = ""
        self.items: list[StreamItem] = []

    def read(self, drawn: Drawn) -> StreamItem:
        """The item of the next token; the last one has a ``finish``."""
        ended = drawn.token in self._end_ids
        text = self._stops.add("" if ended else self._texts.add(drawn.token))
        if drawn.is_last:
            text += self._stops.add(self._texts.finish()) + self._stops.finish()
        finish = "stop" if self._stops.found else self._limit if drawn.is_last else None
        finish = "eos" if ended else finish
        item = StreamItem(text, drawn.token, drawn.logprob, finish, drawn.top)
        self.items.append(item)
        return item

    def fail(self) -> None:
        """There is no next token: the model's logits are not finite."""
        self._tail = self._stops.add(self._texts.finish()) + self._stops.finish()
        self._limit = "error"

    @property
    def completion(self) -> Completion:
        """What was read."""
        finish = self.items[-1].finish if self.items else None
        text = "".join(item.text for item in self.items) + self._tail
        return Completion(text, tuple(self.items), finish or self._limit)
