"""``fastlm generate``: continue a prompt, token by token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from fastlm._errors import ArgumentError
from fastlm.cli._flags import parse


@dataclass(frozen=True)
class GenerateOptions:
    """Continue a prompt with a trained model.

    Ends at an end-of-text token, before a stop string, after max_new_tokens, or when prompt and
    continuation fill the context.
    """

    run: Positional[str]
    """Run folder, any model folder in Hugging Face's layout, or a name on the Hugging Face hub."""
    prompt: str
    """Text to continue."""
    max_new_tokens: int = 128
    """At most this many tokens."""
    temperature: float | None = None
    """0 takes the most likely token each time, more makes it bolder. None, as for the next four:
    what the model's generation_config.json says; else 0, or 1 with one of the next three."""
    top_k: int | None = None
    """Draw from the k most likely tokens."""
    top_p: float | None = None
    """Draw from the most likely tokens that together reach this probability."""
    min_p: float | None = None
    """Draw from the tokens at least this fraction as likely as the most likely."""
    repetition_penalty: float | None = None
    """Above 1 makes tokens that were there less likely."""
    logit_bias: dict[int, float] | None = None
    """Token ids and what is added to their logits: 11 2.5 13 -inf."""
    seed: int | None = None
    """Equal seeds give equal text."""
    stop: tuple[str, ...] = ()
    """Strings to end before."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the text, besides those of the model."""
    prompt_lookup_num_tokens: int = 0
    """Guess up to this many tokens ahead where the text repeats itself: faster there, and the same
    text but for rounding."""
    kv_cache: Literal["float", "int8"] = "float"
    """Hold keys and values in the dtype of the weights or in 8 bits."""
    page_size: int = 0
    """Hold them in pages of this many tokens; 0 for all in one piece."""
    weights: Literal["float", "int8", "int4"] = "float"
    """Hold the weights in this many bits: less memory to read for each token."""
    group_size: int = 128
    """Of int4: how many inputs share a step; 32, 64, 128 or 256."""

    def __post_init__(self) -> None:
        # before the model is read; what torch need not judge is judged by generate itself
        if self.temperature is not None and not math.isfinite(self.temperature):
            raise ArgumentError(f"generate: temperature must be finite, got {self.temperature}")


def run(argv: Sequence[str]) -> int:
    options = dataclasses.asdict(parse(GenerateOptions, "generate", argv))
    # here and not above: help needs no torch
    from fastlm.inference.language_model import load

    model = load(
        options.pop("run"), weights=options.pop("weights"), group_size=options.pop("group_size")
    )
    # checks its arguments at once, before there is output to mix with an error
    items = model.stream(**options)
    print(options["prompt"], end="", flush=True)
    for item in items:
        print(item.text, end="", flush=True)
    print()
    return 0
