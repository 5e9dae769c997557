"""Check, then time: the providers of a case in turn, on the same inputs, against measured ceilings.

A benchmark registers a builder of cases.  The first provider of a case is the yardstick: what a
user has without fastlm.  fastlm's own results must hold the tolerance rule against float64 truth
before they are timed; of the others only the error is reported.
"""

from __future__ import annotations

import ctypes
import functools
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm.ops.cuda._extension import refuses_device
from fastlm.testing import assert_as_accurate

Outputs = tuple[Tensor, ...]

# A function of a case's inputs, or the reason why it is absent here.
Provider = Callable[..., Tensor] | str

# fastlm as it chooses, and its kernels in CUDA C++.
OURS = ("fastlm", "cuda")

# What has to be done before a call is timed; returns the call.
Prepare = Callable[[], Callable[[], object]]

MODES = ("fwd", "fwd_bwd")

# Elements compared at once, 1 GB in float64: results may be as large as the memory is.
_COMPARED_AT_ONCE = 1 << 27

# Calls that take this many seconds on average need no more warming, and few rounds.
_LONG = 2.0


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
        providers: Name to a function of the inputs; the yardstick first.
        truth: Mode to output and gradients in float64.
        bytes_moved: Mode to bytes, each input read once and each output written once.
        flops: Mode to floating-point operations.
        overwriting: Providers that write into their inputs; they get their own.
        yardsticks: Name to a function of the mode that computes no result to judge.
        gradient_multiple: m of the tolerance rule for gradients; of outputs it is 2.
    """

    inputs: tuple[Tensor, ...]
    providers: dict[str, Provider]
    truth: Callable[[str], Outputs]
    bytes_moved: dict[str, float]
    flops: dict[str, float]
    overwriting: tuple[str, ...] = ()
    yardsticks: dict[str, Callable[[str], object]] = field(default_factory=dict)
    gradient_multiple: float = 2.0

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
        REGISTRY[op] = Benchmark(op, build, tuple(providers), sizes)
        return build

    return register


@dataclass
class Ceilings:
    """What this device does at best, measured in this run on random data."""

    gbps: float
    tflops: dict[str, float] = field(default_factory=dict)

    def floor_ms(self, bytes_moved: float, flops: float, dtype: str) -> float:
        """Neither the bytes nor the arithmetic can take less."""
        return max(bytes_moved / self.gbps / 1e6, flops / self.tflops[dtype] / 1e9)


def measure_ceilings(device: str, dtypes: Iterable[torch.dtype]) -> Ceilings:
    """A copy counts the bytes read and written; a square matrix product 2 n^3 operations."""
    cuda = device == "cuda"
    numel = 1 << (29 if cuda else 25)
    source = torch.randn(numel, device=device)
    target = torch.empty_like(source)
    seconds = min(timed(lambda: target.copy_(source), device) for _ in range(10))
    ceilings = Ceilings(gbps=2 * source.numel() * source.element_size() / seconds / 1e9)
    for dtype in dtypes:
        n = 8192 if cuda else 1024
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        product = functools.partial(torch.matmul, a, b)
        timed(product, device)
        rate = 2 * n**3 / statistics.median(timed(product, device) for _ in range(10)) / 1e12
        ceilings.tflops[name_of(dtype)] = rate
    return ceilings


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds of one call, by events on a GPU."""
    if device != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Evicts the inputs from L2, and keeps the GPU busy until the call is queued behind it.
    _flush_buffer().zero_()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@functools.cache
def _flush_buffer() -> Tensor:
    return torch.empty(1 << 28, dtype=torch.int8, device="cuda")


def run_case(
    bench: Benchmark, case: Case, problem: Problem, mode: str, dtype: torch.dtype, device: str,
    ceilings: Ceilings, *, wanted: Iterable[str], seconds: float = 2.0,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row for each of ``wanted``; one that is absent or fails has ``absent`` or ``failed``
    instead of numbers, and a yardstick has no error."""
    common = problem.labels(bench.op, mode, dtype)
    truth = case.truth(mode)
    plain: Outputs | None = None
    calls: dict[str, Prepare] = {}
    errors: dict[str, float] = {}
    kernels: dict[str, str] = {}
    for name, provider in case.providers.items():
        if name not in wanted:
            continue
        if isinstance(provider, str):
            yield {**common, "provider": name, "absent": provider}
            continue
        prepare = functools.partial(_prepared, provider, case.inputs_of(name), mode)
        try:
            outputs = prepare()()
            if name in OURS:
                _judge(name, case, mode, outputs, plain or call_plain(case, mode), truth)
        except _failures() as error:
            yield {**common, "provider": name, "failed": _first_line(error)}
            if device == "cuda":
                # raises where the failure has left the GPU unusable, and all after it would fail
                torch.cuda.synchronize()
            continue
        plain = plain or outputs
        calls[name], errors[name] = prepare, _relative_error(outputs, truth)
        if device == "cuda":
            kernels[name] = slowest_kernel(prepare())
        del outputs
    del plain
    for name, yardstick in case.yardsticks.items():
        if name in wanted:
            call = functools.partial(yardstick, mode)
            call()
            calls[name] = functools.partial(_itself, call)
    start = time.perf_counter()
    peaks = {name: extra_peak_mib(prepare(), device) for name, prepare in calls.items()}
    is_long = time.perf_counter() - start > _LONG * len(calls)
    times = _interleaved(calls, device, seconds, is_long=is_long)
    for name, samples in times.items():
        p20, p50, p80 = statistics.quantiles(samples, n=10, method="inclusive")[1::3]
        moved, flops = case.bytes_moved[mode], case.flops[mode]
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
            **({"kernel": kernels[name]} if name in kernels else {}),
        }


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function`` through torch.compile, for the very shapes it is called with."""

    @functools.cache
    def build() -> Callable[..., Tensor]:
        return torch.compile(function, dynamic=False)

    return lambda *args: build()(*args)


def cuda_kernels(
    function: Callable[..., Tensor], backends: Mapping[str, str], device: str
) -> Provider:
    """``function`` of an op by its kernels in CUDA C++, or why they are absent."""
    if "cuda" not in backends:
        return "no such kernels"
    refusal = refuses_device(torch.empty(0, device=device), "input")
    return refusal or functools.partial(function, backend="cuda")


def call_plain(case: Case, mode: str) -> Outputs:
    """The yardstick's result, where it is not timed itself."""
    provider = next(iter(case.providers.values()))
    assert not isinstance(provider, str), "the yardstick is what every user has"
    return _prepared(provider, case.inputs, mode)()


def _prepared(
    provider: Callable[..., Tensor], inputs: tuple[Tensor, ...], mode: str
) -> Callable[[], Outputs]:
    """The call to be timed: for ``bwd`` once, after its forward, since it frees what it used."""
    if mode != "bwd":
        return functools.partial(_outputs, provider, inputs, mode)
    out = provider(*inputs)
    needing = [x for x in inputs if x.requires_grad]
    return functools.partial(torch.autograd.grad, out, needing, _cotangent(out))


def _itself(call: Callable[[], object]) -> Callable[[], object]:
    return call


def _outputs(provider: Callable[..., Tensor], inputs: tuple[Tensor, ...], mode: str) -> Outputs:
    if mode == "fwd":
        # detached: some compute gradients for whatever asks for them, even under no_grad
        with torch.no_grad():
            return (provider(*(x.detach() for x in inputs)),)
    out = provider(*inputs)
    needing = [x for x in inputs if x.requires_grad]
    return (out.detach(), *torch.autograd.grad(out, needing, _cotangent(out)))


def _cotangent(out: Tensor) -> Tensor:
    if out.dim() == 0:
        return torch.ones_like(out)
    return cotangent(tuple(out.shape), out.dtype, str(out.device))


@functools.lru_cache(maxsize=1)
def cotangent(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """The gradient that comes in; the same for every provider."""
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def _judge(
    name: str, case: Case, mode: str, outputs: Outputs, plain: Outputs, truth: Outputs
) -> None:
    for position, triple in enumerate(zip(outputs, plain, truth, strict=True)):
        is_gradient = mode == "bwd" or position > 0
        multiple = case.gradient_multiple if is_gradient else 2.0
        what = f"{name} {mode}, output {position}"
        for actual, usual, exact in _pieces(*triple):
            assert_as_accurate(what, actual, plain=usual, truth=exact, multiple=multiple)


def _relative_error(outputs: Outputs, truth: Outputs) -> float:
    """Largest error over the largest true value, the worst of all outputs."""
    worst = 0.0
    for pair in zip(outputs, truth, strict=True):
        error, size = 0.0, 0.0
        for out, exact in _pieces(*pair):
            error = max(error, (out.double() - exact).abs().max().item())
            size = max(size, exact.abs().max().item())
        worst = max(worst, error / size)
    return worst


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of tensors of one shape, in pieces of bounded size."""
    first = tensors[0]
    if first.dim() == 0:
        return iter([tensors])
    step = max(1, _COMPARED_AT_ONCE * len(first) // max(1, first.numel()))
    return zip(*(x.split(step) for x in tensors), strict=True)


def _interleaved(
    calls: dict[str, Prepare], device: str, seconds: float, *, is_long: bool
) -> dict[str, list[float]]:
    """Milliseconds per call, round by round, so that drift falls on all alike.

    Each round in another order: what a call leaves in caches and heap is the next one's to pay.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for prepare in () if is_long else calls.values():
        for _ in range(2):
            timed(prepare(), device)
    least = 3 if is_long else 5
    order, shuffle = list(calls), random.Random(0).shuffle
    start, rounds = time.perf_counter(), 0
    while calls and (rounds < least or (time.perf_counter() - start < seconds and rounds < 200)):
        shuffle(order)
        for name in order:
            times[name].append(1e3 * timed(calls[name](), device))
        rounds += 1
    return times


def extra_peak_mib(call: Callable[[], object], device: str) -> float | None:
    """Memory that a call holds at its peak, beyond what was there before and what it returns.

    On a GPU as torch's allocator counts it, on Linux as the kernel counts the pages of this
    process; None elsewhere.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - held) / 2**20 - _size_mib(result)
    counter = Path("/proc/self/clear_refs")
    if not counter.exists():
        return None
    # what earlier calls freed would be used again, unseen
    getattr(ctypes.CDLL(None), "malloc_trim", lambda keep: None)(0)
    before = _status_mib("VmRSS")
    counter.write_text("5")  # the peak is counted from here
    result = call()
    # counted in batches of pages, so a call that takes nothing may come out below zero
    return max(0.0, _status_mib("VmHWM") - before - _size_mib(result))


def _size_mib(result: object) -> float:
    tensors = result if isinstance(result, tuple) else ()
    return sum(x.numel() * x.element_size() for x in tensors) / 2**20


def _status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def slowest_kernel(call: Callable[[], Outputs]) -> str:
    """Name of the GPU kernel that took the longest."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    events = profile.key_averages()
    return max(events, key=lambda event: event.self_device_time_total).key if events else "unknown"


@functools.cache
def _failures() -> tuple[type[BaseException], ...]:
    """What a provider may raise without ending the run: refusals, wrong results, no memory, and
    what other people's code raises where it was not made for these inputs or this torch."""
    kinds: tuple[type[BaseException], ...] = (
        ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError,
        RuntimeError, TypeError, ValueError,
    )  # fmt: skip
    try:
        from triton.errors import TritonError
    except ModuleNotFoundError:
        return kinds
    return (*kinds, TritonError)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
