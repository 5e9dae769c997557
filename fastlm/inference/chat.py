"""A conversation as the one text that a model was trained to continue: chat templates."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from fastlm._errors import UserError
from fastlm.model.checkpoint import ModelFileError, read_json

TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
# what a template may ask for by these names
SPECIAL_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
# a template is a program of the model's author, in which anything can go wrong
_MISTAKES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)

Message = Mapping[str, str]


class ChatTemplateError(UserError, ValueError):
    """A chat template that cannot be used, or that refuses a conversation; one line says why."""


class ChatTemplate:
    """Writes messages down as one text, by a template of the model's author.

    Agrees with the ``apply_chat_template`` of transformers without tools and documents.  Templates
    come with models, from anywhere: they run in jinja2's sandbox, where they reach nothing but
    what they are given and change none of it.  How long they run is not limited.

    Args:
        source: Template in jinja2's language.
        tokens: Texts of special tokens by the names of ``SPECIAL_TOKENS``.
        origin: Where the template is from, for messages of errors.

    Raises:
        ChatTemplateError: It is no template.
    """

    def __init__(
        self, source: str, tokens: Mapping[str, str] | None = None, origin: str = "chat template"
    ) -> None:
        self.source, self.tokens, self.origin = source, dict(tokens or {}), origin
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise self._error(f"line {error.lineno}: {error.message}") from error
        except _MISTAKES as error:
            raise self._error(error) from error

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> ChatTemplate | None:
        """That of a model folder, or None where it has none.

        It is in ``chat_template.jinja``, or else in ``tokenizer_config.json``, which also has the
        special tokens; of several templates there the one called default.

        Raises:
            ModelFileError: A file cannot be read.
            ChatTemplateError: The template is none.
        """
        folder = Path(folder)
        config: Mapping[str, Any] = {}
        if (folder / TOKENIZER_CONFIG).exists():
            config = read_json(folder / TOKENIZER_CONFIG)
        source: Any
        path = folder / TEMPLATE
        if path.exists():
            try:
                source = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ModelFileError(f"{path}: cannot be read: {error}") from error
        else:
            path = folder / TOKENIZER_CONFIG
            source = _default(config.get("chat_template"))
        if source is None:
            return None
        if not isinstance(source, str):
            raise ModelFileError(f"{path}: chat_template must be text, got {source!r}")
        return cls(source, _special_tokens(config), str(path))

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation.

        Special tokens are spelled out in it, also the one that starts a text: it is to be encoded
        without adding any.

        Args:
            messages: Each with ``"role"``, usually system, user or assistant, and ``"content"``.
            add_generation_prompt: End with what comes before an answer.

        Raises:
            ChatTemplateError: The template refuses these messages, or fails.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self.tokens,
            )
        except _MISTAKES as error:
            raise self._error(error) from error

    def _error(self, reason: object) -> ChatTemplateError:
        said = " ".join(str(reason).split()) or type(reason).__name__
        return ChatTemplateError(f"{self.origin}: {said}")


def _default(given: Any) -> Any:
    """The template of that name, where there are several."""
    if not isinstance(given, list):
        return given
    named = {each["name"]: each.get("template") for each in given if _is_named(each)}
    return named.get("default")


def _is_named(template: object) -> bool:
    return isinstance(template, dict) and isinstance(template.get("name"), str)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Texts of the special tokens, each of which is written as a text or as an object with it."""
    found = {name: config.get(name) for name in SPECIAL_TOKENS}
    texts = {n: t.get("content") if isinstance(t, dict) else t for n, t in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """That of transformers, whose names and settings templates are written for."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": _Namespace,
    }
    return environment


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what the model is trained on, and changes no text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's, without names that Python gives a meaning."""

    def __init__(self, /, *args: Any, **attributes: Any) -> None:
        attributes = dict(*args, **attributes)
        for name in attributes:
            _check_name(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.sandbox.SecurityError(f"a namespace may have no attribute {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own, without escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
