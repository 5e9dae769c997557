"""``fastlm eval``: how well a model predicts a text, and how much worse with quantised weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from fastlm._errors import ArgumentError
from fastlm.cli._flags import parse


@dataclass(frozen=True)
class EvalOptions:
    """Measure the perplexity of a text under a model."""

    run: Positional[str]
    """Run folder, any model folder in Hugging Face's layout, or a name on the Hugging Face hub."""
    text: Positional[Path]
    """File with text, in UTF-8."""
    weights: Literal["float", "int8", "int4"] = "float"
    """Measure again with weights held like this."""
    group_size: int = 128
    """Of int4: how many inputs share a step; 32, 64, 128 or 256."""
    window: int | None = None
    """Tokens that are read together. None: the model's context."""
    json: bool = False
    """Print JSON instead of lines."""

    def __post_init__(self) -> None:
        # before the model is read
        if self.group_size not in (32, 64, 128, 256):
            raise ArgumentError(
                f"eval: group_size must be 32, 64, 128 or 256, got {self.group_size}"
            )


def run(argv: Sequence[str]) -> int:
    options = parse(EvalOptions, "eval", argv)
    # here and not above: help needs no torch
    from fastlm.inference.language_model import load
    from fastlm.inference.perplexity import exp, mean_loss
    from fastlm.model.quantize import WEIGHTS, quantize

    try:
        text = options.text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"eval: text must be UTF-8, {options.text} is not: {error}") from None
    lm = load(options.run)
    ids = lm.encode(text)
    loss = mean_loss(lm.model, ids, window=options.window)
    found: dict[str, Any] = {"tokens": len(ids) - 1, "loss": loss, "perplexity": exp(loss)}
    lines = [f"perplexity {exp(loss):.4f}, loss {loss:.5f} nats, {len(ids) - 1:,} tokens"]
    bits = WEIGHTS[options.weights]
    if bits is not None:
        done = quantize(lm.model, bits, group_size=options.group_size)
        after = mean_loss(lm.model, ids, window=options.window)
        found["quantised"] = {
            "weights": options.weights, "loss": after, "perplexity": exp(after), **asdict(done),
        }  # fmt: skip
        lines += [f"perplexity {exp(after):.4f} ({exp(after - loss) - 1:+.2%}) with {done}"]
    print(json.dumps(found, indent=1) if options.json else "\n".join(lines))
    return 0
