"""Run the reference beside every operator and compare: ``FASTLM_CHECK=1``, ``fastlm.checked()``."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastlm.ops._tolerance import Mismatch, compare, differing

_lock = threading.Lock()
# A count for the whole process: autograd runs backward operators in threads of its own.
_depth = int(os.environ.get("FASTLM_CHECK", "0") == "1")


class KernelMismatch(RuntimeError):
    """A backend's result is not as close to the definition as plain torch is."""


def is_on() -> bool:
    return _depth > 0


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Compare every fastlm operator called inside, forward and backward, with its definition.

    Also what it writes in place, and that nothing else is written.  The reference runs in float64
    on the same inputs; a result that breaks the tolerance rule raises :class:`KernelMismatch`.
    Compiled code is checked too.  Holds for all threads of the process.  Slow, and it waits for the
    GPU after each operator: for finding a bug, not for training.

    Raises:
        RuntimeError: An operator is called while a CUDA graph is being captured.
    """
    global _depth
    with _lock:
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1


def run(
    op: str,
    step: str,
    backend: str,
    implementation: Callable[..., Any],
    definition: Callable[..., Any],
    inputs: Sequence[Any],
    written: Sequence[int] = (),
) -> Any:
    """Run ``implementation`` and compare each output with float64 truth.

    The module of ``definition`` gives the yardstick: ``truth_<step>`` is the definition in float64,
    a slice of rows at a time, and ``plain_<step>`` is what eager torch gives in the output's dtype.

    Inputs at the positions ``written`` are compared first.  For each that is not None
    ``written_<step>`` gives, from the inputs as they were, ``(index, plain, truth)`` of what is
    new; all else must be untouched.  ``truth_<step>`` and ``plain_<step>`` then find in these
    inputs what was written.

    Raises:
        KernelMismatch: An output is further from the truth than the rule allows, or so is what was
            written, or something else was.
        RuntimeError: A CUDA graph is being captured.
    """
    first = next(x for x in inputs if isinstance(x, Tensor))
    if first.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{op} {step}: checked() cannot compare while a CUDA graph is captured")
    originals = tree_map_only(Tensor, torch.clone, list(inputs))
    outputs = implementation(*inputs)
    module = sys.modules[definition.__module__]
    arguments = dict(zip(inspect.signature(definition).parameters, inputs, strict=True))

    def wrong(what: str, x: Tensor, mismatch: Mismatch) -> KernelMismatch:
        return KernelMismatch(
            f"{op} {step} on {backend}, {what} of shape {tuple(x.shape)}, {x.dtype}, is wrong: "
            f"{mismatch}\n  inputs: {_summary(inputs)}"
        )

    if written:
        new = getattr(module, f"written_{step}")(*originals)
        given = [at for at in written if inputs[at] is not None]
        for at, expected in zip(given, new, strict=True):
            mismatch = _compare_written(inputs[at], originals[at], *expected)
            if mismatch is not None:
                raise wrong(f"argument {list(arguments)[at]}", inputs[at], mismatch)
            originals[at] = inputs[at]
    with _autograd_records():
        truths = as_tuple(getattr(module, f"truth_{step}")(*originals))
        plains = as_tuple(getattr(module, f"plain_{step}")(*originals))
    results = zip(as_tuple(outputs), plains, truths, strict=True)
    for position, (actual, plain, truth) in enumerate(results):
        if not actual.is_floating_point():
            continue  # an argmax: rounding decides between equals
        mismatch = compare(actual, plain, truth, multiple=_multiple(op, step, arguments))
        if mismatch is not None:
            raise wrong(f"output {position}", actual, mismatch)
    return outputs


def _compare_written(
    after: Tensor, before: Tensor, index: tuple[Tensor, ...], plain: Tensor, truth: Tensor
) -> Mismatch | None:
    """What is new at ``index`` by the rule, all else bit for bit; ``before`` is overwritten.

    ``index`` has a list of positions for each of the first dimensions.
    """
    mismatch = compare(after[index], plain, truth)
    if mismatch is not None:
        token, *channel = mismatch.index
        return replace(mismatch, index=(*(int(x[token]) for x in index), *channel))
    before[index] = after[index]
    changed = (after != before) & ~(after.isnan() & before.isnan())
    return differing("written where it was not to be", changed, after, before)


@contextlib.contextmanager
def _autograd_records() -> Iterator[None]:
    """Also where a tensor subclass such as DTensor calls the operator, which is below autograd."""
    keys = torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView
    before = [torch._C._dispatch_tls_is_dispatch_key_excluded(key) for key in keys]
    try:
        for key in keys:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        yield
    finally:
        for key, excluded in zip(keys, before, strict=True):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, excluded)


def as_tuple(outputs: Any) -> tuple[Any, ...]:
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


def _multiple(op: str, step: str, arguments: Mapping[str, Any]) -> float:
    """m of the rule: 3 for gradients of attention with a softcap or a head_dim above 128."""
    if op != "causal_attention" or step != "backward":
        return 2.0
    is_hard = arguments["softcap"] is not None or arguments["query"].shape[-1] > 128
    return 3.0 if is_hard else 2.0


def _summary(inputs: Sequence[Any]) -> str:
    return ", ".join(
        f"{x.dtype}{list(x.shape)}".removeprefix("torch.") if isinstance(x, Tensor) else repr(x)
        for x in inputs
    )
