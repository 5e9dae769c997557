"""The next token's distribution as a picture.  Imports no torch."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fastlm._errors import ArgumentError, MissingPackageError

if TYPE_CHECKING:
    from fastlm.inference.next_token import NextToken

KINDS = (".png", ".svg", ".pdf", ".jpg")
_BAR, _LINE, _INK, _FAINT = "#2f6db3", "#c9ced6", "#1f2430", "#6b7280"


def check(path: str | os.PathLike[str]) -> None:
    """Refuse what :func:`draw` could not, before there is anything to draw.

    Raises:
        ArgumentError: The suffix is none of ``KINDS``.
        MissingPackageError: matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in KINDS:
        raise ArgumentError(f"plot: path must end in {', '.join(KINDS)}, got {str(path)!r}")
    if find_spec("matplotlib") is None:
        raise MissingPackageError("plot needs matplotlib: pip install 'fastlm[plot]'")


def draw(found: NextToken, path: str | os.PathLike[str]) -> None:
    """Draw the bars into ``path``; errors as in :func:`check`."""
    check(path)
    # the figure itself and no pyplot: no global state, no display
    from matplotlib.figure import Figure

    rows = len(found.probs)
    most = max(found.probs)
    figure = Figure(figsize=(7.2, 1.3 + 0.33 * rows), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(range(rows), found.probs, color=_BAR, height=0.74)
    for bar, prob in zip(bars, found.probs, strict=True):
        bar.set_alpha(0.35 + 0.65 * prob / most)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_xlim(0, 1.12 * most)
    labels = [_label(token) for token in found.tokens]
    axes.set_yticks(range(rows), labels, family="monospace", fontsize=11, color=_INK)
    axes.set_xticks([])
    axes.tick_params(length=0, pad=6)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(_LINE)
    for row, prob in enumerate(found.probs):
        text = f"{prob:.1%}" if prob >= 0.001 else f"{prob:.0e}"
        axes.annotate(
            text, (prob, row), (5, 0), textcoords="offset points", va="center",
            fontsize=10, color=_INK,
        )  # fmt: skip
    # no y of our own: the layout makes room only for a title that it places
    figure.suptitle(
        f"Next token after {_quoted(found.prompt)}",
        x=0.02, ha="left", fontsize=13, fontweight="bold", color=_INK,
    )  # fmt: skip
    others = found.vocab_size - rows
    shared = f", {others:,} others share {max(0.0, 1 - found.covered):.1%}" if others else ""
    axes.set_title(
        f"entropy {found.entropy:.2f} nats at temperature {found.temperature:g}{shared}",
        loc="left", fontsize=10, color=_FAINT, pad=8,
    )  # fmt: skip
    figure.savefig(path)


def _label(token: str) -> str:
    """A token on one short line, spaces visible, nothing that would start matplotlib's math."""
    shown = repr(token)[1:-1].replace(" ", "␣")
    return (shown if len(shown) <= 24 else f"{shown[:23]}…").replace("$", r"\$")


def _quoted(prompt: str) -> str:
    shown = repr(prompt)[1:-1].replace("$", r"\$")
    return f"“…{shown[-39:]}”" if len(shown) > 40 else f"“{shown}”"
