"""How long a call takes: the clock, turns of several calls, and the ceilings of the machine."""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

# What has to be done before a call is timed; returns the call.
Prepare = Callable[[], Callable[[], object]]

# No cache keeps this many bytes from one call to the next.
_BEYOND_CACHES = 1 << 28

# Calls that take this many seconds on average need no more warming, and few rounds.
LONG = 2.0


@dataclass
class Ceilings:
    """What this device does at best, measured in this run on random data."""

    gbps: float
    tflops: dict[str, float] = field(default_factory=dict)

    def floor_ms(self, bytes_moved: float, flops: float, dtype: str) -> float:
        """Neither the bytes nor the arithmetic can take less."""
        return max(bytes_moved / self.gbps / 1e6, flops / self.tflops[dtype] / 1e9)

    def times_beaten(self, ms: float, bytes_moved: float, flops: float, dtype: str) -> float:
        """How many times faster a call of ``ms`` was; bytes count where no cache can keep them."""
        beyond = bytes_moved if bytes_moved >= _BEYOND_CACHES else 0.0
        return self.floor_ms(beyond, flops, dtype) / ms


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


def require_answer(device: str) -> None:
    """Raises where a failure has left the GPU unusable, and all after it would fail."""
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(
    calls: dict[str, Prepare], device: str, seconds: float, *, is_long: bool,
    failures: tuple[type[BaseException], ...],
) -> tuple[dict[str, list[float]], dict[str, BaseException]]:  # fmt: skip
    """Milliseconds per call, round by round, so that drift falls on all alike.

    Each round in another order: what a call leaves in caches and heap is the next one's to pay.
    Who raises one of ``failures`` is not called again, and has the error instead of times.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    failed: dict[str, BaseException] = {}

    def one(name: str) -> None:
        try:
            times[name].append(1e3 * timed(calls[name](), device))
        except failures as error:
            failed[name] = error
            del times[name]
            require_answer(device)

    for name in () if is_long else calls:
        for _ in range(2):
            if name in times:
                one(name)
    for samples in times.values():
        samples.clear()  # those of warming
    least = 3 if is_long else 5
    order, shuffle = list(times), random.Random(0).shuffle
    start, rounds = time.perf_counter(), 0
    while times and (rounds < least or (time.perf_counter() - start < seconds and rounds < 200)):
        shuffle(order)
        for name in order:
            if name in times:
                one(name)
        rounds += 1
    return times, failed


def speedups(times: dict[str, list[float]], baseline: str) -> dict[str, float]:
    """Of each over ``baseline``, which is in ``times``: the median over rounds of the ratio within
    the round, in which whatever else slows the machine slows both."""
    return {
        name: statistics.median(b / t for b, t in zip(times[baseline], samples, strict=True))
        for name, samples in times.items()
    }


def percentiles(samples: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th."""
    low, middle, high = statistics.quantiles(samples, n=10, method="inclusive")[1::3]
    return low, middle, high
