"""Pictures of benchmark rows: each says what is drawn, in which units, where, when and of which
commit."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from ._axes import AXES
from ._providers import PROVIDERS, kind_of

Row = dict[str, Any]

_MODES = {"fwd": "forward", "bwd": "backward", "fwd_bwd": "forward and backward"}
_MARKERS = {"fwd": "o", "bwd": "s", "fwd_bwd": "^"}
_OURS = "#c1121f"
# of Tol's muted scheme, without its red
_OTHERS = (
    "#332288", "#117733", "#88ccee", "#ddcc77", "#44aa99", "#999933", "#882255", "#6699cc",
    "#aa4499", "#777777", "#b15928", "#1f9e89", "#5e4fa2",
)  # fmt: skip
_KINDS = ("foreign", "ours", "yardstick")
# the kinds of ours side by side
_HATCHES = {"fastlm.int8": "//", "fastlm.ragged": ".."}
_DPI = 150


def draw(folder: Path, env: Row, rows: list[Row]) -> dict[str, Path]:
    """Title to file, of every picture that there are rows for."""
    measured = [row for row in rows if "ms_p50" in row]
    found: dict[str, Path] = {}

    def save(name: str, title: str, figure: Figure | None) -> None:
        if figure is None:
            return
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
        figure.text(0.01, 0.005, _where(env), fontsize=7, color="#555555")
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=_DPI)
        found[title] = folder / f"{name}.png"

    for op, (size, _) in AXES.items():
        of_op = [row for row in measured if row["op"] == op]
        for inputs in dict.fromkeys(row.get("inputs", "") for row in of_op):
            of_kind = [row for row in of_op if row.get("inputs", "") == inputs]
            kind = f"{op}_{inputs}" if len({row.get("inputs") for row in of_op}) > 1 else op
            title = kind.replace("_options_", ", ").replace(f"{op}_", f"{op}, ")
            lines = _longest(of_kind, size)
            save(f"speed_{kind}", f"{title}: time of a call", _against(lines, op, "ms_p50"))
            if op in ("cross_entropy", "linear_cross_entropy"):
                memory = _against(lines, op, "peak_mib")
                save(f"memory_{kind}", f"{title}: memory beyond inputs and results", memory)
        save(f"roofline_{op}", f"{op}: roofline", _roofline(of_op, env))
    save("tokens_per_second", "Generation: tokens a second", _tokens(measured))
    return found


def _where(env: Row) -> str:
    threads = f"{env['threads']} {'thread' if env['threads'] == 1 else 'threads'}"
    return (
        f"{env['device']}, {threads}, torch {env['torch']}, fastlm commit {env['git']}, "
        f"{env['date'][:10]}"
    )


def colors(providers: Iterable[str]) -> dict[str, str]:
    """The same provider has the same colour in every picture."""
    others = [name for name in PROVIDERS if kind_of(name) == "foreign"]
    fixed = {name: _OTHERS[at % len(_OTHERS)] for at, name in enumerate(others)}
    special = {"ours": _OURS, "yardstick": "#bbbbbb", "foreign": "#000000"}
    return {name: fixed.get(name, special[kind_of(name)]) for name in providers}


def _longest(rows: list[Row], size: str) -> list[Row]:
    """Of the rows that differ in ``size`` alone those with the most sizes, if there are two."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        rest = {key: value for key, value in row["shape"].items() if key != size}
        groups.setdefault(json.dumps([rest, row["dtype"]]), []).append(row)

    def count(group: list[Row]) -> int:
        return len({row["shape"][size] for row in group})

    best = max(groups.values(), key=count, default=[])
    return best if best and count(best) > 1 else []


def _against(rows: list[Row], op: str, value: str) -> Figure | None:
    """A line for each provider along the size of the op, a panel for each mode."""
    rows = [row for row in rows if row.get(value) is not None]
    modes = [mode for mode in _MODES if any(row["mode"] == mode for row in rows)]
    if value == "peak_mib":
        modes = modes[-1:]
    if not modes:
        return None
    size, label = AXES[op]
    figure, panels = _panels(len(modes))
    palette = colors(dict.fromkeys(row["provider"] for row in rows))
    for mode, axes in zip(modes, panels, strict=True):
        for provider, color in palette.items():
            own = [row for row in rows if (row["provider"], row["mode"]) == (provider, mode)]
            own.sort(key=lambda row: row["shape"][size])
            if own:
                x = [row["shape"][size] for row in own]
                ours = kind_of(provider) == "ours"
                width, order, style = (2.4, 3, "-") if ours else (1.3, 2, "-")
                if kind_of(provider) == "yardstick":
                    style = "--"
                y = [row[value] for row in own]
                axes.plot(
                    x, y, style, color=color, lw=width, zorder=order, marker="o", ms=4,
                    label=provider,
                )  # fmt: skip
                if value == "ms_p50":
                    low, high = ([row[f"ms_p{p}"] for row in own] for p in (20, 80))
                    axes.fill_between(x, low, high, color=color, alpha=0.12, lw=0)
        axes.set_title(_MODES[mode], fontsize=10)
        axes.set_xlabel(f"{label} ({size})")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({row["shape"][size] for row in rows}))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        _grid(axes)
        if value == "ms_p50":
            axes.set_yscale("log")
            _plain_logs(axes.yaxis)
            axes.set_ylabel("milliseconds, median; shade 20 to 80 %")
        else:
            axes.set_ylabel("MiB")
            axes.set_ylim(bottom=0)
    rest = {key: size_ for key, size_ in rows[0]["shape"].items() if key != size}
    fixed = " ".join(f"{key}{number}" for key, number in rest.items())
    _legend(panels, f"{fixed} {rows[0]['dtype']}")
    return figure


def _roofline(rows: list[Row], env: Row) -> Figure | None:
    """Rate over arithmetic intensity, below what copies and matrix products reached in the run."""
    rows = [{"ceilings": env["ceilings"], **row} for row in rows if row["gbps"] > 0]
    rows = [row for row in rows if row["dtype"] in row["ceilings"]["tflops"]]
    if not rows:
        return None
    dtype, ceilings = rows[0]["dtype"], rows[0]["ceilings"]
    bandwidth, peak = ceilings["gbps"], 1e3 * ceilings["tflops"][dtype]
    rows = [row for row in rows if row["dtype"] == dtype]
    figure, (axes,) = _panels(1, width=5.0)
    palette = colors(dict.fromkeys(row["provider"] for row in rows))
    points = [(1e3 * row["tflops"] / row["gbps"], 1e3 * row["tflops"]) for row in rows]
    knee = peak / bandwidth
    left = min(min(x for x, _ in points) / 2, knee / 4)
    right = max(max(x for x, _ in points) * 2, 4 * knee)
    axes.plot([left, knee, right], [left * bandwidth, peak, peak], color="black", lw=1.5)
    axes.annotate(
        f"matrix product {peak:,.0f} GFLOP/s", (right, peak), xytext=(-4, 4),
        textcoords="offset points", ha="right", fontsize=8,
    )  # fmt: skip
    axes.annotate(
        f"copy {bandwidth:.1f} GB/s", (left, left * bandwidth), xytext=(12, 0),
        textcoords="offset points", fontsize=8,
    )  # fmt: skip
    for row, (x, y) in zip(rows, points, strict=True):
        ours = kind_of(row["provider"]) == "ours"
        axes.plot(
            x, y, _MARKERS[row["mode"]], color=palette[row["provider"]], ms=7 if ours else 5,
            alpha=0.85, mec="white", mew=0.5, zorder=3 if ours else 2,
        )  # fmt: skip
    for provider, color in palette.items():
        axes.plot([], [], "o", color=color, label=provider)
    for mode in dict.fromkeys(row["mode"] for row in rows):
        axes.plot([], [], _MARKERS[mode], color="white", mec="black", label=_MODES[mode])
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_logs(axes.xaxis, axes.yaxis)
    axes.set_xlabel("floating-point operations for a byte that must be moved")
    axes.set_ylabel("GFLOP/s, from the median")
    _grid(axes)
    _legend([axes], f"{dtype}, every size")
    return figure


def _tokens(rows: list[Row]) -> Figure | None:
    """A group of bars for each model and number of sequences."""
    rows = [row for row in rows if "tokens_per_second_p50" in row]
    if not rows:
        return None
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        shape = row["shape"]
        after = f", {shape['prompt']:,} before" if shape.get("prompt", 0) > 16 else ""
        sequences = f"{shape['B']} {'sequence' if shape['B'] == 1 else 'sequences'}"
        name = f"{shape['model']} parameters\n{sequences}{after}"
        groups.setdefault(name, {})[row["provider"]] = row
    figure, panels = _panels(len(groups), width=3.0)
    palette = colors(dict.fromkeys(row["provider"] for row in rows))
    for (name, of_group), axes in zip(groups.items(), panels, strict=True):
        ordered = sorted(of_group.items(), key=lambda item: _KINDS.index(kind_of(item[0])))
        for at, (provider, row) in enumerate(ordered):
            middle, low, high = (row[f"tokens_per_second_p{p}"] for p in (50, 20, 80))
            axes.bar(
                at, middle, color=palette[provider], label=provider, edgecolor="white",
                hatch=_HATCHES.get(provider), yerr=[[middle - low], [high - middle]],
                error_kw={"lw": 1, "ecolor": "#444444"},
            )  # fmt: skip
            text = f"{middle:,.0f}" if middle >= 100 else f"{middle:.1f}"
            axes.annotate(
                text, (at, high), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8
            )
        axes.set_title(name, fontsize=9)
        axes.set_xticks([])
        axes.set_ylim(0, 1.15 * max(row["tokens_per_second_p80"] for _, row in ordered))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("tokens a second, all sequences together")
    _legend(panels, f"{rows[0]['dtype']}; median, lines 20 to 80 %")
    return figure


def _panels(count: int, width: float = 4.2) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * count + 1.8, 4.4), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.04, 1, 0.96))  # type: ignore[union-attr, call-arg]
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _grid(axes: Axes) -> None:
    axes.grid(True, which="major", color="#e5e5e5", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _plain_logs(*axis: XAxis | YAxis) -> None:
    """Numbers as one writes them, at 1, 2 and 5 times powers of ten."""
    for each in axis:
        each.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        # short enough to stand beside each other over four decades
        each.set_major_formatter(
            FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:.10g}")
        )
        each.set_minor_formatter(NullFormatter())


def _legend(panels: list[Axes], title: str) -> None:
    """Each name once, whichever panel it is in, beside the last."""
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(name, handle)
    panels[-1].legend(
        entries.values(), entries.keys(), loc="upper left", bbox_to_anchor=(1.02, 1.0),
        frameon=False, fontsize=8, title=title, title_fontsize=8, alignment="left",
    )  # fmt: skip
