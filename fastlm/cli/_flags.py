"""Flags from dataclasses."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
from collections.abc import Sequence
from typing import TypeVar

import tyro

from fastlm._errors import ArgumentError

Options = TypeVar("Options")


def parse(
    options: type[Options],
    command: str,
    argv: Sequence[str],
    default: Options | None = None,
    *,
    more_help: str = "",
) -> Options:
    """Read ``argv`` over ``default`` into the dataclass ``options``, whose docstrings are the help.

    Raises:
        ArgumentError: A flag is unknown, missing or has a wrong value; one line, with the nearest
            flag.
        SystemExit: After printing help.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            name = f"fastlm {command}"
            promise = (inspect.getdoc(options) or "").partition("\n\nRaises:")[0]
            about = f"{promise}\n\n{more_help}".rstrip()
            if default is None:
                return tyro.cli(options, args=list(argv), prog=name, description=about)
            return tyro.cli(options, args=list(argv), prog=name, description=about, default=default)
    except SystemExit as stop:
        if stop.code == 0:
            raise
        line = _one_line(said.getvalue())
        # what the dataclass itself raises names the command already
        line = line.removeprefix(f"Error parsing {options.__name__}: ").removeprefix(f"{command}: ")
        raise ArgumentError(f"{command}: {line}") from None


def _one_line(box: str) -> str:
    """What tyro says in a box over several lines, without the frame and the parting advice.

    The title stands in the frame, or in a paragraph of its own where the terminal has no lines.
    """
    paragraphs = [""]
    for row in box.splitlines():
        text = row.strip("│ ")
        if row.startswith(("╭", "╰")):
            continue
        if text and set(text) <= {"─", "-"}:
            paragraphs.append("")
        else:
            paragraphs[-1] = f"{paragraphs[-1]} {text}".strip()
    statement, *advice = paragraphs if "│" in box else paragraphs[1:] or [""]
    for text in advice:
        if text.startswith("Perhaps you meant") and (flags := re.findall(r"--[\w.-]+", text)):
            statement += f", did you mean {flags[0]}?"
    return statement or " ".join(box.split())


def take(argv: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of ``--flag VALUE`` or ``--flag=VALUE``, and the arguments without it.

    Raises:
        ArgumentError: The flag has no value.
    """
    rest: list[str] = []
    found: str | None = None
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name != flag:
            rest.append(word)
            continue
        found = value if equals else next(words, "")
        if not found:
            raise ArgumentError(f"{flag} needs a value")
    return found, rest
