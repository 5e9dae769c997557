"""Fine-tune a language model to say which package of Python's standard library a snippet is from.

    python examples/classify_modules.py

Everything it needs is on this machine: a model with a million parameters is trained on the standard
library first (``--model`` takes another one), then fine-tuned on snippets of four packages, and
asked about files of these packages that it saw no label of.  Under five minutes on two cores.
"""

from __future__ import annotations

import argparse
import csv
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import fastlm
from fastlm.training.demo import demo_config

PACKAGES = ("asyncio", "email", "multiprocessing", "unittest")
LINES = 4
"""Of a snippet."""

TRAINED, HELD_OUT = 400, 100
"""Snippets of each package."""

HELD_OUT_FILES = 4
"""Every fourth file of a package is asked about and not trained on."""


def snippets(path: Path) -> Iterator[str]:
    """Lines of a file that follow one another, blank ones left out; no line is in two of them."""
    lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    for at in range(0, len(lines) - LINES, LINES):
        yield "\n".join(lines[at : at + LINES])


def rows_of(package: str, generator: random.Random) -> tuple[list[str], list[str]]:
    """Snippets to train on, and others out of other files; none names its package."""
    files = sorted((Path(sysconfig.get_path("stdlib")) / package).glob("*.py"))
    parts: tuple[list[str], list[str]] = [], []
    for number, file in enumerate(files):
        is_held_out = number % HELD_OUT_FILES == 0
        parts[is_held_out].extend(text for text in snippets(file) if package not in text)
    for part in parts:
        generator.shuffle(part)
    return parts[0][:TRAINED], parts[1][:HELD_OUT]


def write_rows(folder: Path) -> tuple[Path, Path]:
    """``train.csv`` and ``held_out.csv``, with the columns text and label."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    found = {package: rows_of(package, generator) for package in PACKAGES}
    paths = folder / "train.csv", folder / "held_out.csv"
    for number, path in enumerate(paths):
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["text", "label"])
            for package, parts in found.items():
                writer.writerows([text, package] for text in parts[number])
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="model folder or name; by default one is trained")
    parser.add_argument("--out", type=Path, default=Path("runs/classify"))
    parser.add_argument("--method", default="full", help="lora, full, last-n-layers or head")
    parser.add_argument("--base-steps", type=int, default=400, help="to train that model for")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()

    trained, held_out = write_rows(options.out)
    base = options.model
    if base is None:
        base = str(options.out / "base")
        print("first, a model of Python's standard library")
        fastlm.train(demo_config(base, prompt="def ", steps=options.base_steps, overwrite=True))
    print("\nthen, which package a snippet is from")
    result = fastlm.finetune(
        fastlm.FinetuneConfig(
            model=base,
            data=str(trained),
            validation_data=str(held_out),
            out=str(options.out / "tuned"),
            method=options.method,
            epochs=options.epochs,
            lr=options.lr,
            label_prompt="\n# from",
            overwrite=True,
        )
    )
    before, after = result.before.accuracy, result.after.accuracy
    print(f"\nright about {before:.0%} of the held-out snippets before, {after:.0%} after")
    print(f"what changed, and what it expects after one of them: {result.out / 'report.md'}")


if __name__ == "__main__":
    main()
