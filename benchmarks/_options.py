"""The flags of ``fastlm bench`` and ``benchmarks/run.py``; help needs neither torch nor tyro."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fastlm._errors import ArgumentError

# op -> the module that registers its benchmark
OPS = {
    "attention": "attention",
    "attention_options": "attention",
    "attention_with_kv_cache": "attention_with_kv_cache",
    "cross_entropy": "loss",
    "linear_cross_entropy": "loss",
    "rms_norm": "pointwise",
    "apply_rotary": "pointwise",
    "glu": "pointwise",
}
# whole models, which have flags of their own: ``train_step.py`` and ``decode.py``
MODELS = ("train_step", "generate")
MODES = ("fwd", "bwd", "fwd_bwd", "step", "decode")
SUITES = ("quick", "full", "gpu")
DTYPES = ("float32", "bfloat16", "float16")

ABOUT = """Check and time the ops of fastlm against what else is installed.

quick takes small sizes and fails with fewer than four providers of others; full has the sizes of
the device, gpu those of a GPU.  Rows are written after every case.  A second call with the same
--json runs the cases that are missing; one that ended the process the last time is not tried again.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ArgumentError(f"bench: {message}")


def parse(argv: Sequence[str], prog: str = "fastlm bench") -> argparse.Namespace:
    """The flags in ``argv``.

    Raises:
        ArgumentError: A flag, an op or a size is not known, with the nearest flag.
        SystemExit: After printing help.
    """
    parser = _Parser(
        prog=prog,
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    ops = [*OPS, *MODELS]
    add("ops", nargs="*", metavar="OP", help=f"of {', '.join(ops)}; all by default")
    add("--op", nargs="+", action="extend", default=[], metavar="OP", help="the same")
    add("--mode", nargs="+", choices=MODES, default=(), help="time these alone")
    add("--only", nargs="+", default=(), metavar="PROVIDER", help="time these providers alone")
    add("--baseline", metavar="PROVIDER", help="whose time over a row's is its speedup")
    add("--suite", choices=SUITES, default="quick", help="which sizes; quick by default")
    add("--device", choices=("cuda", "cpu"), help="cuda where there is a GPU")
    add("--dtype", choices=DTYPES, help="bfloat16 on a GPU, float32 on a CPU by default")
    add("--shapes", nargs="+", default=(), metavar="N=1024,V=32000",
        help="these sizes instead; what is not named stays as the suite has it")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="results; runs/bench/<suite>.json by default")
    add("--csv", type=Path, metavar="FILE", help="results in the columns of Liger's benchmarks")
    add("--plot", type=Path, metavar="DIR", help="pictures and report.html")
    add("--show", type=Path, metavar="PATH", help="time nothing: tables of a file, or of a folder")
    add("--seconds", type=float, default=float("inf"), help="start no case after this many seconds")
    add("--fresh", action="store_true", help="run all anew; what --json has of another run is lost")
    options, unknown = parser.parse_known_args(list(argv))
    if unknown:
        near = difflib.get_close_matches(unknown[0], parser._option_string_actions, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        parser.error(f"unrecognized options: {' '.join(unknown)}{hint}")
    options.ops = list(dict.fromkeys(_words([*options.ops, *options.op])))
    options.only = _words(options.only)
    for op in options.ops:
        if op not in ops:
            parser.error(f"there is no benchmark {op!r}: {', '.join(ops)}")
    try:
        options.shapes = [_shape(word) for word in options.shapes]
    except ValueError:
        parser.error(
            f"--shapes must be like N=1024,V=32000, each 1 at least, got {' '.join(options.shapes)}"
        )
    return options


def _words(given: Sequence[str]) -> list[str]:
    """With commas or spaces between them."""
    return [word for part in given for word in part.split(",") if word]


def _shape(word: str) -> dict[str, int]:
    pairs = (part.split("=") for part in word.split(","))
    found = {name: int(value) for name, value in pairs}
    if min(found.values()) < 1:
        raise ValueError("a size is 1 at least")
    return found
