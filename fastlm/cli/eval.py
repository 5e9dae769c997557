"""``fastlm eval``: how well a model predicts a text, or finds the labels of rows."""

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
    """Measure the perplexity of a text under a model, or its answers to rows of examples.

    Rows are as fastlm finetune takes them.  Of those with a label, accuracy is how often theirs is
    the label with the largest probability.
    """

    run: Positional[str]
    """Run folder, adapter, any model folder in Hugging Face's layout, or a name on its hub."""
    text: Positional[Path | None] = None
    """File with text, in UTF-8."""
    data: Path | None = None
    """File of rows instead, .jsonl or .csv."""
    text_column: str | None = None
    """Field of a labelled text. None: as when the run was trained, or text."""
    label_column: str | None = None
    """Field of its label. None: likewise, or label."""
    label_prompt: str | None = None
    """What stands between the two. None: likewise, or a new line with label:."""
    weights: Literal["float", "int8", "int4"] = "float"
    """Of a text: measure again with weights held like this."""
    group_size: int = 128
    """Of int4: how many inputs share a step; 32, 64, 128 or 256."""
    window: int | None = None
    """Of a text: tokens that are read together. None: the model's context."""
    json: bool = False
    """Print JSON instead of lines."""

    def __post_init__(self) -> None:
        # before the model is read
        if self.group_size not in (32, 64, 128, 256):
            raise ArgumentError(
                f"eval: group_size must be 32, 64, 128 or 256, got {self.group_size}"
            )
        if (self.text is None) == (self.data is None):
            raise ArgumentError("eval: text or --data must be given, and not both")
        if self.data is not None and (self.weights != "float" or self.window is not None):
            raise ArgumentError("eval: weights and window are of a text, not of --data")


def run(argv: Sequence[str]) -> int:
    options = parse(EvalOptions, "eval", argv)
    if options.data is not None:
        return _rows(options, options.data)
    assert options.text is not None
    try:
        text = options.text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"eval: text must be UTF-8, {options.text} is not: {error}") from None
    found, lines = _by_fastlm(options, text) if _is_ours(options.run) else _by_hf(options, text)
    print(json.dumps(found, indent=1) if options.json else "\n".join(lines))
    return 0


def _is_ours(source: str) -> bool:
    """Whether the model is of a type that CausalLM has; adapters are peft's."""
    # here and not above: help needs no torch
    from fastlm.inference.language_model import ADAPTER
    from fastlm.model.checkpoint import CONFIG, read_json
    from fastlm.model.config_json import MODEL_TYPES
    from fastlm.model.hub import model_folder

    folder = model_folder(source)
    if not (folder / CONFIG).exists():
        return not (folder / ADAPTER).exists()
    return read_json(folder / CONFIG).get("model_type") in MODEL_TYPES


def _by_fastlm(options: EvalOptions, text: str) -> tuple[dict[str, Any], list[str]]:
    from fastlm.inference.language_model import load
    from fastlm.inference.perplexity import exp, mean_loss
    from fastlm.model.quantize import WEIGHTS, quantize

    lm = load(options.run)
    ids = lm.encode(text)
    loss = mean_loss(lm.model, ids, window=options.window)
    found, lines = _told(loss, len(ids) - 1)
    bits = WEIGHTS[options.weights]
    if bits is not None:
        done = quantize(lm.model, bits, group_size=options.group_size)
        after = mean_loss(lm.model, ids, window=options.window)
        found["quantised"] = {
            "weights": options.weights, "loss": after, "perplexity": exp(after), **asdict(done),
        }  # fmt: skip
        lines += [f"perplexity {exp(after):.4f} ({exp(after - loss) - 1:+.2%}) with {done}"]
    return found, lines


def _by_hf(options: EvalOptions, text: str) -> tuple[dict[str, Any], list[str]]:
    from fastlm.finetuning.evaluate import evaluate_text

    if options.weights != "float":
        raise ArgumentError(
            f"eval: weights must be float for a model that fastlm.load does not open, "
            f"got {options.weights!r}"
        )
    return _told(*evaluate_text(options.run, text, window=options.window))


def _told(loss: float, tokens: int) -> tuple[dict[str, Any], list[str]]:
    from fastlm.inference.perplexity import exp

    found = {"tokens": tokens, "loss": loss, "perplexity": exp(loss)}
    return found, [f"perplexity {exp(loss):.4f}, loss {loss:.5f} nats, {tokens:,} tokens"]


def _rows(options: EvalOptions, data: Path) -> int:
    from fastlm.finetuning.evaluate import evaluate_rows

    found = evaluate_rows(
        options.run,
        data,
        text_column=options.text_column,
        label_column=options.label_column,
        label_prompt=options.label_prompt,
    )
    print(json.dumps(found.to_dict(), indent=1) if options.json else found)
    return 0
