"""Right or wrong: what a provider returns is judged before it is timed, and again after.

Our own results must hold the tolerance rule of ``fastlm.ops._tolerance``.  Others may round as they
see fit: wrong is who is off by more than a thirty-second, of the largest true value or in the mean
square.  Before the result that is judged, each provider has computed another, from other numbers in
the same memory.  The two must differ, and after it was timed it must compute that other one again.
Last it gets numbers that it has never seen: its result must be that of the yardstick, and must not
take several times as long as on those that it was timed on.  Who returns what was kept from another
call is wrong at one of these, unless what it saves is less than that.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fastlm.ops._tolerance import compare

Outputs = tuple[Tensor, ...]


class Wrong(AssertionError):
    """A result is not what it should be."""


# Of the truth, that others may be off by.
ALLOWED = 2.0**-5
# Elements compared at once, 1 GB in float64: results may be as large as the memory is.
_COMPARED_AT_ONCE = 1 << 27
_FINGERPRINT = 4096
_UNFORESEEN = random.Random()
# A call on numbers never seen may take this many times what others took, and these milliseconds
# for cold caches.  It is slower when so many calls in a row are, each on other numbers.
FRESH_CALLS = 4
SLOWER, COLD_MS = 4.0, 0.1
# Times the measured ceilings that nobody reaches: products in TF32 are 8 times as fast as those in
# float32, and other work on the machine may have slowed what the ceilings are.
IMPOSSIBLE = 10.0


def judge_ours(
    what: str, outputs: Outputs, plain: Outputs, truth: Outputs, multiples: Sequence[float]
) -> None:
    """``multiples`` are m of the tolerance rule, one for each output.

    Raises:
        Wrong: The rule is broken.
    """
    _require(len(outputs) == len(truth), f"{what}: {len(outputs)} results, not {len(truth)}")
    together = zip(outputs, plain, truth, multiples, strict=True)
    for position, (actual, usual, exact, multiple) in enumerate(together):
        name = f"{what}, output {position}"
        _require_shape(name, actual, exact)
        for a, p, e in pieces(actual, usual, exact):
            mismatch = compare(a, p, e, multiple=multiple)
            _require(mismatch is None, f"{name}: {mismatch}")


def judge_other(what: str, outputs: Outputs, truth: Outputs) -> None:
    """As the module says.

    Raises:
        Wrong: An output is, or is missing.
    """
    _require(len(outputs) == len(truth), f"{what}: {len(outputs)} results, not {len(truth)}")
    for position, (out, exact) in enumerate(zip(outputs, truth, strict=True)):
        name = f"{what}, output {position}"
        _require_shape(name, out, exact)
        worst, largest, squares, true_squares = _errors(out, exact)
        # NaN is never below
        _require(
            worst <= ALLOWED * largest,
            f"{name}: error {worst:.3g}, where the largest value is {largest:.3g}",
        )
        rms, true_rms = (squares / exact.numel()) ** 0.5, (true_squares / exact.numel()) ** 0.5
        _require(rms <= ALLOWED * true_rms, f"{name}: rms error {rms:.3g}, of {true_rms:.3g}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise Wrong(message)


def _require_shape(name: str, out: Tensor, exact: Tensor) -> None:
    _require(
        out.shape == exact.shape, f"{name}: shape {tuple(out.shape)}, not {tuple(exact.shape)}"
    )


def relative_error(outputs: Outputs, truth: Outputs) -> float:
    """Largest error over the largest true value, the worst of all outputs."""
    found = (_errors(out, exact)[:2] for out, exact in zip(outputs, truth, strict=True))
    return max(error / size for error, size in found)


def _errors(out: Tensor, exact: Tensor) -> tuple[float, float, float, float]:
    """Of the largest error and true value, and of the sums of their squares."""
    worst, largest, squares, true_squares = 0.0, 0.0, 0.0, 0.0
    for got, want in pieces(out, exact):
        error = (got.double() - want).abs()
        # of max() NaN would be lost
        worst = torch.stack([error.max().cpu(), torch.tensor(worst).double()]).max().item()
        largest = max(largest, want.abs().max().item())
        squares += error.square().sum().item()
        true_squares += want.square().sum().item()
    return worst, largest, squares, true_squares


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of tensors of one shape, in pieces of bounded size."""
    first = tensors[0]
    if first.dim() == 0:
        return iter([tensors])
    step = max(1, _COMPARED_AT_ONCE * len(first) // max(1, first.numel()))
    return zip(*(x.split(step) for x in tensors), strict=True)


@contextlib.contextmanager
def other_numbers(inputs: Iterable[Tensor]) -> Iterator[None]:
    """Inside, every float is -2 times what it was: exactly, so that it can be undone."""
    floats = [x for x in inputs if x.is_floating_point()]
    _scale(floats, -2.0)
    try:
        yield
    finally:
        _scale(floats, -0.5)


@contextlib.contextmanager
def fresh_numbers(inputs: Iterable[Tensor], share: float) -> Iterator[None]:
    """Inside, floats are shifted along every dimension, round its end, by ``share`` of its size.

    Dimensions of one size are shifted alike, as the width of a layer and of what it takes.
    """
    floats = [x for x in inputs if x.is_floating_point()]
    _shift(floats, share, 1)
    try:
        yield
    finally:
        _shift(floats, share, -1)


@torch.no_grad()
def _shift(tensors: Iterable[Tensor], share: float, sign: int) -> None:
    for x in tensors:
        shifts = [sign * int(share * size) for size in x.shape]
        x.copy_(x.roll(shifts, tuple(range(x.dim()))))


def fresh_shares() -> list[float]:
    """For ``fresh_numbers``, others each time that nobody can foresee."""
    return [_UNFORESEEN.uniform(0.1, 0.9) for _ in range(FRESH_CALLS)]


@torch.no_grad()
def _scale(tensors: Iterable[Tensor], factor: float) -> None:
    for x in tensors:
        x.mul_(factor)


@torch.no_grad()
def touch(inputs: Iterable[Tensor]) -> None:
    """Count as changed, which they are not: who keeps results by version has to compute anew."""
    for x in inputs:
        x[:0].zero_()


def fingerprint(outputs: Outputs) -> list[Tensor]:
    """A few thousand numbers of each."""
    flat = (x.detach().flatten() for x in outputs)
    return [x[:: max(1, len(x) // _FINGERPRINT)].double().cpu() for x in flat]


def judge_changes(what: str, outputs: Outputs, other: list[Tensor]) -> None:
    """Raises Wrong where ``outputs`` are those of other numbers, whose fingerprint is ``other``."""
    for position, (now, then) in enumerate(zip(fingerprint(outputs), other, strict=True)):
        _require(
            (now - then).abs().max().item() > ALLOWED * now.abs().max().item(),
            f"{what}, output {position}: the same for other inputs, which may be a result kept",
        )


def judge_again(what: str, outputs: Outputs, before: list[Tensor]) -> None:
    """Raises Wrong unless ``outputs`` are those whose fingerprint is ``before``."""
    for position, (now, then) in enumerate(zip(fingerprint(outputs), before, strict=True)):
        error, size = (now - then).abs().max().item(), then.abs().max().item()
        _require(
            error <= ALLOWED * size,
            f"{what}, output {position}: after it was timed it returns something else, which may "
            f"be the result of another call: difference {error:.3g}, largest value {size:.3g}",
        )


def judge_fresh(what: str, outputs: Outputs, yardstick: list[Tensor]) -> None:
    """``yardstick`` is the fingerprint of its result for the same numbers, never seen before.

    Raises:
        Wrong: They are further apart than two who are not wrong.
    """
    for position, (now, usual) in enumerate(zip(fingerprint(outputs), yardstick, strict=True)):
        error, size = (now - usual).abs().max().item(), usual.abs().max().item()
        _require(
            error <= 2 * ALLOWED * size,
            f"{what}, output {position}: of numbers never seen before the result is off by "
            f"{error:.3g}, where the largest value is {size:.3g}",
        )


def is_slower(ms: float, usual_ms: float) -> bool:
    """Whether a call on numbers never seen took longer than it may."""
    return ms > SLOWER * usual_ms + COLD_MS


def judge_fresh_time(what: str, ms: float, usual_ms: float) -> None:
    """Raises Wrong where who took ``usual_ms`` is slower on numbers never seen."""
    _require(
        not is_slower(ms, usual_ms),
        f"{what}: {ms:.3g} ms on numbers never seen before and {usual_ms:.3g} ms on others, which "
        "may be results kept",
    )


def judge_rate(what: str, fraction: float) -> None:
    """Raises Wrong where a call was faster than the machine, ``fraction`` times its ceilings."""
    _require(
        fraction <= IMPOSSIBLE, f"{what}: {fraction:.3g} times as fast as the machine was measured"
    )
