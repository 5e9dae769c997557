"""Flags from dataclasses, and configuration files below them."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

Options = TypeVar("Options")


def parse(options: type[Options], command: str, argv: Sequence[str]) -> Options:
    """Read ``argv`` into the dataclass ``options``, whose docstrings are the help.

    Raises:
        ValueError: A flag is unknown, missing or has a wrong value; one line, nearest flag named.
        SystemExit: After printing help.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(options, args=list(argv), prog=f"fastlm {command}")
    except SystemExit as stop:
        if stop.code == 0:
            raise
        raise ValueError(f"{command}: {_one_line(said.getvalue())}") from None


def _one_line(box: str) -> str:
    """What tyro says in a box over several lines, without the frame and the parting advice."""
    paragraphs = [""]
    for row in box.splitlines():
        text = row.strip("│╭╰╮╯ ")
        if not row.startswith("│"):
            continue
        if set(text) == {"─"}:
            paragraphs.append("")
        else:
            paragraphs[-1] += f" {text}" if paragraphs[-1] else text
    kept = [text for text in paragraphs if not text.startswith("For full helptext")]
    return "; ".join(kept) or box.strip()


def with_config_file(command: str, argv: Sequence[str]) -> list[str]:
    """Replace ``--config FILE`` by the flags the file stands for, placed before all others.

    The file is a YAML mapping from field to value.  Of a flag given twice the last one counts, so
    flags on the command line override the file.

    Raises:
        ValueError: The flag has no value, or the file is no YAML mapping of plain values.
        OSError: The file cannot be read.
    """
    rest: list[str] = []
    flags: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--config":
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value:
            raise ValueError(f"{command}: --config needs the name of a YAML file")
        flags += _flags_of(command, Path(value))
    return flags + rest


def _flags_of(command: str, path: Path) -> list[str]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{command}: {path} is no YAML file: {_flat(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{command}: {path} must hold a mapping of fields to values")
    return [word for key, value in content.items() for word in _flag(f"{key}", value)]


def _flag(name: str, value: Any) -> list[str]:
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{dashed}" if value else f"--no-{dashed}"]
    if isinstance(value, dict):
        return [word for key, inner in value.items() for word in _flag(f"{name}.{key}", inner)]
    if isinstance(value, list):
        return [f"--{dashed}", *map(str, value)]
    return [f"--{dashed}", str(value)]


def _flat(error: Exception) -> str:
    return " ".join(str(error).split())


def can_print(text: str) -> bool:
    """Whether the terminal's encoding has these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
