"""Benchmark rows in a terminal, by rich: what ran is drawn op by op, what runs is below it."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from . import _report
from ._providers import kind_of

_STYLES = {"ours": "bold green", "yardstick": "dim", "foreign": ""}


class Drawing:
    """A bar for ``total`` cases, none if that is 0, and a table for each op."""

    def __init__(self, total: int) -> None:
        self._console = Console(highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task("", total=total, visible=total > 0)
        self._op, self._rows = "", list[dict[str, Any]]()

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def begin(self, op: str) -> None:
        self._op, self._rows = op, []
        self._progress.update(self._task, description=op)

    def row(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self._progress.update(self._task, description=f"{self._op} {row['provider']}")

    def end(self) -> None:
        self._console.print(table(self._op, self._rows))

    def step(self) -> None:
        self._progress.advance(self._task)

    def say(self, text: str) -> None:
        self._console.print(text)


def table(op: str, rows: list[dict[str, Any]]) -> Table:
    """The fastest first within each case; who has no numbers last, with the reason."""
    found = Table(title=op, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    found.add_column("problem")
    found.add_column("mode")
    found.add_column("provider")
    for name in ("ms", "20 to 80 %", "speedup", "of peak", "MiB", "error"):
        found.add_column(name, justify="right", no_wrap=True)
    found.add_column("", overflow="ellipsis", no_wrap=True, style="dim")

    for (name, mode), of_case in _report.cases(rows).items():
        for at, row in enumerate(of_case):
            first = (name, mode) if at == 0 else ("", "")
            found.add_row(*first, *_cells(row), end_section=at == len(of_case) - 1)
    return found


def _cells(row: dict[str, Any]) -> tuple[Text | str, ...]:
    provider = Text(row["provider"], style=_STYLES[kind_of(row["provider"])])
    if reason := _report.reason(row):
        style = "red" if "wrong" in row else ""
        return provider, *("",) * 6, Text(reason, style=style)
    cells = _report.cells(row)
    return (
        provider, cells["ms"], f"{cells['p20']} to {cells['p80']}", cells["speedup"],
        cells["of peak"], cells["MiB"], cells["error"], row.get("kernel", ""),
    )  # fmt: skip
