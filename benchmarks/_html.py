"""One page with pictures and tables, in a file that needs no other."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from . import _pictures, _report
from ._providers import kind_of

Row = dict[str, Any]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
img { max-width: 100%; display: block; margin: 1rem 0 }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: 2px 10px; text-align: right; white-space: nowrap }
th { border-bottom: 1px solid #888 } tr.first td { border-top: 1px solid #ddd }
td:nth-child(-n+3), th:nth-child(-n+3) { text-align: left }
td.why { text-align: left; color: #777; white-space: normal }
tr.ours td { font-weight: 600 } .wrong { color: #c1121f }
p.env { color: #555 }
"""
_COLUMNS = ("ms", "p20", "p80", "speedup", "of peak", "MiB", "error")


def write(folder: Path, files: dict[str, tuple[Row, list[Row]]]) -> Path:
    """Draw into ``folder`` what there is of environments and their rows, several each into a folder
    of its name; returns report.html."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>fastlm bench</title>",
        f"<style>{_STYLE}</style><h1>fastlm beside what else is installed</h1>",
        "<p>Times are medians in milliseconds with the 20th and 80th percentile; <b>speedup</b> is "
        "the median over rounds of the baseline's time over this one's; <b>of peak</b> is against "
        "the copy bandwidth and the matrix products of the same run; <b>MiB</b> are held beyond "
        "inputs and results; <b>error</b> is the largest, over the largest true value.</p>",
    ]
    for name, (env, rows) in files.items():
        place = folder if len(files) == 1 else folder / name
        pictures = _pictures.draw(place, env, rows)
        parts += [*_heading(env), *_shown(pictures), *_tables(rows)]
    path = folder / "report.html"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def _heading(env: Row) -> Iterator[str]:
    lines = [*_report.heading(env).split("\n"), f"{env['threads']} threads, {env['date'][:10]}"]
    yield f"<p class='env'>{'<br>'.join(map(html.escape, lines))}</p>"


def _shown(pictures: dict[str, Path]) -> Iterator[str]:
    for title, path in pictures.items():
        data = base64.b64encode(path.read_bytes()).decode()
        yield f"<img alt='{html.escape(title)}' src='data:image/png;base64,{data}'>"


def _tables(rows: list[Row]) -> Iterator[str]:
    rows = [row for row in rows if "ms_p50" in row or _report.reason(row)]
    for op, of_op in groupby(rows, lambda row: row["op"]):
        yield f"<h2>{html.escape(op)}</h2><table><tr><th>problem<th>mode<th>provider"
        yield "".join(f"<th>{name}" for name in _COLUMNS)

        for case, of_case in _report.cases(of_op).items():
            for at, row in enumerate(of_case):
                yield _line(row, case if at == 0 else ("", ""))
        yield "</table>"


def _line(row: Row, case: tuple[str, str]) -> str:
    kinds = [kind_of(row["provider"]), *(["first"] if case[1] else [])]
    start = "".join(f"<td>{html.escape(word)}" for word in (*case, row["provider"]))
    if why := _report.reason(row):
        style = "why wrong" if "wrong" in row else "why"
        cells = f"<td class='{style}' colspan='{len(_COLUMNS)}'>{html.escape(why)}"
    else:
        found = _report.cells(row)
        cells = "".join(f"<td>{found[name]}" for name in _COLUMNS)
    return f"<tr class='{' '.join(kinds)}'>{start}{cells}"
