"""report.md of a fine-tuning run: before and after, what changed, what ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastlm.finetuning.config import FinetuneConfig
from fastlm.finetuning.measure import Measured
from fastlm.finetuning.methods import Changes
from fastlm.hf.instance import Routes
from fastlm.hf.report import Report
from fastlm.inference.next_token import NextToken
from fastlm.training.folder import RunFolder, replace_file
from fastlm.training.report import markdown_code


@dataclass(frozen=True)
class Ran:
    """What a training step consists of.

    Attributes:
        optimized: What fastlm.optimize replaced.
        routes: Where attention went in the first batch.
        layout: How examples stand in a batch.
    """

    optimized: Report
    routes: Routes
    layout: str

    def attention(self) -> str:
        calls = Counter(to if why is None else f"{to} ({why})" for _, to, why in self.routes.calls)
        if not calls:
            return "attention by the model's own code"
        return ", ".join(f"{to} in {count} layers" for to, count in calls.items())

    def loss(self) -> str:
        is_fused = any(row.kind == "loss" and row.replaced for row in self.optimized.rows)
        return "loss fused with the last layer" if is_fused else "loss of logits"


@dataclass(frozen=True)
class Told:
    """What a report says beside the settings.

    Attributes:
        data: A sentence on the rows.
        guess: How often the most frequent label would be right, or None.
        before: On held-out rows.
        after: Likewise.
        expected: The next token after one prompt, before and after.
    """

    data: str
    guess: float | None
    before: Measured
    after: Measured
    expected: tuple[NextToken, NextToken]
    changes: Changes
    ran: Ran


def write_report(folder: RunFolder, config: FinetuneConfig, told: Told) -> None:
    name = folder.path.resolve().name
    text = "\n\n".join(
        [
            f"# {name}",
            f"`{config.model}`, fine-tuned by `--method {config.method}` on `{config.data}`.",
            told.data[:1].upper() + told.data[1:] + ".",
            "## Held-out rows, before and after",
            *result_table(told),
            "## The next token, before and after",
            *next_tokens(*told.expected),
            "## What changed",
            *changed_table(told.changes),
            "## What ran",
            f"Of each step: {told.ran.attention()}; {told.ran.loss()}; {told.ran.layout}.",
            markdown_code(str(told.ran.optimized)),
            "## Training",
            loss_table(folder.read_metrics()),
            "## Configuration",
            markdown_code(folder.config.read_text("utf-8"), "yaml"),
            "## Environment",
            markdown_code((folder.path / "env.json").read_text("utf-8"), "json"),
        ]
    )
    replace_file(folder.path / "report.md", (text + "\n").encode())


def result_table(told: Told) -> list[str]:
    """Markdown: accuracy where rows have labels, loss and perplexity of what is learned."""
    before, after = told.before, told.after
    lines = ["| | before | after |", "|:--|--:|--:|"]
    if before.accuracy is not None and after.accuracy is not None:
        lines.append(f"| accuracy | {before.accuracy:.1%} | {after.accuracy:.1%} |")
    lines.append(f"| loss, nats per token | {before.loss:.4f} | {after.loss:.4f} |")
    lines.append(f"| perplexity | {before.perplexity:.5g} | {after.perplexity:.5g} |")
    rows = f"{before.rows:,} held-out rows, {before.tokens:,} tokens to predict."
    if told.guess is not None:
        rows += (
            " The answer is the label with the largest probability; always giving the most "
            f"frequent one would be right in {told.guess:.1%}."
        )
    return [rows, "\n".join(lines)]


def next_tokens(before: NextToken, after: NextToken) -> list[str]:
    """Markdown: the likeliest tokens side by side."""
    lines = ["| before | | after | |", "|:--|--:|:--|--:|"]
    first, then = (list(zip(found.tokens, found.probs, strict=True)) for found in (before, after))
    for (one, p), (other, q) in zip(first, then, strict=True):
        lines.append(f"| {_token(one)} | {p:.1%} | {_token(other)} | {q:.1%} |")
    lines.append(f"| entropy | {before.entropy:.2f} nats | | {after.entropy:.2f} nats |")
    shown = before.prompt if len(before.prompt) <= 400 else f"...{before.prompt[-400:]}"
    return ["After", markdown_code(shown), "\n".join(lines)]


def _token(text: str) -> str:
    shown = repr(text).replace("|", "\\|").replace("`", "'")
    return f"`{shown}`"


def changed_table(changes: Changes) -> list[str]:
    """Markdown: how much, and which."""
    share = changes.parameters / changes.total
    lines = ["| parameter | how many | shape |", "|:--|--:|:--|"]
    for name, count, shape in changes.grouped():
        lines.append(f"| `{name}` | {count} | {' x '.join(map(str, shape))} |")
    return [
        f"{changes.parameters:,} of {changes.total:,} numbers ({share:.2%}), in "
        f"{len(changes.changed):,} of the {changes.trained:,} parameters that were trained; "
        f"{changes.rest()}.",
        "\n".join(lines),
    ]


def loss_table(metrics: Sequence[dict[str, Any]]) -> str:
    lines = ["| step | tokens | loss | learning rate | seconds |", "|--:|--:|--:|--:|--:|"]
    # at most about 20 lines, the last one among them
    every = max(1, len(metrics) // 20)
    for row in metrics[(len(metrics) - 1) % every :: every]:
        lines.append(
            f"| {row['step']} | {row['tokens']:,} | {row['loss']:.4f} | {row['lr']:.2e} "
            f"| {row['elapsed_s']:.1f} |"
        )
    return "\n".join(lines)
