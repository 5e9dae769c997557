"""Measure a model of transformers, an adapter among them, on a file of rows or a text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from fastlm._errors import ArgumentError
from fastlm.finetuning.batches import Layout, context_of, max_length_of
from fastlm.finetuning.examples import Encoder
from fastlm.finetuning.folder import SUMMARY
from fastlm.finetuning.measure import Measured, measure, text_loss
from fastlm.finetuning.pretrained import Pretrained, device_of, locate
from fastlm.finetuning.rows import Fields, Rows, read_rows
from fastlm.model.checkpoint import read_json


@dataclass(frozen=True)
class Evaluated:
    """What a model made of a file of rows.

    Attributes:
        measured: Over all rows.
        kind: The fields that the rows have.
        labels: Of each label, how many rows have it and of how many it was the likeliest.
        notes: What the reader of the rows did that a user may want to know.
    """

    measured: Measured
    kind: str
    labels: dict[str, tuple[int, int]]
    notes: tuple[str, ...] = ()

    @property
    def guess(self) -> float:
        """Accuracy of always giving the most frequent label."""
        return max(count for count, _ in self.labels.values()) / self.measured.rows

    def to_dict(self) -> dict[str, Any]:
        found = {**self.measured.to_dict(), "notes": list(self.notes)}
        if self.labels:
            found["most_frequent_label"] = self.guess
            found["labels"] = {
                label: {"rows": count, "right": right}
                for label, (count, right) in self.labels.items()
            }
        return found

    def __str__(self) -> str:
        lines = [*self.notes, str(self.measured)]
        if self.labels:
            lines.append(f"always giving the most frequent label: {self.guess:.1%}")
            width = max(map(len, self.labels))
            for label, (count, right) in self.labels.items():
                share = f"  {right / count:.1%}" if count else ""
                lines.append(f"  {label:<{width}}  {right:,} of {count:,} right{share}")
        return "\n".join(lines)


def evaluate_rows(
    source: str | Path, data: str | Path, *, text_column: str | None = None,
    label_column: str | None = None, label_prompt: str | None = None,
) -> Evaluated:  # fmt: skip
    """Loss over the answers of rows, and accuracy by the likeliest label where they have labels.

    Args:
        source: Model folder, run, adapter, or name on the hub.
        data: ``.jsonl`` or ``.csv`` file of rows as ``fastlm finetune`` takes them.
        text_column: Field of a labelled text.  What is None is as it was in the run that
            ``source`` is of, or else as it is by default; labels and length are the run's too.
        label_column: Field of its label.
        label_prompt: What stands between the two.

    Raises:
        DataError: A row is not as rows must be; the message says which, and what of it.
        ModelFileError: The model cannot be opened.
        MissingPackageError: An adapter needs peft, which is not installed.
        FloatingPointError: The model's logits are not finite.
    """
    found = locate(source)
    told = _told(found)
    given = {"text": text_column, "label": label_column, "label_prompt": label_prompt}
    kept = {"text": "text_column", "label": "label_column", "label_prompt": "label_prompt"}
    fields = Fields()
    for name, value in given.items():
        value = told.get(kept[name]) if value is None else value
        if value is not None:
            fields = replace(fields, **{name: value})
    rows = read_rows(data, fields, found.template, whose=str(source))
    layout = _layout(found)
    length = max_length_of(layout.model, told.get("max_length"))
    labels = sorted({row.label for row in rows.rows if row.label} | set(told.get("labels", ())))
    encoder = Encoder(found.tokenizer, length, labels)
    examples = [example for row in rows.rows for example in encoder.encode(row)]
    has_labels = any(row.label for row in rows.rows)
    measured = measure(layout, examples, encoder.label_ids if has_labels else ())
    return Evaluated(measured, rows.kind, _by_label(rows, encoder, measured), rows.notes)


def evaluate_text(source: str | Path, text: str, *, window: int | None = None) -> tuple[float, int]:
    """The mean loss of a text in nats, and over how many tokens; errors as above.

    Raises:
        ArgumentError: There is nothing to predict, or ``window`` is beyond the model's context.
    """
    found = locate(source)
    ids = found.tokenizer.encode(text, verbose=False)
    if len(ids) < 2:
        raise ArgumentError(f"perplexity: text must have at least two tokens, got {len(ids)}")
    layout = _layout(found)
    context = context_of(layout.model) or len(ids)
    window = context if window is None else window
    if not 0 < window <= context:
        raise ArgumentError(
            f"perplexity: window must be in [1, {context}], the context of the model, got {window}"
        )
    return text_loss(layout, ids, window), len(ids) - 1


def _layout(found: Pretrained) -> Layout:
    model: nn.Module = found.open(device=device_of("auto"))
    return Layout(model.train(False))


def _told(found: Pretrained) -> dict[str, Any]:
    """What the run that a folder is of has said about its rows."""
    path = found.folder / SUMMARY
    return dict(read_json(path)) if path.exists() else {}


def _by_label(rows: Rows, encoder: Encoder, measured: Measured) -> dict[str, tuple[int, int]]:
    if not measured.predicted:
        return {}
    wanted = [row.label for row in rows.rows]
    guessed = [encoder.labels[label] for label in measured.predicted]
    right = Counter(label for label, guess in zip(wanted, guessed, strict=True) if label == guess)
    counts = Counter(wanted)
    return {label: (counts[label], right[label]) for label in encoder.labels}
