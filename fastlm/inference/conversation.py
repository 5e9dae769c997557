"""A conversation with a model, within its context."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer

from fastlm._errors import ArgumentError
from fastlm.inference.chat import ChatTemplate, Message
from fastlm.inference.generation_config import chosen
from fastlm.inference.language_model import (
    LanguageModel,
    StreamItem,
    check_stop_token_ids,
    load,
)
from fastlm.model.hub import model_folder


class Conversation:
    """Questions and answers, each answer given in the light of all before that fit.

    Attributes:
        messages: What was said, each with ``"role"`` and ``"content"``, the system's first.
        template: Of the model; None for one that has none and continues plain text.
        forgotten: How many turns the latest question left no room for.

    Args:
        model: Gives the answers.
        template: Writes the messages down for it.
        system: Instruction that stands before the conversation, or None.
    """

    def __init__(
        self, model: LanguageModel, template: ChatTemplate | None, system: str | None = None
    ) -> None:
        self.template = template
        self.forgotten = 0
        self.messages: list[Message] = []
        self._ends: list[int] = []
        self._model = model
        if template is not None:
            # the template has written all special tokens down already
            self._model = LanguageModel(
                model.model, _without_additions(model.tokenizer), model.defaults
            )
            # usually among the tokens that end a text for the model too, but not in all files
            end = model.tokenizer.token_to_id(template.tokens.get("eos_token", ""))
            self._ends = [] if end is None else [end]
        self.instruct(system)

    @property
    def context(self) -> int:
        """How many tokens a conversation may have."""
        return self._model.model.config.max_position_embeddings

    def instruct(self, system: str | None) -> None:
        """Put another instruction, or none, before what was said."""
        said = [message for message in self.messages if message["role"] != "system"]
        self.messages = [{"role": "system", "content": system}] if system else []
        self.messages += said

    def shown(self, token: int) -> str:
        """The text of a token, quoted."""
        return repr(self._model.tokenizer.decode([token], skip_special_tokens=False))

    def reset(self) -> None:
        """Forget what was said, but not the instruction."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def check(self, *, stop_token_ids: Sequence[int] = (), **sampling: float | None) -> None:
        """Refuse, before there is a question, what this model would refuse for each.

        Args:
            stop_token_ids: As in :meth:`LanguageModel.generate`.
            sampling: Likewise, temperature, top_k, top_p, min_p and repetition_penalty.

        Raises:
            ArgumentError: One is out of range.
            ModelFileError: A value of ``generation_config.json`` that holds here is impossible.
        """
        chosen(self._model.defaults, **sampling)
        check_stop_token_ids(stop_token_ids, self._model.model.config.vocab_size)

    def answer(
        self,
        question: str,
        max_new_tokens: int = 512,
        *,
        stop_token_ids: Sequence[int] = (),
        **options: Any,
    ) -> Generator[StreamItem, None, None]:
        """Answer token by token; options and errors as in :meth:`LanguageModel.stream`.

        Arguments are checked here, before the first item is asked for.  What was answered so far is
        part of the conversation at any time, so that an answer may be left where it is.  Where the
        oldest turns leave no room for an answer of ``max_new_tokens``, or of half the context if
        that is less, they are forgotten.

        Raises:
            ArgumentError: One is out of range, or the question does not fit in the context.
            ChatTemplateError: The template refuses the messages.
        """
        room = min(max_new_tokens, self.context // 2)
        messages: list[Message] = [*self.messages, {"role": "user", "content": question}]
        forgotten = 0
        prompt, length = self._prompt(messages)
        while length > self.context - room and (shorter := _without_a_turn(messages)) is not None:
            messages, forgotten = shorter, forgotten + 1
            prompt, length = self._prompt(messages)
        if length >= self.context:
            raise ArgumentError(
                f"chat: message must leave room for an answer in the context of {self.context} "
                f"tokens, got {length}"
            )
        items = self._model.stream(
            prompt,
            max_new_tokens,
            stop_token_ids=[*self._ends, *stop_token_ids],
            **options,
        )
        reply = {"role": "assistant", "content": ""}
        self.messages, self.forgotten = [*messages, reply], forgotten
        return self._answer(items, reply)

    def _answer(
        self, items: Iterator[StreamItem], reply: dict[str, str]
    ) -> Generator[StreamItem, None, None]:
        for item in items:
            reply["content"] += item.text
            yield item

    def _prompt(self, messages: Sequence[Message]) -> tuple[str, int]:
        """Text that the model continues, and how many tokens it has."""
        text = _plain(messages) if self.template is None else self.template.render(messages)
        return text, len(self._model.encode(text))


def open_conversation(
    source: str | os.PathLike[str],
    system: str | None = None,
    *,
    weights: str = "float",
    group_size: int = 128,
) -> Conversation:
    """A conversation with the model of a run folder, or any other that :func:`fastlm.load` reads.

    ``weights`` and ``group_size`` are as there.

    Raises:
        ModelFileError: Something is missing, damaged or not supported; the message says what.
        ChatTemplateError: Its chat template is none.
    """
    folder = model_folder(source)
    # first: it is read in no time
    template = ChatTemplate.read(folder)
    return Conversation(load(folder, weights=weights, group_size=group_size), template, system)


def _without_a_turn(messages: Sequence[Message]) -> list[Message] | None:
    """Without the oldest question and what followed; None where there is only the latest."""
    questions = [n for n, message in enumerate(messages) if message["role"] == "user"]
    if len(questions) < 2:
        return None
    return [*messages[: questions[0]], *messages[questions[1] :]]


def _plain(messages: Sequence[Message]) -> str:
    """Each question with its answer on a line, the latest without an end."""
    ends = {"system": "\n", "user": "", "assistant": "\n"}
    return "".join(f"{message['content']}{ends[message['role']]}" for message in messages)


def _without_additions(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that adds no special tokens to a text, and cuts and fills up none."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.post_processor = None
    return copy
