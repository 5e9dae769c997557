"""Which implementation of an op runs.  No other file makes this choice.

A backend of an op is a module with one function per step (``forward``, ``backward``) and for each a
``<step>_refuses`` with the same arguments, which returns a short reason or None.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

BACKENDS = ("triton", "cuda", "torch", "reference", "gluon")
# These run on a GPU; on CPU tensors they are interpreters, so "auto" leaves them out there.
_KERNELS = ("triton", "cuda", "gluon")
_OPTIONAL = ("triton", "fastlm._C")


@dataclass(frozen=True)
class Choice:
    """What :func:`weigh` found: the backend that serves a call, and why the others do not.

    Attributes:
        backend: Name of the backend, or None when every one asked refuses.
        refusals: Backend name to reason, in the order they were asked.
    """

    backend: str | None
    refusals: dict[str, str]

    @property
    def reasons(self) -> str:
        return "\n".join(f"  {name} refused: {why}" for name, why in self.refusals.items())


@functools.cache
def _load(module: str) -> ModuleType | str:
    """The module, or the reason it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in _OPTIONAL:
            raise
        return f"{error.name} is not installed"


def _refusal(module_name: str, step: str, args: Sequence[Any]) -> str | None:
    module = _load(module_name)
    return module if isinstance(module, str) else getattr(module, f"{step}_refuses")(*args)


def _on_gpu(args: Sequence[Any]) -> bool:
    return args[0].is_cuda


def weigh(
    op: str, step: str, backends: Mapping[str, str], wanted: str, args: Sequence[Any]
) -> Choice:
    """Ask the backends of ``op`` in order, or only the one called ``wanted``.

    Raises:
        ValueError: ``wanted`` is no backend's name.
    """
    if wanted not in ("auto", *BACKENDS):
        names = ", ".join(("auto", *BACKENDS))
        raise ValueError(f"{op}: backend must be one of {names}, got {wanted!r}")
    if wanted != "auto" and wanted not in backends:
        return Choice(None, {wanted: f"{op} has no {wanted} backend, only {', '.join(backends)}"})
    refusals: dict[str, str] = {}
    for name in backends if wanted == "auto" else [wanted]:
        if wanted == "auto" and name in _KERNELS and not _on_gpu(args):
            device = args[0].device.type
            refusals[name] = f"tensors are on {device}; auto runs kernels on CUDA only"
            continue
        reason = _refusal(backends[name], step, args)
        if reason is None:
            return Choice(name, refusals)
        refusals[name] = reason
    return Choice(None, refusals)


def first_asked(backends: Mapping[str, str], wanted: str, args: Sequence[Any]) -> str | None:
    """The backend that serves the call unless it refuses; None for a name of none."""
    if wanted != "auto":
        return wanted if wanted in backends else None
    on_gpu = _on_gpu(args)
    for name in backends:
        if on_gpu or name not in _KERNELS:
            return name
    return None


def choose(
    op: str, step: str, backends: Mapping[str, str], wanted: str, args: Sequence[Any]
) -> tuple[str, Callable[..., Any]]:
    """Return the name of the first backend that takes ``args``, and its ``step``.

    On a GPU, landing below the first choice warns once with the reasons.

    Raises:
        ValueError: ``wanted`` is no backend's name.
        NotImplementedError: Every backend asked refuses; the message gives each reason.
    """
    first = first_asked(backends, wanted, args)
    if first is not None:
        module = _load(backends[first])
        if not isinstance(module, str) and getattr(module, f"{step}_refuses")(*args) is None:
            return first, getattr(module, step)
    choice = weigh(op, step, backends, wanted, args)
    if choice.backend is None:
        raise NotImplementedError(f"{op} {step}: no backend takes this call\n{choice.reasons}")
    if choice.refusals and _on_gpu(args):
        _warn_once(f"{op} {step} runs on {choice.backend}:\n{choice.reasons}")
    return choice.backend, getattr(_load(backends[choice.backend]), step)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)
