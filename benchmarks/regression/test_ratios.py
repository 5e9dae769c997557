"""Whether an op has become slower beside torch: their ratio in one run against the stored one.

Before each timed call of ours the same is computed by torch's operators and timed too, so that
whatever else slows the machine slows both; the ratio is the median over rounds.  An op fails whose
ratio is more than 20 % above the stored one of this kind of machine in each third of the rounds.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlm.benchmarks import _report
from fastlm.benchmarks._harness import Case, prepared, registered
from fastlm.benchmarks._options import OPS

ALLOWED = 1.2
# Of an op, all rounds of both.
SECONDS, FEWEST, MOST = 2.0, 30, 600


@pytest.mark.parametrize("op", OPS)
def test_is_no_slower_beside_torch(op: str, benchmark: Any, request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    bench = registered(op)
    problem = bench.sizes["quick"][0]
    case = bench.build(problem, torch.float32, "cpu")
    mode = "fwd_bwd" if "fwd_bwd" in problem.modes else "fwd"
    yardstick = next(iter(case.providers))
    ours, theirs = (_calls(case, name, mode) for name in ("fastlm", yardstick))
    for _ in range(3):
        seconds = _seconds(ours()) + _seconds(theirs())
    rounds = min(max(int(SECONDS / seconds), FEWEST), MOST) // 3 * 3
    beside: list[float] = []

    def first() -> tuple[tuple[Callable[[], object]], dict[str, object]]:
        beside.append(_seconds(theirs()))
        return (ours(),), {}

    benchmark.pedantic(lambda call: call(), setup=first, rounds=rounds)
    pairs = zip(benchmark.stats.stats.data, beside, strict=True)
    ratios = [own / other for own, other in pairs]
    ratio = statistics.median(ratios)
    benchmark.extra_info.update(ratio=ratio, beside=yardstick, mode=mode, shape=problem.shape)
    if request.config.getoption("--store"):
        _store(op, ratio, request.config)
    else:
        third = rounds // 3
        _compare(op, [ratios[at : at + third] for at in range(0, rounds, third)], request.config)


def _calls(case: Case, provider: str, mode: str) -> Callable[[], Callable[[], object]]:
    function = case.provider(provider)
    assert not isinstance(function, str), function
    return functools.partial(prepared, function, case.inputs, mode)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _stored(config: pytest.Config) -> tuple[Path, dict[str, dict[str, float]], str]:
    """The file, what it holds for each kind of machine, and this kind."""
    path: Path = config.getoption("--ratios")
    machine = f"{_report.device_name('cpu')}, torch {torch.__version__}"
    return path, json.loads(path.read_text()) if path.exists() else {}, machine


def _store(op: str, ratio: float, config: pytest.Config) -> None:
    path, stored, machine = _stored(config)
    stored.setdefault(machine, {})[op] = round(ratio, 3)
    path.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")


def _compare(op: str, parts: list[list[float]], config: pytest.Config) -> None:
    """The best part counts: another may be of a moment that was busy with something else."""
    _, stored, machine = _stored(config)
    before = stored.get(machine, {}).get(op)
    assert before, f"no ratio of {op} is stored for {machine}: make bench-store writes them"
    ratio = min(map(statistics.median, parts))
    assert ratio <= ALLOWED * before, (
        f"{op} takes {ratio:.3f} of torch's time, {before:.3f} when it was stored"
    )
