"""Rows as they come: a table for each op with progress and the time left in a terminal that rich
can draw in, plain lines everywhere else."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from . import _report


class Console:
    """Use as a context; ``total`` cases are to come."""

    def __init__(self, heading: str, total: int) -> None:
        self._rich: Any = _drawing(total) if sys.stdout.isatty() else None
        self.say(heading)

    def __enter__(self) -> Console:
        if self._rich:
            self._rich.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._rich:
            self._rich.stop()

    def begin(self, op: str) -> None:
        if self._rich:
            self._rich.begin(op)
        else:
            self.say(f"\n{op}\n{_report.HEADER}")

    def row(self, row: dict[str, Any]) -> None:
        if self._rich:
            self._rich.row(row)
        else:
            self.say(_report.line(row))

    def end(self) -> None:
        if self._rich:
            self._rich.end()

    def step(self) -> None:
        """A case is done."""
        if self._rich:
            self._rich.step()

    def say(self, text: str) -> None:
        if self._rich:
            self._rich.say(text)
        else:
            print(text, flush=True)


def _drawing(total: int) -> Any:
    try:
        from . import _drawing
    except ModuleNotFoundError:
        return None
    return _drawing.Drawing(total)
