"""The one launcher: device guard, grid limits, interpreter lock, log of launches."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from ._runtime import INTERPRETED

# The interpreter keeps the position in the grid in a module global.
_interpreter_lock = threading.RLock()
_recorders: list[tuple[list[Launch], bool]] = []

# CUDA C++ programming guide, technical specifications per compute capability.
MAX_GRID = (2**31 - 1, 65_535, 65_535)


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what ran, or would run.

    Attributes:
        kernel: The ``@triton.jit`` function.
        grid: Programs along x, y, z.
        args: Positional arguments.
        constants: Keyword arguments: compile-time values by name.
        options: ``num_warps`` and ``num_stages``.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@contextlib.contextmanager
def recorded(*, run: bool = True) -> Iterator[list[Launch]]:
    """Collect the launches made inside the block; with ``run=False`` nothing is executed."""
    log: list[Launch] = []
    _recorders.append((log, run))
    try:
        yield log
    finally:
        _recorders.remove((log, run))


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The ``ACC`` of a kernel: float64 for float64 inputs, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int,
    num_stages: int,
    **constants: Any,
) -> None:
    """Run ``kernel`` on the device of its first tensor, on the current stream.

    A grid with a zero side launches nothing.

    Raises:
        RuntimeError: A side of the grid is beyond what CUDA takes; the plan is wrong.
    """
    if 0 in grid:
        return
    options = {"num_warps": num_warps, "num_stages": num_stages}
    call = Launch(kernel, grid, args, constants, options)
    for side, limit in zip(grid, MAX_GRID, strict=False):
        if side > limit:
            raise RuntimeError(f"{call.name}: grid {grid} is beyond {MAX_GRID}")
    for log, _ in _recorders:
        log.append(call)
    if not all(run for _, run in _recorders):
        return
    if INTERPRETED:
        with _interpreter_lock:
            kernel[grid](*args, **constants, **options)
        return
    device = next(arg for arg in args if isinstance(arg, torch.Tensor)).device
    with torch.cuda.device(device):
        kernel[grid](*args, **constants, **options)
