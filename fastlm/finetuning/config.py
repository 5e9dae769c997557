"""What a fine-tuning run is told.  Field docstrings are the help of the command line's flags."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from tyro.conf import Positional

from fastlm._errors import check_text
from fastlm.training.config import DType, Range, built, check_types, setting_error

Method = Literal["lora", "full", "last-n-layers", "head"]

COMMAND = "finetune"
# peak learning rates: adapters begin at nothing, whole models where they were left
_LEARNING_RATES: dict[str, float] = {
    "lora": 5e-4, "full": 3e-5, "last-n-layers": 1e-4, "head": 1e-3,
}  # fmt: skip


@dataclass(frozen=True)
class FinetuneConfig:
    """Train a model of Hugging Face transformers further, on examples.

    Rows of the data are one of these: text and label; prompt and completion; instruction, output
    and perhaps input; messages, which the model's chat template writes down; or text alone.  The
    loss is on labels, completions, outputs and the assistant's messages, or on all of a text.

    Raises:
        ConfigError: A value is outside its range; nothing has been written then.
    """

    model: Positional[str]
    """Folder in Hugging Face's layout, a run of fastlm train among them, or a name on the hub."""
    data: str
    """File of rows: .jsonl, one object on each line, or .csv with a line of names."""
    out: str = "runs/finetune"
    """Run folder: adapter or model, tokenizer, metrics, report, checkpoint."""

    method: Method = "lora"
    """Train an adapter of low rank beside every linear layer; or all weights; or those of the last
    blocks; or those of the output layer."""
    lora_r: int = 16
    """Rank of the adapter."""
    lora_alpha: float = 32.0
    """The adapter counts this much, over its rank."""
    lora_dropout: float = 0.0
    """Dropout before the adapter."""
    last_n_layers: int = 2
    """How many blocks --method last-n-layers trains."""

    text_column: str = "text"
    """Field of a labelled text."""
    label_column: str = "label"
    """Field of its label."""
    label_prompt: str = "\nlabel:"
    """What stands between a text and a space with its label."""
    validation: float = 0.1
    """Share of the rows that is held out, drawn at random."""
    validation_data: str | None = None
    """File of rows to hold out instead."""
    eval_rows: int = 500
    """Held-out rows that are measured before and after, at most."""
    max_length: int | None = None
    """Tokens of an example; longer ones lose the beginning of their prompt, and texts are split.
    None: 1024, or the model's context if that is shorter."""

    epochs: int = 1
    """How often each row is trained on."""
    steps: int | None = None
    """Optimizer steps instead of epochs."""
    batch_size: int = 8
    """Examples of an optimizer step."""
    grad_accumulation: int = 1
    """Parts in which they are computed, to save memory."""
    lr: float | None = None
    """Peak learning rate. None: 5e-4 for lora, 3e-5 for full, 1e-4 for last-n-layers, 1e-3 for
    head."""
    warmup: int | None = None
    """Steps over which the learning rate rises, before it falls to 0. None: a tenth of the
    steps."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""

    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    save_every: int | None = None
    """Steps between checkpoints. None: only at the end and when stopped."""
    resume: bool = False
    """Go on with the run that is in out, with its own settings."""
    overwrite: bool = False
    """Replace the run that is in out."""

    prompt: str | None = None
    """What the report shows the next token after. None: the prompt of the first held-out row."""
    seed: int = 1337
    """Seeds the adapter, the order of the rows and which are held out."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: DType = "auto"
    """Of weights that are not trained; trained ones are float32. auto: bfloat16 on a GPU that has
    it, else float32."""

    def __post_init__(self) -> None:
        check_types(COMMAND, self)
        for name, allowed in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not allowed.holds(value):
                raise setting_error(COMMAND, name, str(allowed), value)
        for name in ("model", "data", "out", "text_column", "label_column"):
            if not getattr(self, name):
                raise setting_error(COMMAND, name, "not be empty", "")
        if self.text_column == self.label_column:
            raise setting_error(
                COMMAND, "label_column", "be another field than text_column", self.label_column
            )
        for name in ("label_prompt", "prompt"):
            check_text(f"{COMMAND}: {name}", getattr(self, name) or "")
        kind, _, index = self.device.partition(":")
        if kind not in ("auto", "cpu", "cuda") or (
            index and not (kind == "cuda" and index.isdigit())
        ):
            raise setting_error(COMMAND, "device", "be auto, cpu, cuda or cuda:N", self.device)
        if self.overwrite and self.resume:
            raise setting_error(COMMAND, "overwrite", "be false to resume", self.overwrite)

    @property
    def peak_lr(self) -> float:
        return _LEARNING_RATES[self.method] if self.lr is None else self.lr

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in config.yaml."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FinetuneConfig:
        """Build from plain values; ConfigError for a name that is no field."""
        return built(cls, COMMAND, values)


_AT_LEAST_1 = Range(1)
_RANGES = {
    "lora_r": _AT_LEAST_1,
    "lora_alpha": Range(0, low_excluded=True),
    "lora_dropout": Range(0, 0.9),
    "last_n_layers": _AT_LEAST_1,
    "validation": Range(0, 0.9, low_excluded=True),
    "eval_rows": _AT_LEAST_1,
    "max_length": Range(2),
    "epochs": _AT_LEAST_1,
    "steps": _AT_LEAST_1,
    "batch_size": _AT_LEAST_1,
    "grad_accumulation": _AT_LEAST_1,
    "lr": Range(0, 10, low_excluded=True),
    "warmup": Range(0),
    "weight_decay": Range(0, 10),
    "grad_clip": Range(0),
    "log_every": _AT_LEAST_1,
    "save_every": _AT_LEAST_1,
    "seed": Range(0, 2**63 - 1),
}
