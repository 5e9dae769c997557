"""Ctrl-C, SIGTERM, a closed pipe: finish the step, save, stop; a second signal stops at once."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Which signal has asked the run to stop, or None; SIGPIPE where nobody reads our output."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal not in (None, signal.SIGPIPE):
            # the second one: what a process without our handler would do
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = signal.Signals(number)
        _tell(f"\n{self.signal.name}: saving after this step; once more stops at once")

    def pipe_closed(self) -> None:
        """What SIGPIPE would say, which Python turns into an error of whoever writes."""
        if self.signal is None:
            self.signal = signal.SIGPIPE
            _tell("nobody reads the output any more: saving after this step")

    def exit(self) -> BaseException:
        """What to raise once the run is saved, so that the process ends as the signal asked."""
        if self.signal is signal.SIGINT:
            return KeyboardInterrupt()
        if self.signal is signal.SIGPIPE:
            return BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        return SystemExit(128 + int(self.signal or 0))


def _tell(text: str) -> None:
    # standard error may be that closed pipe too, and the run is not saved yet
    with suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)


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
