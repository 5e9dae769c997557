"""The tables of the documentation, written from the committed result files.

python benchmarks/tables.py            # write docs/results.md and the table in README.md
python benchmarks/tables.py --check    # exit 1 where they differ from the files
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.benchmarks._providers import kind_of

ROOT = Path(__file__).resolve().parents[1]  # of a checkout: a wheel has no results
# in order of the page
SUITES = {
    "linear_cross_entropy": "The loss of hidden states, `linear_cross_entropy`",
    "cross_entropy": "The loss of logits, `cross_entropy`",
    "attention": "Causal attention",
    "attention_options": "Attention with options",
    "attention_with_kv_cache": "Attention over a cache",
    "decode": "Generation",
    "train_step": "A training step of a whole model",
    "time_to_loss": "Time to loss",
}
README_DEVICE = "cpu-2-cores"
BEGIN, END = "<!-- written by make docs-tables -->\n", "<!-- end -->"

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Rows of one problem in one mode, by provider; those that were not measured are left out."""

    name: str
    mode: str
    rows: dict[str, Row]

    @property
    def others(self) -> dict[str, Row]:
        return {name: row for name, row in self.rows.items() if kind_of(name) == "foreign"}

    def fastest_other(self) -> tuple[str, Row] | None:
        return min(self.others.items(), key=lambda item: item[1]["ms_p50"], default=None)


def read(device: str, suite: str) -> tuple[Row, list[Row]]:
    """The environment and the rows of a committed file."""
    content = json.loads((ROOT / "benchmarks/results" / device / f"{suite}.json").read_text())
    return content["env"], content["rows"]


def cases(rows: Iterable[Row]) -> list[Case]:
    found: dict[tuple[str, str], Case] = {}
    for row in rows:
        name = _problem(row)
        case = found.setdefault((name, row["mode"]), Case(name, row["mode"], {}))
        if "ms_p50" in row:
            case.rows[row["provider"]] = row
    return list(found.values())


def page() -> str:
    """All of docs/results.md."""
    lines = [
        "# Measured",
        "",
        "Written by `make docs-tables` from the files in `benchmarks/results`; docs/benchmarking.md"
        " says how they are measured.",
        "",
    ]
    for folder in sorted((ROOT / "benchmarks/results").iterdir()):
        lines += _device(folder)
    return "\n".join(lines)


def _device(folder: Path) -> Iterator[str]:
    yield f"## {folder.name}"
    yield ""
    for suite, title in SUITES.items():
        if not (folder / f"{suite}.json").exists():
            continue
        env, rows = read(folder.name, suite)
        yield f"### {title}"
        yield ""
        threads = f"{env['threads']} {'thread' if env['threads'] == 1 else 'threads'}"
        versions = f"torch {env['torch']}, Triton {env['triton']}, commit {env['git']}"
        yield f"{env['device']}, {threads}, {versions}, {env['date'][:10]}."
        yield ""
        yield from _TABLES.get(suite, _milliseconds)(rows)
        yield ""


def _milliseconds(rows: list[Row]) -> Iterator[str]:
    """Medians of every provider, fastest other over fastlm, and peaks of these two."""
    all_cases = cases(rows)
    providers = _in_order(name for case in all_cases for name in case.rows)
    yield "Milliseconds, medians; `gain` is the time of the fastest other over that of fastlm."
    yield ""
    last = ("gain", "MiB", "MiB of the fastest other")
    yield from _table(
        ("problem", "mode", *providers, *last),
        (
            (
                case.name,
                case.mode,
                *(_short(row["ms_p50"] if (row := case.rows.get(p)) else None) for p in providers),
                *_comparison(case),
            )
            for case in all_cases
        ),
    )
    missing = dict.fromkeys(
        f"`{row['provider']}`: {row['absent']}" for row in rows if "absent" in row
    )
    if missing:
        yield ""
        yield f"Not measured: {'; '.join(missing)}."


def _comparison(case: Case) -> tuple[str, ...]:
    fastlm, other = case.rows.get("fastlm"), case.fastest_other()
    if fastlm is None or other is None:
        return "", "", ""
    gain = f"{other[1]['ms_p50'] / fastlm['ms_p50']:.2f}"
    return gain, *(_whole(row["peak_mib"]) for row in (fastlm, other[1]))


def _decode(rows: list[Row]) -> Iterator[str]:
    yield "Tokens a second, all sequences together, medians; `products` is what the matrix-vector"
    yield "products of the model alone would give."
    yield ""
    all_cases = cases(rows)
    providers = _in_order(name for case in all_cases for name in case.rows)
    yield from _table(
        ("model, sequences", *providers, "over transformers", "of products"),
        (
            (
                _model(case),
                *(_short(_rate(case, provider)) for provider in providers),
                _over(_rate(case, "fastlm"), _best_rate(case)),
                _over(_rate(case, "fastlm"), _rate(case, "products")),
            )
            for case in all_cases
        ),
    )


def _train_step(rows: list[Row]) -> Iterator[str]:
    vocab = rows[0]["peak_mib_vocab"]
    yield from _table(
        ("provider", "ms", "least ms", f"MiB at V = {vocab:,}"),
        (
            (row["provider"], *(_short(row[key]) for key in ("ms_p50", "ms_min", "peak_mib")))
            for row in rows
        ),
    )


def _time_to_loss(rows: list[Row]) -> Iterator[str]:
    yield from _table(
        ("recipe", "seconds", "steps", "tokens", "loss on held-out text"),
        (
            (
                row["provider"], f"{row['seconds']:.1f}", f"{row['steps']:,}",
                f"{row['tokens']:,}", f"{row['val_loss']:.4f}",
            )
            for row in rows
        ),
    )  # fmt: skip


_TABLES = {"decode": _decode, "train_step": _train_step, "time_to_loss": _time_to_loss}


def readme_table() -> str:
    """A line for each thing that users ask for first."""
    lines: list[tuple[str, ...]] = []
    for suite, problem, title in (
        ("linear_cross_entropy", "N4096 C768 V128256", "loss of 4,096 tokens, 128,256 classes"),
        ("attention_options", "T2048 H12 G12 D64 W256", "attention, 2,048 tokens, window of 256"),
        ("attention_options", "T2048 H12 G12 D64 docs8", "attention, 2,048 tokens, 8 documents"),
    ):
        case = next(
            case
            for case in cases(read(README_DEVICE, suite)[1])
            if problem in case.name and case.mode == "fwd_bwd"
        )
        other = case.fastest_other()
        assert other is not None, suite
        lines.append((title, _cost(case.rows["fastlm"]), f"{_cost(other[1])} ({other[0]})"))
    for case in cases(read(README_DEVICE, "decode")[1]):
        if "B1 " in case.name:
            rates = (_short(rate) for rate in (_rate(case, "fastlm"), _best_rate(case)))
            model, ours, best = _model(case).split(",")[0], *rates
            title = f"generation, {model} parameters"
            lines.append((title, f"{ours} tokens/s", f"{best} tokens/s (transformers)"))
    times = {row["provider"]: row for row in read(README_DEVICE, "time_to_loss")[1]}
    recipe, other_recipe = times.pop("fastlm"), next(iter(times.values()))
    lines.append(
        (
            f"training to a loss of {other_recipe['val_loss']:.3f}",
            f"{recipe['seconds']:.0f} s",
            f"{other_recipe['seconds']:.0f} s ({other_recipe['provider']})",
        )
    )
    header = (
        "float32 on a CPU; losses and attention forward and backward",
        "fastlm",
        "the fastest other",
    )
    return "\n".join(_table(header, lines)) + "\n"


def _cost(row: Row) -> str:
    milliseconds = row["ms_p50"]
    time = f"{milliseconds / 1e3:.1f} s" if milliseconds >= 1e4 else f"{milliseconds:.0f} ms"
    return f"{time}, {row['peak_mib']:,.0f} MiB"


def _problem(row: Row) -> str:
    words = [f"{key}{value}" for key, value in row["shape"].items()]
    return " ".join([*words, row.get("inputs", "")]).strip()


def _model(case: Case) -> str:
    shape = next(iter(case.rows.values()))["shape"]
    return ", ".join(str(shape[name]) for name in ("model", "B", "cache") if name in shape)


def _rate(case: Case, provider: str) -> float | None:
    row = case.rows.get(provider)
    return None if row is None else row["tokens_per_second_p50"]


def _best_rate(case: Case) -> float | None:
    return max((row["tokens_per_second_p50"] for row in case.others.values()), default=None)


def _over(a: float | None, b: float | None) -> str:
    return "" if a is None or b is None else f"{a / b:.2f}"


def _short(value: float | None) -> str:
    """Three digits, and all before the point."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _in_order(names: Iterable[str]) -> list[str]:
    """fastlm first, what is no offer last."""
    found = dict.fromkeys(names)
    first = [name for name in found if kind_of(name) == "ours"]
    last = [name for name in found if kind_of(name) == "yardstick"]
    return [*first, *(name for name in found if name not in (*first, *last)), *last]


def _table(header: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> Iterator[str]:
    for cells in (header, ("---",) * len(header), *lines):
        yield f"| {' | '.join(cells)} |"


def documents() -> dict[Path, str]:
    """Each page with its tables as they should be."""
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    after = rest[rest.index(END) :]
    return {
        ROOT / "docs/results.md": page(),
        readme: f"{before}{BEGIN}{readme_table()}{after}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=re.split(r"\n\n", __doc__ or "")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    stale = {path: text for path, text in documents().items() if _read(path) != text}
    for path, text in stale.items():
        print(f"{'differs' if options.check else 'written'}: {path.relative_to(ROOT)}")
        if not options.check:
            path.write_text(text)
    return 1 if options.check and stale else 0


def _read(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
