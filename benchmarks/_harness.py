"""Check, then time: the providers of a case in turn, on the same inputs, against measured ceilings.

A benchmark registers a builder of cases.  The first provider of a case is the yardstick: what a
user has without fastlm.  Who is wrong (``_judge.py``) has no speed.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import _judge
from ._judge import Outputs
from ._memory import extra_peak_mib
from ._options import OPS
from ._providers import OURS, PROVIDERS, Make, Provider
from ._timing import (
    LONG,
    Ceilings,
    Prepare,
    interleaved,
    name_of,
    percentiles,
    require_answer,
    speedups,
    timed,
)

MODES = ("fwd", "fwd_bwd")


@dataclass(frozen=True)
class Problem:
    """One size of one op.

    Attributes:
        shape: Name of each size to its value, as in the result rows.
        only: Providers worth running here; empty for all.
        inputs: What kind they are, where a benchmark has several; then it is in the rows.
        modes: Those worth running here: ``"fwd"``, ``"bwd"``, ``"fwd_bwd"``.
    """

    shape: dict[str, int]
    only: tuple[str, ...] = ()
    inputs: str = ""
    modes: tuple[str, ...] = MODES

    def __str__(self) -> str:
        return " ".join([f"{key}{value}" for key, value in self.shape.items()] + [self.inputs])

    def labels(self, op: str, mode: str, dtype: torch.dtype) -> dict[str, Any]:
        """What tells the rows of this problem from others."""
        labels = {"op": op, "mode": mode, "shape": self.shape, "dtype": name_of(dtype)}
        return {**labels, "inputs": self.inputs} if self.inputs else labels


@dataclass(frozen=True)
class Case:
    """What the providers compute, and the least it can cost.

    Attributes:
        inputs: Arguments of every provider; gradients are taken of those that require one.
        providers: Name to what makes a function of the inputs, which returns a tensor or several;
            the yardstick first.
        truth: Mode to outputs and gradients in float64.
        bytes_moved: Mode to bytes, each input read once and each output written once.
        flops: Mode to floating-point operations.
        overwriting: Providers that write into their inputs; they get their own.
        yardsticks: Name to a function of the mode that computes no result to judge.
        gradient_multiple: m of the tolerance rule for gradients; of outputs it is 2.
    """

    inputs: tuple[Tensor, ...]
    providers: dict[str, Make]
    truth: Callable[[str], Outputs]
    bytes_moved: dict[str, float]
    flops: dict[str, float]
    overwriting: tuple[str, ...] = ()
    yardsticks: dict[str, Callable[[str], object]] = field(default_factory=dict)
    gradient_multiple: float = 2.0
    _made: dict[str, Provider] = field(default_factory=dict)

    def provider(self, name: str) -> Provider:
        """Made once, for all modes."""
        if name not in self._made:
            self._made[name] = self.providers[name]()
        return self._made[name]

    def inputs_of(self, provider: str) -> tuple[Tensor, ...]:
        if provider not in self.overwriting:
            return self.inputs
        return tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in self.inputs)


Build = Callable[[Problem, torch.dtype, str], Case]


@dataclass(frozen=True)
class Benchmark:
    """Sizes per kind of device, how to build a case of one, and who and what is timed in it."""

    op: str
    build: Build
    providers: tuple[str, ...]
    sizes: dict[str, list[Problem]]

    def wanted(self, problem: Problem, only: Iterable[str] = ()) -> list[str]:
        """Those of ``only``, or of all, that are worth running on ``problem``."""
        names = [name for name in self.providers if not problem.only or name in problem.only]
        return [name for name in names if not only or name in only]


REGISTRY: dict[str, Benchmark] = {}
# What an op says whose backends do not take a call.
_REFUSED = "no backend takes this call"


def quick(problems: Sequence[Problem], fast: tuple[str, ...]) -> list[Problem]:
    """All providers run on the first, forward and backward; elsewhere those of ``fast``, for which
    nothing has to be compiled."""
    first, *others = problems
    rest = [replace(x, only=fast) for x in others]
    if "fwd_bwd" not in first.modes:
        return [first, *rest]
    alone = tuple(mode for mode in first.modes if mode != "fwd_bwd")
    return [replace(first, modes=("fwd_bwd",)), replace(first, only=fast, modes=alone), *rest]


def benchmark(
    op: str, providers: Iterable[str], **sizes: list[Problem]
) -> Callable[[Build], Build]:
    """Register ``build(problem, dtype, device)``.

    ``providers`` names those of its cases and their yardsticks; ``sizes`` has the keys cuda, cpu
    and quick.
    """

    def register(build: Build) -> Build:
        if op in REGISTRY:
            raise ValueError(f"benchmark {op!r} is registered twice")
        if strangers := {*providers} - {*PROVIDERS}:
            raise ValueError(f"benchmark {op!r}: no such providers: {strangers}")
        REGISTRY[op] = Benchmark(op, build, tuple(providers), sizes)
        return build

    return register


def registered(op: str) -> Benchmark:
    """The benchmark of an op; its module is imported when it is asked for."""
    importlib.import_module(f"fastlm.benchmarks.{OPS[op]}")
    return REGISTRY[op]


def run_case(
    bench: Benchmark, case: Case, problem: Problem, mode: str, dtype: torch.dtype, device: str,
    ceilings: Ceilings, *, wanted: Iterable[str], seconds: float = 2.0, baseline: str | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row for each of ``wanted``.

    One that is absent, fails or is wrong has ``absent``, ``failed`` or ``wrong`` instead of
    numbers, and a yardstick has no error.  ``speedup`` is over ``baseline``, by default the first
    provider.  ``samples`` has the milliseconds of every call.
    """
    common = problem.labels(bench.op, mode, dtype)
    try:
        truth = case.truth(mode)
    except failures() as error:
        yield from ({**common, "provider": name, **reason(error)} for name in wanted)
        require_answer(device)
        return
    plain: Outputs | None = None
    calls: dict[str, Prepare] = {}
    errors: dict[str, float] = {}
    kernels: dict[str, str] = {}
    others: dict[str, Callable[[], Outputs]] = {}
    fingerprints: dict[str, list[Tensor]] = {}
    for name in case.providers:
        if name not in wanted:
            continue
        provider = case.provider(name)
        if isinstance(provider, str):
            yield {**common, "provider": name, "absent": provider}
            continue
        others[name] = functools.partial(_on_other_numbers, case, name, provider, mode)
        try:
            fingerprints[name] = _judge.fingerprint(others[name]())
            prepare = functools.partial(prepared, provider, case.inputs_of(name), mode)
            outputs = prepare()()
            if name in OURS:
                rounded = plain or call_plain(case, mode)
                multiples = _multiples(case, mode, len(truth))
                _judge.judge_ours(f"{name} {mode}", outputs, rounded, truth, multiples)
            else:
                _judge.judge_other(f"{name} {mode}", outputs, truth)
            _judge.judge_changes(f"{name} {mode}", outputs, fingerprints[name])
        except failures() as error:
            found = {"absent": refused} if (refused := _refusal(name, error)) else reason(error)
            yield {**common, "provider": name, **found}
            require_answer(device)
            continue
        if name == next(iter(case.providers)):
            plain = outputs
        calls[name], errors[name] = prepare, _judge.relative_error(outputs, truth)
        if device == "cuda":
            kernels[name] = slowest_kernel(prepare())
        del outputs
    del plain
    for name, yardstick in case.yardsticks.items():
        if name in wanted:
            call = functools.partial(yardstick, mode)
            call()
            calls[name] = functools.partial(_itself, call)
    start, peaks = time.perf_counter(), {}
    failed: dict[str, BaseException] = {}
    for name, to_call in calls.items():
        try:
            peaks[name] = extra_peak_mib(to_call(), device)
        except failures() as error:
            failed[name] = error
            require_answer(device)
    is_long = time.perf_counter() - start > LONG * len(calls)
    left = {name: calls[name] for name in peaks}
    times, fallen = interleaved(left, device, seconds, is_long=is_long, failures=failures())
    for name, why in {**failed, **fallen}.items():
        yield {**common, "provider": name, **reason(why)}
    baseline = baseline or next(iter(case.providers))
    gains = speedups(times, baseline) if baseline in times else {}
    shares = _judge.fresh_shares()
    usual = _yardstick_on_fresh_numbers(case, mode, shares[0]) if errors else None
    moved, flops = case.bytes_moved[mode], case.flops[mode]
    for name, samples in times.items():
        p20, p50, p80 = percentiles(samples)
        what = f"{name} {mode}"
        try:
            if name in others:
                _judge.judge_again(what, others[name](), fingerprints[name])
                _judge_on_fresh_numbers(what, case, name, mode, device, p50, shares, usual)
            beaten = ceilings.times_beaten(p50, moved, flops, common["dtype"])
            _judge.judge_rate(what, beaten)
        except failures() as error:
            yield {**common, "provider": name, **reason(error)}
            require_answer(device)
            continue
        yield {
            **common,
            "provider": name,
            "ms_p50": p50,
            "ms_p20": p20,
            "ms_p80": p80,
            "tflops": flops / p50 / 1e9,
            "gbps": moved / p50 / 1e6,
            "fraction_of_peak": ceilings.floor_ms(moved, flops, common["dtype"]) / p50,
            "peak_mib": peaks[name],
            "max_rel_err": errors.get(name),
            "baseline": baseline,
            "speedup": gains.get(name),
            "samples": samples,
            **({"kernel": kernels[name]} if name in kernels else {}),
        }


def call_plain(case: Case, mode: str) -> Outputs:
    """The yardstick's result, where it is not timed itself."""
    provider = case.provider(next(iter(case.providers)))
    assert not isinstance(provider, str), "the yardstick is what every user has"
    return prepared(provider, case.inputs, mode)()


def _on_other_numbers(case: Case, name: str, provider: Callable[..., Any], mode: str) -> Outputs:
    with _judge.other_numbers(case.inputs):
        return prepared(provider, case.inputs_of(name), mode, upstream=-2.0)()


def _yardstick_on_fresh_numbers(case: Case, mode: str, share: float) -> list[Tensor] | None:
    """None where it cannot run, as without the memory."""
    try:
        with _judge.fresh_numbers(case.inputs, share):
            return _judge.fingerprint(call_plain(case, mode))
    except failures():
        return None


def _judge_on_fresh_numbers(
    what: str, case: Case, name: str, mode: str, device: str, usual_ms: float,
    shares: list[float], yardstick: list[Tensor] | None,
) -> None:  # fmt: skip
    """By the result of a first call, and by the time of the first that is not slower than it may.

    Raises:
        Wrong: It is another result than ``yardstick``, or all calls are slower than ``usual_ms``.
    """
    provider = case.provider(name)
    assert not isinstance(provider, str), "it was timed"
    least = float("inf")
    for share in shares:
        with _judge.fresh_numbers(case.inputs, share):
            call = prepared(provider, case.inputs_of(name), mode)
            outputs, ms = _outputs_and_ms(call, device)
        if share == shares[0] and yardstick is not None:
            _judge.judge_fresh(what, outputs, yardstick)
        least = min(least, ms)
        if not _judge.is_slower(least, usual_ms):
            return
    _judge.judge_fresh_time(what, least, usual_ms)


def _outputs_and_ms(call: Callable[[], Outputs], device: str) -> tuple[Outputs, float]:
    results: list[Outputs] = []
    seconds = timed(lambda: results.append(call()), device)
    return results[0], 1e3 * seconds


def prepared(
    provider: Callable[..., Any], inputs: tuple[Tensor, ...], mode: str, *, upstream: float = 1.0
) -> Callable[[], Outputs]:
    """The call to be timed: for ``bwd`` once, after its forward, since it frees what it used.

    ``upstream`` is a factor of the gradient that comes in.
    """
    _judge.touch(inputs)
    if mode != "bwd":
        return functools.partial(_outputs, provider, inputs, mode, upstream)
    outs = _several(provider(*inputs))
    needing = [x for x in inputs if x.requires_grad]
    return functools.partial(torch.autograd.grad, outs, needing, _cotangents(outs, upstream))


def _itself(call: Callable[[], object]) -> Callable[[], object]:
    return call


def _outputs(
    provider: Callable[..., Any], inputs: tuple[Tensor, ...], mode: str, upstream: float
) -> Outputs:
    if mode == "fwd":
        # detached: some compute gradients for whatever asks for them, even under no_grad
        with torch.no_grad():
            return _several(provider(*(x.detach() for x in inputs)))
    outs = _several(provider(*inputs))
    needing = [x for x in inputs if x.requires_grad]
    grads = torch.autograd.grad(outs, needing, _cotangents(outs, upstream))
    return (*(out.detach() for out in outs), *grads)


def _several(result: Tensor | Outputs) -> Outputs:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _multiples(case: Case, mode: str, count: int) -> list[float]:
    """m of the tolerance rule for each of ``count`` tensors, the gradients last."""
    gradients = 0 if mode == "fwd" else sum(x.requires_grad for x in case.inputs)
    return [2.0] * (count - gradients) + [case.gradient_multiple] * gradients


def _cotangents(outs: Outputs, factor: float) -> Outputs:
    found = (
        torch.ones_like(out)
        if out.dim() == 0
        else cotangent(tuple(out.shape), out.dtype, str(out.device))
        for out in outs
    )
    return tuple(x if factor == 1 else x * factor for x in found)


@functools.lru_cache(maxsize=2)
def cotangent(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """The gradient that comes in; the same for every provider."""
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def slowest_kernel(call: Callable[[], Outputs]) -> str:
    """Name of the GPU kernel that took the longest."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    events = profile.key_averages()
    return max(events, key=lambda event: event.self_device_time_total).key if events else "unknown"


@functools.cache
def failures() -> tuple[type[BaseException], ...]:
    """What a provider may raise without ending the run: refusals, wrong results, no memory, and
    what other people's code raises where it was not made for these inputs or this torch."""
    kinds: tuple[type[BaseException], ...] = (
        ArithmeticError, AssertionError, AttributeError, ImportError, LookupError,
        MemoryError, OSError, RuntimeError, TypeError, ValueError,
    )  # fmt: skip
    try:
        from triton.errors import TritonError
    except ModuleNotFoundError:
        return kinds
    return (*kinds, TritonError)


def _refusal(name: str, error: BaseException) -> str:
    """Why kernels of ours do not take a call; empty for others, and where it is no refusal.

    ``fastlm`` chooses among all of them, so that nothing is left where it refuses.
    """
    if name not in OURS or name == "fastlm" or not isinstance(error, NotImplementedError):
        return ""
    return " ".join(str(error).split())[:300] if _REFUSED in str(error) else ""


def reason(error: BaseException) -> dict[str, str]:
    """``wrong`` where it was judged, ``failed`` with the first line where it did not get there."""
    if isinstance(error, _judge.Wrong):
        return {"wrong": str(error).splitlines()[0][:300]}
    return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
