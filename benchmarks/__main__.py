"""Check and time the ops of fastlm against what else there is.

Rows are written after every case, and a second call with the same ``--out`` runs the cases that are
missing; one that ended the process the last time is not tried again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fastlm.benchmarks import _harness, _report
from fastlm.benchmarks._harness import REGISTRY, Benchmark, Ceilings

# op -> the module that registers its benchmark
OPS = {
    "attention": "attention",
    "attention_options": "attention",
    "attention_with_kv_cache": "attention_with_kv_cache",
    "cross_entropy": "loss",
    "linear_cross_entropy": "loss",
}
DIED = "ended the process"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 1 when a result of fastlm was wrong or a case could not run."""
    options = _parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.show:
        return _show(options.show)
    device = options.device
    dtype = DTYPES[options.dtype or ("bfloat16" if device == "cuda" else "float32")]
    ceilings = _harness.measure_ceilings(device, [dtype])
    env = _report.environment(device, ceilings)
    print(_report.heading(env), flush=True)
    folder = options.out or Path(__file__).parent / "results" / _report.slug(env["device"])
    deadline = time.monotonic() + options.seconds
    healthy = True
    for op in options.ops:
        print(f"\n{op}\n{_report.HEADER}", flush=True)
        path = folder / f"{op}{'.quick' if options.quick else ''}.json"
        healthy &= _run_op(op, path, env, ceilings, dtype, options, deadline)
    return 0 if healthy else 1


def _run_op(
    op: str, path: Path, env: dict[str, Any], ceilings: Ceilings, dtype: torch.dtype,
    options: argparse.Namespace, deadline: float,
) -> bool:  # fmt: skip
    bench = _benchmark(op)
    size = "quick" if options.quick else options.device
    rows = [] if options.fresh else _report.load(path, env)
    done = {_key(row) for row in rows}
    for row in rows:
        print(_report.line(row), flush=True)
    for problem in bench.sizes[size]:
        stubs = [
            {**problem.labels(op, mode, dtype), "provider": provider}
            for mode in problem.modes
            for provider in bench.wanted(problem, options.only)
        ]
        missing = [stub for stub in stubs if _key(stub) not in done]
        if not missing:
            continue
        if time.monotonic() > deadline:
            print(f"{problem} not run: out of time", flush=True)
            return False
        # Stays in the file when the process dies here, and then names the case that did it.
        _report.save(path, env, rows + [{**stub, "failed": DIED} for stub in missing])
        torch.manual_seed(0)
        case = bench.build(problem, dtype, options.device)
        assert {*case.providers, *case.yardsticks} == set(bench.providers), op
        new: list[dict[str, Any]] = []
        try:
            for mode in dict.fromkeys(stub["mode"] for stub in missing):
                wanted = [stub["provider"] for stub in missing if stub["mode"] == mode]
                for row in _harness.run_case(
                    bench, case, problem, mode, dtype, options.device, ceilings,
                    wanted=wanted, seconds=0.5 if options.quick else 2.0,
                ):  # fmt: skip
                    new.append(row)
                    print(_report.line(row), flush=True)
                rows += new
                new = []
        except RuntimeError:
            # the GPU answers no more: the case that did it is not tried again
            rows += new
            raise
        finally:
            # after SIGTERM without the unfinished case, which the next call runs
            _report.save(path, env, rows)
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        del case
        if options.device == "cuda":
            torch.cuda.empty_cache()
    return not any(
        "failed" in row for row in rows if row["provider"] == "fastlm" or row.get("failed") == DIED
    )


def _benchmark(op: str) -> Benchmark:
    if op not in REGISTRY:  # a benchmark that is run as a script has registered its own
        importlib.import_module(f"fastlm.benchmarks.{OPS[op]}")
    return REGISTRY[op]


def _show(folder: Path) -> int:
    shown = False
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if any(row["op"] not in OPS for row in content["rows"]):
            continue  # of train_step or time_to_loss, which print their own
        shown = True
        print(f"\n{path.stem}\n{_report.heading(content['env'])}\n{_report.HEADER}")
        print(*map(_report.line, content["rows"]), sep="\n")
    if not shown:
        print(f"no results in {folder}", file=sys.stderr)
    return 0 if shown else 1


def _key(row: dict[str, Any]) -> str:
    names = ("op", "mode", "shape", "dtype", "inputs", "provider")
    return json.dumps([row.get(name) for name in names])


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=__doc__)
    add = parser.add_argument
    add("ops", nargs="*", metavar="op", default=list(OPS), help=f"{', '.join(OPS)}; all by default")
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=tuple(DTYPES), help="bfloat16 on a GPU, float32 on a CPU by default")
    add("--quick", action="store_true", help="one small size per op, to see that all works")
    add("--only", nargs="+", default=(), metavar="provider", help="time these providers alone")
    add("--out", type=Path, metavar="DIR", help="benchmarks/results/<device> by default")
    add("--seconds", type=float, default=float("inf"), help="start no case after this many seconds")
    add("--show", type=Path, metavar="DIR", help="print the tables of a folder and time nothing")
    add("--fresh", action="store_true", help="run every case anew, whatever --out holds")
    options = parser.parse_args(argv)
    for op in options.ops:
        if op not in OPS:
            parser.error(f"there is no benchmark {op!r}: {', '.join(OPS)}")
    if options.only:
        # a dict keeps their order
        providers = {name: None for op in options.ops for name in _benchmark(op).providers}
        for name in options.only:
            if name not in providers:
                parser.error(f"there is no provider {name!r} here: {', '.join(providers)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
