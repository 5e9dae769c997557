"""report.md and loss.png: what a run was, how it went, and what the model says."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastlm.inference.language_model import LanguageModel
from fastlm.training.config import ResolvedConfig
from fastlm.training.folder import RunFolder, replace_file

SAMPLE_TOKENS = 200
TEMPERATURES = (0.0, 0.8)
NEXT_TOKENS = 10
PROMPT_CHARACTERS = 48

TRAIN_COLOUR, VALIDATION_COLOUR = "#8fb3d9", "#c1440e"


def opening(text: str) -> str:
    """A default prompt: the first line that says something, or the beginning of it."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[0][:PROMPT_CHARACTERS].rstrip() if lines else text[:1]


def write_report(
    folder: RunFolder, config: ResolvedConfig, lm: LanguageModel, prompt: str
) -> list[str]:
    """Write report.md and, where matplotlib is installed, loss.png; return their names.

    A prompt longer than half the context loses its beginning, so that a sample fits after it.
    """
    room = max(1, lm.model.config.max_position_embeddings // 2)
    prompt = lm.decode(lm.encode(prompt)[-room:])
    metrics = folder.read_metrics()
    # resolved: a run in the folder that one stands in has a name too
    name = folder.path.resolve().name
    title = f"{name}: {config.data or 'Python standard library'}"
    drawn = plot_losses(metrics, folder.path / "loss.png", title)
    text = "\n\n".join(
        [
            f"# {name}",
            loss_table(metrics),
            "![Training and validation loss](loss.png)" if drawn else "No loss.png: no matplotlib.",
            "## Samples",
            *samples(lm, prompt),
            "## Next token",
            *next_tokens(lm, prompt),
            "## Configuration",
            markdown_code(folder.config.read_text("utf-8"), "yaml"),
            "## Environment",
            markdown_code((folder.path / "env.json").read_text("utf-8"), "json"),
        ]
    )
    replace_file(folder.path / "report.md", (text + "\n").encode())
    return ["report.md", "loss.png"] if drawn else ["report.md"]


def samples(lm: LanguageModel, prompt: str) -> list[str]:
    """Markdown: the prompt continued, once at each temperature."""
    parts = []
    for temperature in TEMPERATURES:
        text = lm.generate(prompt, SAMPLE_TOKENS, temperature=temperature, seed=0)
        how = f"at temperature {temperature}" if temperature else "taking the most likely token"
        parts += [f"{how.capitalize()}, after `{prompt!r}`:", markdown_code(prompt + text)]
    return parts


def next_tokens(lm: LanguageModel, prompt: str) -> list[str]:
    """Markdown: what the model expects after the prompt."""
    found = lm.next_token(prompt, NEXT_TOKENS)
    lines = ["| token | probability |", "|:--|--:|"]
    for token, probability in zip(found.tokens, found.probs, strict=True):
        shown = repr(token).replace("|", "\\|").replace("`", "'")
        lines.append(f"| `{shown}` | {probability:.1%} |")
    return [f"After `{prompt!r}` (entropy {found.entropy:.2f} nats):", "\n".join(lines)]


def plot_losses(metrics: Sequence[dict[str, Any]], path: Path, title: str) -> bool:
    """Draw training and validation loss over steps; False, and no file, without matplotlib."""
    if find_spec("matplotlib") is None:
        return False
    # the figure itself and no pyplot: no global state, no display
    from matplotlib.figure import Figure

    train = [(row["step"], row["loss"]) for row in metrics if "loss" in row]
    held_out = [(row["step"], row["val_loss"]) for row in metrics if "val_loss" in row]
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*train, strict=True), color=TRAIN_COLOUR, linewidth=1.5, label="training")
    axes.plot(
        *zip(*held_out, strict=True),
        color=VALIDATION_COLOUR,
        linewidth=2,
        marker="o",
        markersize=4,
        label="validation (held-out text)",
    )
    step, loss = held_out[-1]
    axes.annotate(
        f"{loss:.3f}",
        (step, loss),
        xytext=(0, 8),
        textcoords="offset points",
        ha="right",
        color=VALIDATION_COLOUR,
        fontweight="bold",
    )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.set_title(title, loc="left")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
    return True


def loss_table(metrics: Sequence[dict[str, Any]]) -> str:
    """Markdown: the validated steps with the training loss at each."""
    lines = ["| step | tokens | training loss | validation loss | bits per byte | seconds |"]
    lines.append("|---:|---:|---:|---:|---:|---:|")
    tokens, loss = 0, float("nan")
    for row in metrics:
        tokens, loss = row.get("tokens", tokens), row.get("loss", loss)
        if "val_loss" in row:
            lines.append(
                f"| {row['step']} | {tokens:,} | {loss:.4f} | {row['val_loss']:.4f} "
                f"| {row['val_bpb']:.4f} | {row['elapsed_s']:.1f} |"
            )
    return "\n".join(lines)


def markdown_code(text: str, language: str = "text") -> str:
    """A fenced block, whatever backticks the text has."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
