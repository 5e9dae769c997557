"""``fastlm next``: the distribution of the next token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from fastlm.cli._flags import parse
from fastlm.inference import picture

if TYPE_CHECKING:
    from fastlm.inference.next_token import NextToken


@dataclass(frozen=True)
class NextOptions:
    """Show the distribution of the next token after a prompt."""

    run: Positional[str]
    """Run folder, any model folder in Hugging Face's layout, or a name on the Hugging Face hub."""
    prompt: Positional[str]
    """Text before the token."""
    top_k: int = 10
    """How many of the most likely tokens to show."""
    temperature: float = 1.0
    """Divides the logits; 1 shows what the model believes."""
    plot: str | None = None
    """Also draw the bars into this file: .png, .svg, .pdf or .jpg."""
    json: bool = False
    """Print JSON instead of bars."""
    weights: Literal["float", "int8", "int4"] = "float"
    """Hold the weights in this many bits."""
    group_size: int = 128
    """Of int4: how many inputs share a step; 32, 64, 128 or 256."""

    def __post_init__(self) -> None:
        # before the model is read
        if self.plot is not None:
            picture.check(self.plot)


def run(argv: Sequence[str]) -> int:
    options = parse(NextOptions, "next", argv)
    # here and not above: help needs no torch
    from fastlm.inference.language_model import load

    model = load(options.run, weights=options.weights, group_size=options.group_size)
    found = model.next_token(options.prompt, options.top_k, options.temperature)
    if options.plot is not None:
        found.plot(options.plot)
    print(json.dumps(found.to_dict(), indent=1) if options.json else described(found))
    return 0


def described(found: NextToken) -> str:
    """Prompt, bars and summary."""
    return (
        f"next token after {found.prompt!r}\n{found.bars()}\n"
        f"temperature {found.temperature:g}, entropy {found.entropy:.2f} nats, "
        f"{len(found.ids)} of {found.vocab_size:,} tokens cover {found.covered:.1%}"
    )
