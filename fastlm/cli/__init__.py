"""The command ``fastlm``: one module per command, loaded only when it is called."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import os
import sys
from collections.abc import Sequence

import fastlm
from fastlm._errors import ArgumentError, UserError

# command -> what it does, in one line; the module of the same name holds ``run(argv) -> exit code``
COMMANDS = {
    "demo": "train a small model on real text, sample from it and plot its next token",
    "train": "train a causal language model on your text",
    "finetune": "train a Hugging Face model further, on examples",
    "generate": "continue a prompt",
    "chat": "talk with a model",
    "next": "show the distribution of the next token",
    "eval": "measure how well a model predicts a text, or finds labels",
    "export": "write a run as others take it, an adapter merged into its model",
    "bench": "time the ops beside what else is installed",
    "doctor": "show versions, devices and backends, and test every kernel",
}

# Exit codes.  The last two are those a shell gives to a command that a signal ended.
FAILED, USAGE, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: Arguments after the program's name; those of the process by default.

    Returns:
        0 when all went well, 1 when something failed, 2 when the command line or a value in it is
        wrong, 130 after Ctrl-C, 141 when whoever read our output stopped reading.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a terminal without our bars or a model's characters shows ? for them
        sys.stdout.reconfigure(errors="replace")
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if argv else USAGE
    if argv[0] in ("-V", "--version", "version"):
        print(f"fastlm {fastlm.__version__}")
        return 0
    command, *rest = argv
    if command not in COMMANDS:
        nearest = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f", did you mean {nearest[0]!r}?" if nearest else f": {', '.join(COMMANDS)}"
        return _fail(f"there is no command {command!r}{hint}", USAGE)
    return _guarded(command, rest)


def _guarded(command: str, argv: list[str]) -> int:
    """What a user can cause becomes one line; what only we can keeps its traceback."""
    try:
        code: int = importlib.import_module(f"fastlm.cli.{command}").run(argv)
        # now, and not when the interpreter shuts down, where it would print a traceback
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except ArgumentError as error:
        return _fail(str(error), USAGE)
    except (UserError, FloatingPointError) as error:
        return _fail(str(error), FAILED)
    except OSError as error:
        return _fail(_described(error), FAILED)
    except ModuleNotFoundError as error:
        if (error.name or "fastlm").partition(".")[0] == "fastlm":
            raise
        return _fail(f"{error}; fastlm doctor says what is missing", FAILED)


def _described(error: OSError) -> str:
    if error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def _fail(message: str, code: int) -> int:
    # where standard error is closed too, the exit code is all there is to say
    with contextlib.suppress(BrokenPipeError):
        print(f"fastlm: {message}", file=sys.stderr)
    return code


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        ["usage: fastlm COMMAND ...", "", *lines, "", "fastlm COMMAND --help lists the flags."]
    )
