"""The command ``fastlm``: one module per command, loaded only when it is called."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
from collections.abc import Sequence

import fastlm

# command -> what it does, in one line; the module of the same name holds ``run(argv) -> exit code``
COMMANDS = {
    "demo": "train a small model on real text, sample from it and plot its next token",
    "train": "train a causal language model on your text",
    "generate": "continue a prompt",
    "next": "show the distribution of the next token",
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
    except OSError as error:
        return _fail(_described(error), FAILED)
    except (ValueError, TypeError) as error:
        if not _is_ours(error):
            raise
        return _fail(str(error), USAGE)
    except (LookupError, ArithmeticError, RuntimeError, ImportError) as error:
        if not _is_ours(error):
            raise
        return _fail(str(error), FAILED)


def _is_ours(error: BaseException) -> bool:
    """Whether a line of fastlm raised it, in words meant for users."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("fastlm")


def _described(error: OSError) -> str:
    if error.filename is None or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}"


def _fail(message: str, code: int) -> int:
    print(f"fastlm: {message}", file=sys.stderr)
    return code


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        ["usage: fastlm COMMAND ...", "", *lines, "", "fastlm COMMAND --help lists the flags."]
    )
