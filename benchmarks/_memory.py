"""How much memory a call holds at its peak."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch


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
