"""Errors that a user can put right.  The command line shows them in one line, all others whole."""

from __future__ import annotations


class UserError(Exception):
    """Something outside fastlm is not as it must be; the message is one line and says what."""


class ArgumentError(UserError, ValueError):
    """A value that the caller chose is wrong; the message names it, what it must be and is."""


def check_text(name: str, text: str) -> None:
    """Refuse text that no UTF-8 stands for: bytes of a command line that were none.

    Raises:
        ArgumentError: There is such a character; the message begins with ``name``.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = f"{text[error.start]!r} at character {error.start}"
        raise ArgumentError(f"{name} must be text that UTF-8 can hold, got {place}") from None


class MissingPackageError(UserError, ModuleNotFoundError):
    """Something asked for needs a package that is not installed; the message says which."""
