"""``fastlm chat``: a conversation in a terminal, or over a pipe."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from fastlm._errors import ArgumentError, UserError
from fastlm.cli import FAILED
from fastlm.cli._flags import parse

if TYPE_CHECKING:
    from fastlm.inference.completion import StreamItem
    from fastlm.inference.conversation import Conversation

HELP = """\
/reset            forget what was said
/system TEXT      instruct the model with TEXT from now on; without TEXT, no more
/set NAME=VALUE   change a setting; without them, show all
/help             show this
/quit             end, as Ctrl-D does
//TEXT            say /TEXT
Ctrl-C stops an answer."""
# settings, all of them numbers, and whether whole ones
_NUMBERS = {
    "max_new_tokens": True,
    "temperature": False,
    "top_k": True,
    "top_p": False,
    "min_p": False,
    "repetition_penalty": False,
    "seed": True,
    "top_logprobs": True,
}


@dataclass(frozen=True)
class ChatOptions:
    """Talk with a model.

    What you type goes to the model by its chat template; a model without one continues it as plain
    text.  Ctrl-C stops an answer, Ctrl-D ends, /help lists what else there is.  Over a pipe each
    line is a question; one that is refused makes the exit code 1, and the next ones are answered.
    """

    run: Positional[str]
    """Run folder, any model folder in Hugging Face's layout, or a name on the Hugging Face hub."""
    system: str | None = None
    """Instruction to the model, before the conversation."""
    max_new_tokens: int = 512
    """At most this many tokens in an answer."""
    temperature: float | None = None
    """0 takes the most likely token each time, more makes it bolder. None, as for the next four:
    what the model's generation_config.json says; else 0, or 1 with one of the next three."""
    top_k: int | None = None
    """Draw from the k most likely tokens."""
    top_p: float | None = None
    """Draw from the most likely tokens that together reach this probability."""
    min_p: float | None = None
    """Draw from the tokens at least this fraction as likely as the most likely."""
    repetition_penalty: float | None = None
    """Above 1 makes tokens that were there less likely."""
    seed: int | None = None
    """Equal seeds give equal answers in equal conversations."""
    stop: tuple[str, ...] = ()
    """Strings to end an answer before."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end an answer, besides those of the model."""
    prompt_lookup_num_tokens: int = 0
    """Guess up to this many tokens ahead where the conversation repeats itself: faster there, and
    the same text but for rounding."""
    kv_cache: Literal["float", "int8"] = "float"
    """Hold keys and values in the dtype of the weights or in 8 bits."""
    weights: Literal["float", "int8", "int4"] = "float"
    """Hold the weights in this many bits: less memory to read for each token."""
    group_size: int = 128
    """Of int4: how many inputs share a step; 32, 64, 128 or 256."""
    top_logprobs: int = 0
    """After an answer, show for each of its tokens how likely this many most likely ones were."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ArgumentError(f"chat: max_new_tokens must be above 0, got {self.max_new_tokens}")
        if self.top_logprobs < 0:
            raise ArgumentError(f"chat: top_logprobs must be at least 0, got {self.top_logprobs}")
        guesses = self.prompt_lookup_num_tokens
        if guesses < 0:
            raise ArgumentError(f"chat: prompt_lookup_num_tokens must be at least 0, got {guesses}")
        if not all(self.stop):
            raise ArgumentError(f"chat: stop must be strings that are not empty, got {self.stop!r}")

    @property
    def settings(self) -> dict[str, Any]:
        """What may change during a conversation."""
        return {name: getattr(self, name) for name in _NUMBERS}

    @property
    def sampling(self) -> dict[str, float | None]:
        """How tokens are drawn, the seed apart."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        return {name: getattr(self, name) for name in names}

    @property
    def fixed(self) -> dict[str, Any]:
        """Of every answer."""
        names = ("stop", "stop_token_ids", "prompt_lookup_num_tokens", "kv_cache")
        return {name: getattr(self, name) for name in names}


def run(argv: Sequence[str]) -> int:
    """The exit code: over a pipe, where nobody reads along, a failure if a line was not done."""
    options = _checked(parse(ChatOptions, "chat", argv))
    # here and not above: help needs no torch
    from fastlm.inference.conversation import open_conversation

    conversation = open_conversation(
        options.run, options.system, weights=options.weights, group_size=options.group_size
    )
    conversation.check(stop_token_ids=options.stop_token_ids, **options.sampling)
    if conversation.template is None:
        _say(f"{options.run} has no chat template: what you write is continued as plain text")
    if sys.stdin.isatty():
        _say("/help lists the commands, Ctrl-D ends")
    code = 0
    for line in _lines():
        try:
            if line.startswith("//"):
                _answer(line[1:], options, conversation)
            elif not line.startswith("/"):
                _answer(line, options, conversation)
            elif line == "/quit":
                break
            else:
                options = _command(line, options, conversation)
        except (UserError, FloatingPointError) as error:
            _say(str(error))
            code = FAILED
    return 0 if sys.stdin.isatty() else code


def _lines() -> Iterator[str]:
    """What is typed, or comes through a pipe, without empty lines."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        # bytes that are no text are refused where they are used, and end nothing
        sys.stdin.reconfigure(errors="surrogateescape")
    if not sys.stdin.isatty():
        yield from (text for line in sys.stdin if (text := line.strip()))
        return
    with contextlib.suppress(ImportError):
        # from now on input() can edit a line and go back to others
        importlib.import_module("readline")
    while True:
        try:
            text = input("> ").strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        if text:
            yield text


def _answer(question: str, options: ChatOptions, conversation: Conversation) -> None:
    """Print an answer while it is made; Ctrl-C ends it there."""
    finish: str | None = None
    tokens: list[StreamItem] = []
    try:
        with contextlib.closing(
            conversation.answer(question, **options.settings, **options.fixed)
        ) as items:
            if conversation.forgotten:
                turns = "turn is" if conversation.forgotten == 1 else "turns are"
                _say(
                    f"the conversation passes the context of {conversation.context} tokens: its "
                    f"{conversation.forgotten} oldest {turns} forgotten"
                )
            for item in items:
                print(item.text, end="", flush=True)
                finish = item.finish
                tokens.append(item)
        print(flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        _say("stopped")
    except FloatingPointError:
        print(flush=True)
        raise
    for item in tokens:
        if item.top_logprobs:
            others = (f"{conversation.shown(n)} {math.exp(p):.1%}" for n, p in item.top_logprobs)
            own = f"{conversation.shown(item.id)} {math.exp(item.logprob):.1%}"
            _say(f"{own} of {', '.join(others)}")
    if finish == "length":
        _say(f"stopped after max_new_tokens, {options.max_new_tokens}")
    elif finish == "context":
        _say(f"stopped where the context of {conversation.context} tokens is full")


def _command(line: str, options: ChatOptions, conversation: Conversation) -> ChatOptions:
    """Do what a line with / says; return the options from now on."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    match name:
        case "/help":
            _say(HELP)
        case "/reset":
            conversation.reset()
            _say("forgotten")
        case "/system":
            conversation.instruct(rest or None)
        case "/set" if rest:
            return _changed(options, rest)
        case "/set":
            _say("\n".join(f"{name}={value}" for name, value in options.settings.items()))
        case _:
            raise ArgumentError(f"chat: there is no command {name}; /help lists them")
    return options


def _changed(options: ChatOptions, change: str) -> ChatOptions:
    """The options after NAME=VALUE."""
    name, _, value = (part.strip() for part in change.partition("="))
    if name not in options.settings:
        names = ", ".join(options.settings)
        raise ArgumentError(f"chat: setting must be one of {names}, got {name!r}")
    whole = _NUMBERS[name]
    try:
        number = None if value.lower() == "none" else int(value) if whole else float(value)
    except ValueError:
        kind = "a whole number" if whole else "a number"
        raise ArgumentError(f"chat: {name} must be {kind}, got {value!r}") from None
    if number is None and name in ("max_new_tokens", "top_logprobs"):
        raise ArgumentError(f"chat: {name} must be a whole number, got {value!r}")
    changed: dict[str, Any] = {name: number}
    return _checked(dataclasses.replace(options, **changed))


def _checked(options: ChatOptions) -> ChatOptions:
    """The options, where generation would take them.

    Raises:
        ArgumentError: It would not; the message names the value.
    """
    import torch

    from fastlm.inference.generation_config import chosen
    from fastlm.model.sampling import Sampling, new_generator

    chosen(Sampling(), **options.sampling)
    new_generator(options.seed, torch.device("cpu"))
    return options


def _say(text: str) -> None:
    """What is no part of the conversation goes where a pipe does not see it."""
    print(text, file=sys.stderr, flush=True)
