"""Ctrl-C and SIGTERM: finish the step, save, stop; a second one stops at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Which signal has asked the run to stop, or None."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            # the second one: what a process without our handler would do
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = signal.Signals(number)
        print(
            f"\n{self.signal.name}: saving after this step; once more stops at once",
            file=sys.stderr,
            flush=True,
        )

    def exit(self) -> BaseException:
        """What to raise once the run is saved, so that the process ends as the signal asked."""
        if self.signal is signal.SIGINT:
            return KeyboardInterrupt()
        return SystemExit(128 + int(self.signal or 0))


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Catch the signals inside the block; only the main thread may, elsewhere nothing changes."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {number: signal.signal(number, interrupt._receive) for number in SIGNALS}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
