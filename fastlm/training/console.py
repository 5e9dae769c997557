"""What a run tells while it works: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 5.0


class Output(Console):
    """Standard output; when its reader goes away it falls silent and tells ``closed``."""

    def __init__(self, closed: Callable[[], None]) -> None:
        super().__init__(file=sys.stdout, highlight=False, soft_wrap=True)
        self.closed = closed

    def on_broken_pipe(self) -> None:
        # rich's own ends the process, whatever has yet to be saved
        self.quiet = True
        nothing = os.open(os.devnull, os.O_WRONLY)
        # what is still buffered has to go somewhere
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)
        self.closed()


class Display:
    """Progress of a run.

    Args:
        steps: Of the whole run.
        first: How many of them are done already.
        closed: Called when nobody reads the output any more.
    """

    def __init__(self, steps: int, first: int, closed: Callable[[], None]) -> None:
        self.steps, self.first = steps, first
        self.console = Output(closed)
        self.progress: Progress | None = None
        self.started = self.last_line = time.perf_counter()
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("train   "),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(compact=True),
                console=self.console,
            )
            self.task = self.progress.add_task("train", total=steps, completed=first, numbers="")

    def __enter__(self) -> Display:
        if self.progress is not None:
            self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.progress is not None:
            self.progress.stop()

    def say(self, topic: str, text: str) -> None:
        self.console.print(f"{topic:<9}{text}", markup=False)

    def show(self, row: dict[str, Any]) -> None:
        """Show a row of metrics.jsonl."""
        numbers = f"loss {row['loss']:.3f}  {row['tok_per_sec']:,.0f} tok/s"
        if self.progress is not None:
            self.progress.update(self.task, completed=row["step"], numbers=numbers)
        now = time.perf_counter()
        if "val_loss" in row:
            numbers += f"  val {row['val_loss']:.4f}  {row['val_bpb']:.3f} bits/byte"
        elif self.progress is not None or now - self.last_line < SECONDS_BETWEEN_LINES:
            return
        self.last_line = now
        left = (now - self.started) / max(1, row["step"] - self.first) * (self.steps - row["step"])
        eta = "" if self.progress is not None else f"  {left:.0f} s left"
        self.say("step", f"{row['step']:>{len(str(self.steps))}}/{self.steps}  {numbers}{eta}")
