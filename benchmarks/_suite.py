"""A run of ``fastlm bench``: which cases, in which order, what is already there, and what is shown.

Rows are written after each case.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fastlm._errors import ArgumentError, UserError

from . import _harness, _liger_csv, _report, _samples
from ._console import Console
from ._harness import Benchmark, Problem, registered
from ._options import MODELS, MODES, OPS
from ._providers import OURS, kind_of
from ._timing import Ceilings, measure_ceilings

DIED = "ended the process"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Fewer of others in a quick run show nothing.
LEAST_FOREIGN = 4
# Of a case, for all its rounds.
SECONDS = {"quick": 0.4, "full": 2.0, "gpu": 2.0}
QUICK_MODES = ("fwd", "fwd_bwd")
# Flags of the whole models in a quick run.
QUICK_MODELS = {
    "train_step": ["--hidden", "128", "--batch", "2", "--rounds", "7", "--large-vocab", "0"],
    "generate": ["--size", "1M", "--rounds", "3", "--only", "transformers", "fastlm", "products"],
}

Row = dict[str, Any]


def run(options: argparse.Namespace) -> int:
    """0; or 1 when one of ours failed or was wrong, a case could not run, or too few others ran.

    Raises:
        ArgumentError: Flags that do not fit together, or this machine.
        UserError: ``--show`` finds nothing, or ``--json`` names a file of another run.
    """
    if options.show:
        return _show(options)
    device = _device(options)
    dtype = DTYPES[options.dtype or ("bfloat16" if device == "cuda" else "float32")]
    work = _work(options, device)
    path = options.json or Path("runs/bench") / f"{options.suite}.json"
    # what nobody named may be of another run, and is not gone on with
    before = _report.read(path) if options.json and path.exists() else None
    ceilings = measure_ceilings(device, [dtype])
    env = _report.environment(device, ceilings)
    heading = _report.heading(env)
    models = _models(options)
    rows: list[Row] = []
    if before:
        env, rows = _gone_on_with(before, env, options, (*work, *models))
    done = {_key(row) for row in rows}
    cases = sum(len(problems) for problems in work.values())
    with _ended_in_order(), Console(heading, cases) as console:
        running = _Run(options, device, dtype, ceilings, env, path, rows, done, console)
        finished = [running.op(op, problems) for op, problems in work.items()]
    for model in models:
        if not any(row["op"] == model for row in rows):
            rows += _model_rows(model, options, device)
            _report.save(path, env, rows)
    _write(options, {path.stem: (env, rows)})
    print(f"written  {path}")
    asked = [row for row in rows if row["op"] in (*work, *models)]
    return 0 if all(finished) and _healthy(asked) and _enough(options, asked) else 1


def _gone_on_with(
    content: tuple[Row, list[Row]], env: Row, options: argparse.Namespace, asked: Iterable[str]
) -> tuple[Row, list[Row]]:
    """``env`` and rows that this run adds to: of the file, if it has rows to keep.

    Raises:
        UserError: The file is of another machine, commit or version.
    """
    before, rows = content
    different = _report.differences(before, env) if rows else []
    if different and not options.fresh:
        raise UserError(
            f"bench: {options.json} is of another run: {'; '.join(different)}; name another "
            "file, or give --fresh to lose what it holds"
        )
    if different:
        rows = []
    if options.fresh:
        rows = [row for row in rows if row["op"] not in asked]
    return (before, rows) if rows else (env, [])


class _Run:
    """What stays the same from op to op."""

    def __init__(
        self, options: argparse.Namespace, device: str, dtype: torch.dtype, ceilings: Ceilings,
        env: Row, path: Path, rows: list[Row], done: set[str], console: Console,
    ) -> None:  # fmt: skip
        self._options, self._device, self._dtype = options, device, dtype
        self._ceilings, self._env, self._path = ceilings, env, path
        self._rows, self._done, self._console = rows, done, console
        self._deadline = time.monotonic() + options.seconds

    def op(self, op: str, problems: list[Problem]) -> bool:
        """Whether no time ran out."""
        bench = registered(op)
        self._console.begin(op)
        for row in self._rows:
            if row["op"] == op:
                self._console.row(row)
        in_time = all([self._problem(bench, problem) for problem in problems])
        self._console.end()
        return in_time

    def _problem(self, bench: Benchmark, problem: Problem) -> bool:
        options, dtype = self._options, self._dtype
        stubs = [
            {**problem.labels(bench.op, mode, dtype), "provider": provider}
            for mode in problem.modes
            for provider in bench.wanted(problem, options.only)
        ]
        missing = [stub for stub in stubs if _key(stub) not in self._done]
        if missing and time.monotonic() > self._deadline:
            self._console.say(f"{problem} not run: out of time")
            return False
        if missing:
            # Stays in the file when the process dies here, and names the case that did it.
            died = [{**stub, "failed": DIED} for stub in missing]
            _report.save(self._path, self._env, self._rows + died)
            self._case(bench, problem, missing, died)
        self._console.step()
        return True

    def _case(
        self, bench: Benchmark, problem: Problem, missing: list[Row], died: list[Row]
    ) -> None:
        options, device = self._options, self._device
        torch.manual_seed(0)
        try:
            case = bench.build(problem, self._dtype, device)
        except _harness.failures() as error:
            failed = [{**stub, **_harness.reason(error)} for stub in missing]
            for row in failed:
                self._console.row(row)
            self._rows += failed
            _report.save(self._path, self._env, self._rows)
            return
        assert {*case.providers, *case.yardsticks} == set(bench.providers), bench.op
        new: list[Row] = []
        samples: dict[str, list[float]] = {}
        try:
            for mode in dict.fromkeys(stub["mode"] for stub in missing):
                wanted = [stub["provider"] for stub in missing if stub["mode"] == mode]
                for row in _harness.run_case(
                    bench, case, problem, mode, self._dtype, device, self._ceilings, wanted=wanted,
                    seconds=SECONDS[options.suite], baseline=options.baseline,
                ):  # fmt: skip
                    if "ms_p50" in row and self._env["ceilings"] != asdict(self._ceilings):
                        row["ceilings"] = asdict(self._ceilings)
                    if "samples" in row:
                        samples[_key(row)] = row.pop("samples")
                    new.append(row)
                    self._console.row(row)
                self._rows += new
                new = []
        except RuntimeError:
            # the GPU answers no more: the case that did it is not tried again
            there = {_key(row) for row in (*self._rows, *new)}
            self._rows += [*new, *(row for row in died if _key(row) not in there)]
            raise
        finally:
            # after SIGTERM without the unfinished case, which the next call runs
            _report.save(self._path, self._env, self._rows)
            _samples.add(self._path, samples, {_key(row) for row in self._rows})
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        del case
        if device == "cuda":
            torch.cuda.empty_cache()


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM unwinds the stack, so that what was measured is written."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _device(options: argparse.Namespace) -> str:
    found = torch.cuda.is_available()
    if options.suite == "gpu" and (not found or options.device == "cpu"):
        raise ArgumentError("bench: --suite gpu needs a GPU that torch sees, which is not here")
    if options.device == "cuda" and not found:
        raise ArgumentError("bench: --device cuda needs a GPU that torch sees, which is not here")
    return options.device or ("cuda" if found else "cpu")


def _work(options: argparse.Namespace, device: str) -> dict[str, list[Problem]]:
    """The problems of each op that is asked for."""
    size = "quick" if options.suite == "quick" else device
    asked = [op for op in options.ops or OPS if op in OPS]
    found: dict[str, list[Problem]] = {}
    for op in asked:
        bench = registered(op)
        problems = _reshaped(op, bench.sizes[size], options.shapes)
        if modes := options.mode or (QUICK_MODES if size == "quick" else None):
            problems = [replace(x, modes=tuple(m for m in x.modes if m in modes)) for x in problems]
        problems = [x for x in problems if x.modes and bench.wanted(x, options.only)]
        if problems:
            found[op] = problems
    known = {name: None for op in asked for name in registered(op).providers}
    if options.only and options.baseline and options.baseline not in options.only:
        raise ArgumentError(
            f"bench: --baseline {options.baseline} must be one of --only: {', '.join(options.only)}"
        )
    for name in (*options.only, *([options.baseline] if options.baseline else [])):
        if asked and name not in known:
            raise ArgumentError(f"bench: there is no provider {name!r} here: {', '.join(known)}")
    if not found and not _models(options):
        raise ArgumentError("bench: nothing is left to time; no op has all that is asked for")
    return found


def _reshaped(op: str, problems: list[Problem], shapes: list[dict[str, int]]) -> list[Problem]:
    """The first problem of each kind of inputs, in ``shapes``; and whoever can may run there."""
    if not shapes:
        return problems
    kinds: dict[str, Problem] = {}
    for x in problems:
        first = kinds.setdefault(x.inputs, x)
        every = {*first.modes, *x.modes}
        kinds[x.inputs] = replace(first, modes=tuple(mode for mode in MODES if mode in every))
    for shape in shapes:
        for name in shape:
            if not any(name in x.shape for x in kinds.values()):
                raise ArgumentError(
                    f"bench: {op} has the sizes {', '.join(problems[0].shape)}, not {name}"
                )
    return [
        replace(x, shape={**x.shape, **shape}, only=())
        for x in kinds.values()
        for shape in shapes
        if shape.keys() <= x.shape.keys()
    ]


def _models(options: argparse.Namespace) -> list[str]:
    """Whole models that are asked for: by name, by mode, or as a part of everything."""
    if options.ops:
        return [model for model in MODELS if model in options.ops]
    modes = {"train_step": "step", "generate": "decode"}
    if options.mode:
        return [model for model in MODELS if modes[model] in options.mode]
    return [] if options.only or options.shapes else list(MODELS)


def _model_rows(model: str, options: argparse.Namespace, device: str) -> list[Row]:
    """Of what has a program of its own, which prints them too."""
    print(f"\n{model}", flush=True)
    flags = QUICK_MODELS[model] if options.suite == "quick" else []
    if model == "train_step":
        if device != "cpu":
            return [_absent(model, "step", "fastlm", "this benchmark measures on a CPU")]
        if importlib.util.find_spec("transformers") is None:
            return [_absent(model, "step", "transformers", "transformers is not installed")]
        from . import train_step

        return train_step.main(flags)
    from . import decode

    flags = ["--device", device, *flags]
    if importlib.util.find_spec("transformers"):
        return decode.main(flags)
    reason = _absent(model, "decode", "transformers", "transformers is not installed")
    return [*decode.main([*flags, "--only", "fastlm", "products"]), reason]


def _absent(model: str, mode: str, provider: str, why: str) -> Row:
    return {
        "op": model, "mode": mode, "shape": {}, "dtype": "", "provider": provider, "absent": why
    }  # fmt: skip


def _healthy(rows: list[Row]) -> bool:
    """Whether nothing of ours failed or was wrong, and nobody ended the process."""
    return not any(
        row.get("failed") == DIED or (row["provider"] in OURS and row.keys() & {"failed", "wrong"})
        for row in rows
    )


def _enough(options: argparse.Namespace, rows: list[Row]) -> bool:
    if options.suite != "quick" or options.ops or options.only or options.mode:
        return True
    ran = dict.fromkeys(
        row["provider"] for row in rows if "ms_p50" in row and kind_of(row["provider"]) == "foreign"
    )
    if len(ran) >= LEAST_FOREIGN:
        return True
    print(f"only {len(ran)} providers of others ran, of {LEAST_FOREIGN}: {', '.join(ran)}")
    return False


def _show(options: argparse.Namespace) -> int:
    """Files of ops as tables; of whole models only in pictures."""
    folder = options.show
    read: list[tuple[Path, Row, list[Row]]] = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else [folder]:
        # beside results a folder may hold other things
        with contextlib.suppress(UserError) if folder.is_dir() else contextlib.nullcontext():
            read.append((path, *_report.read(path)))
    found = [(path, env, rows) for path, env, rows in read if rows]
    if not found:
        raise UserError(f"bench: no results in {folder}")
    for path, env, everything in found:
        rows = [row for row in everything if row["op"] in OPS]
        if rows:
            print(f"\n{path.stem}")
            with Console(_report.heading(env), 0) as console:
                for op in dict.fromkeys(row["op"] for row in rows):
                    console.begin(op)
                    for row in rows:
                        if row["op"] == op:
                            console.row(row)
                    console.end()
    _write(options, {path.stem: (env, rows) for path, env, rows in found})
    return 0


def _write(options: argparse.Namespace, files: dict[str, tuple[Row, list[Row]]]) -> None:
    """What else than the results themselves is asked for."""
    if options.csv:
        _liger_csv.write(options.csv, files.values())
        print(f"written  {options.csv}")
    if options.plot:
        try:
            from . import _html
        except ModuleNotFoundError as error:
            raise UserError(f"bench: --plot needs matplotlib: {error}") from None
        print(f"written  {_html.write(options.plot, files)}")


def _key(row: Row) -> str:
    names = ("op", "mode", "shape", "dtype", "inputs", "provider")
    return json.dumps([row.get(name) for name in names])
