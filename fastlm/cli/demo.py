"""``fastlm demo``: everything once, on a machine without a GPU, in minutes."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastlm.cli._flags import parse
from fastlm.cli.next import described
from fastlm.training.demo import STEPS, demo_config

FOLDER = "runs/demo"


@dataclass(frozen=True)
class DemoOptions:
    """Train a small model, sample from it, and show the distribution of its next token.

    Its text is the source code of Python's own standard library, which is on every machine.
    """

    data: str | None = None
    """Text to train on instead: a file, a folder of text files, or .jsonl."""
    out: str = FOLDER
    """Run folder; the default one is replaced, any other must hold no run."""
    steps: int = STEPS
    """Optimizer steps."""
    prompt: str = "def __init__(self, "
    """Text to go on from."""


def run(argv: Sequence[str]) -> int:
    options = parse(DemoOptions, "demo", argv)
    config = demo_config(
        options.out,
        data=options.data,
        prompt=options.prompt,
        steps=options.steps,
        overwrite=options.out == FOLDER,
    )
    # here and not above: help needs no torch
    from fastlm.inference.language_model import load
    from fastlm.training import train

    started = time.monotonic()
    train(config)
    model = load(options.out)

    print("\nsample, temperature 0.8\n")
    print(options.prompt, end="", flush=True)
    for item in model.stream(options.prompt, 200, temperature=0.8, seed=1):
        print(item.text, end="", flush=True)

    found = model.next_token(options.prompt)
    print(f"\n\n{described(found)}")
    pictures = [Path(options.out) / name for name in ("loss.png", "next.png")]
    if importlib.util.find_spec("matplotlib"):
        found.plot(pictures[1])
    written = [str(path) for path in pictures if path.exists()]
    print(f"\n{time.monotonic() - started:.0f} s; pictures: {', '.join(written) or 'none'}")
    print("go on with:")
    print(f'  fastlm next {options.out} "import " --top-k 5')
    print(f'  fastlm generate {options.out} --prompt "class " --temperature 0.8')
    print("  fastlm train --data my_text_folder --out runs/mine")
    return 0
