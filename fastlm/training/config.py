"""What a training run is told.  Field docstrings are the help of the command line's flags."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_type_hints

from fastlm._errors import ArgumentError, check_text
from fastlm.model.config import MAX_HEAD_DIM

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Tokenizer = Literal["bpe", "char"]
Size = Literal["nano", "micro", "mini", "small"]
OptimizerName = Literal["muon", "adamw"]
Schedule = Literal["linear", "cosine"]
DType = Literal["auto", "float32", "bfloat16"]

Settings = TypeVar("Settings", bound="DataclassInstance")

DEFAULT_VOCAB_SIZE = 1024
"""Of a BPE tokenizer."""

BYTE_LEVEL_MINIMUM = 257
"""A byte-level vocabulary: 256 bytes and the end-of-text token."""


class ConfigError(ArgumentError):
    """A setting is wrong; the message names the field, the allowed range and the value."""


@dataclass(frozen=True)
class TrainConfig:
    """A training run.  Whatever is None follows from ``size``, ``tokenizer`` or ``steps``.

    Raises:
        ConfigError: A value is outside its range; nothing has been written then.
    """

    data: str | None = None
    """Text file, folder of text files, or .jsonl with {"text": ...} rows; without it, the source
    code of Python's own standard library."""
    out: str = "runs/train"
    """Run folder: weights, tokenizer, metrics, plots, checkpoints."""

    tokenizer: Tokenizer = "bpe"
    """Byte-level BPE trained on the corpus, or one token for each character."""
    vocab_size: int | None = None
    """Tokens in the vocabulary; for characters the most there may be. None: 1024, or as many as
    the corpus has characters."""
    validation: float = 0.1
    """Share of the corpus, its end, that is held out."""

    size: Size = "nano"
    """Preset of the five shapes below; any of them can be set on its own."""
    num_hidden_layers: int | None = None
    """Transformer blocks."""
    hidden_size: int | None = None
    """Width of the model."""
    num_attention_heads: int | None = None
    """Query heads."""
    num_key_value_heads: int | None = None
    """Key and value heads; divides the query heads. None: as many."""
    intermediate_size: int | None = None
    """Width inside each feed-forward layer."""
    qk_norm: bool = True
    """Normalise queries and keys; saved as qwen3 with it and as llama without."""
    tie_word_embeddings: bool = False
    """Use the token embedding as output layer too."""
    rope_theta: float = 10_000.0
    """Base of the rotary position frequencies."""

    context: int | None = None
    """Tokens in a training sequence, and the longest the model will read. None: by size."""
    short_context: int | None = None
    """Tokens in a sequence at first, when a model has yet to learn what lies near: divides
    context, and as many more sequences make up a batch. None: a quarter of context, or nearly."""
    short_share: float = 0.8
    """Share of the steps, the first ones, with short sequences."""
    batch_size: int | None = None
    """Sequences of full length in a micro-batch. None: by size."""
    grad_accumulation: int = 1
    """Micro-batches for each optimizer step."""
    steps: int = 420
    """Optimizer steps."""

    optimizer: OptimizerName = "muon"
    """Muon for the matrices of the blocks and AdamW for the rest, or AdamW for everything."""
    lr: float | None = None
    """Peak learning rate: of the blocks' matrices for muon, of everything for adamw. None: 0.0125
    or 0.001."""
    embedding_lr: float | None = None
    """Peak learning rate of embedding, output layer and norms. None: 0.015 for muon, lr for
    adamw."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices, not of norms or embeddings."""
    warmup: int | None = None
    """Steps over which the learning rate rises. None: a fortieth of the steps."""
    decay: float = 1.0
    """Share of the steps, the last ones, over which the learning rate falls to 0."""
    schedule: Schedule = "linear"
    """Shape of the fall."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""

    eval_every: int | None = None
    """Steps between validations. None: a fifth of the steps."""
    eval_tokens: int = 16_384
    """Validation tokens read each time; the last time four million."""
    save_every: int | None = None
    """Steps between checkpoints. None: a quarter of the steps."""
    keep: int = 2
    """Checkpoints kept."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    resume: str | None = None
    """"latest", or the name of a checkpoint in out, to go on from."""
    overwrite: bool = False
    """Replace the run that is in out."""

    seed: int = 1337
    """Seeds the weights and the order of the data."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: DType = "auto"
    """Arithmetic of the matrix products; auto: bfloat16 on a GPU that has it, else float32."""
    compile: bool = False
    """Run the model through torch.compile."""
    prompt: str | None = None
    """What the samples in the report go on from. None: the opening of the held-out text."""

    def __post_init__(self) -> None:
        check_types("train", self)
        _check_ranges(self)
        _check_together(self)

    def resolved(self) -> ResolvedConfig:
        """The same run with no None left among the shapes, rates and intervals."""
        preset = _PRESETS[self.size]
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name, value in preset.items():
            if values[name] is None:
                values[name] = value
        derived = {
            "num_key_value_heads": values["num_attention_heads"],
            "lr": 0.0125 if self.optimizer == "muon" else 0.001,
            "warmup": max(1, self.steps // 40),
            "short_context": _quarter(values["context"]),
            "eval_every": max(1, self.steps // 5),
            "save_every": max(1, self.steps // 4),
        }
        for name, value in derived.items():
            if values[name] is None:
                values[name] = value
        if self.embedding_lr is None:
            values["embedding_lr"] = 0.015 if self.optimizer == "muon" else values["lr"]
        if self.vocab_size is None and self.tokenizer == "bpe":
            values["vocab_size"] = DEFAULT_VOCAB_SIZE
        return ResolvedConfig(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in config.yaml."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Build from plain values; ConfigError for a name that is no field."""
        return built(cls, "train", values)


class ResolvedConfig(TrainConfig):
    """What :meth:`TrainConfig.resolved` returns: these are never None."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    context: int
    short_context: int
    batch_size: int
    lr: float
    embedding_lr: float
    warmup: int
    eval_every: int
    save_every: int


_PRESETS: dict[str, dict[str, int]] = {
    "nano": {
        "num_hidden_layers": 3,
        "hidden_size": 128,
        "num_attention_heads": 2,
        "intermediate_size": 256,
        "context": 256,
        "batch_size": 2,
    },
    "micro": {
        "num_hidden_layers": 6,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "intermediate_size": 768,
        "context": 256,
        "batch_size": 16,
    },
    "mini": {
        "num_hidden_layers": 8,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "intermediate_size": 1536,
        "context": 512,
        "batch_size": 16,
    },
    "small": {
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 2048,
        "context": 1024,
        "batch_size": 16,
    },
}


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may be."""

    low: float
    high: float = math.inf
    low_excluded: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.low_excluded else value >= self.low
        return above and value <= self.high and math.isfinite(value)

    def __str__(self) -> str:
        least = f"{'above' if self.low_excluded else 'at least'} {self.low:g}"
        return f"be {least}" + (f" and at most {self.high:g}" if self.high < math.inf else "")


_CHECKPOINT = re.compile(r"latest|step-\d{6,}(\.replaced)?")
_AT_LEAST_1 = Range(1)
_RANGES = {
    "vocab_size": Range(1, 2**31),
    "validation": Range(0, 0.5, low_excluded=True),
    "num_hidden_layers": _AT_LEAST_1,
    "hidden_size": _AT_LEAST_1,
    "num_attention_heads": _AT_LEAST_1,
    "num_key_value_heads": _AT_LEAST_1,
    "intermediate_size": _AT_LEAST_1,
    "rope_theta": Range(0, low_excluded=True),
    "context": _AT_LEAST_1,
    "short_context": _AT_LEAST_1,
    "short_share": Range(0, 1),
    "batch_size": _AT_LEAST_1,
    "grad_accumulation": _AT_LEAST_1,
    "steps": _AT_LEAST_1,
    "lr": Range(0, 10, low_excluded=True),
    "embedding_lr": Range(0, 10, low_excluded=True),
    "weight_decay": Range(0, 10),
    "warmup": Range(0),
    "decay": Range(0, 1),
    "grad_clip": Range(0),
    "eval_every": _AT_LEAST_1,
    "eval_tokens": _AT_LEAST_1,
    "save_every": _AT_LEAST_1,
    "keep": _AT_LEAST_1,
    "log_every": _AT_LEAST_1,
    "seed": Range(0, 2**63 - 1),
}


def check_types(command: str, config: Any) -> None:
    """Refuse values of a dataclass of settings that its annotations do not allow.

    Raises:
        ConfigError: There is one; the message begins with ``command`` and names it.
    """
    hints = get_type_hints(type(config))
    for name, hint in hints.items():
        value = getattr(config, name)
        kinds = get_args(hint) or (hint,)
        if value is None and type(None) in kinds:
            continue
        if choices := [kind for kind in kinds if isinstance(kind, str)]:
            if value not in choices:
                raise setting_error(command, name, f"be one of {', '.join(choices)}", value)
        elif bool in kinds:
            if not isinstance(value, bool):
                raise setting_error(command, name, "be true or false", value)
        elif int in kinds:
            if not isinstance(value, int) or isinstance(value, bool):
                raise setting_error(command, name, "be a whole number", value)
        elif float in kinds:
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise setting_error(command, name, "be a number", value)
        elif not isinstance(value, str):
            raise setting_error(command, name, "be text", value)


def _check_ranges(config: TrainConfig) -> None:
    for name, allowed in _RANGES.items():
        value = getattr(config, name)
        if value is not None and not allowed.holds(value):
            raise _error(name, str(allowed), value)
    if not config.out:
        raise _error("out", "name a folder", config.out)
    if config.data == "":
        raise _error("data", "name a file or a folder", config.data)
    if config.resume is not None and not _CHECKPOINT.fullmatch(config.resume):
        raise _error("resume", "be latest or a checkpoint such as step-000500", config.resume)
    if config.prompt is not None:
        check_text("train: prompt", config.prompt)
    kind, _, index = config.device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise _error("device", "be auto, cpu, cuda or cuda:N", config.device)


def _check_together(config: TrainConfig) -> None:
    preset = _PRESETS[config.size]
    hidden = config.hidden_size or preset["hidden_size"]
    heads = config.num_attention_heads or preset["num_attention_heads"]
    kv_heads = config.num_key_value_heads or heads
    if config.tokenizer == "bpe" and (config.vocab_size or DEFAULT_VOCAB_SIZE) < BYTE_LEVEL_MINIMUM:
        least = f"be at least {BYTE_LEVEL_MINIMUM} for byte-level BPE (256 bytes and end of text)"
        raise _error("vocab_size", least, config.vocab_size)
    if hidden % heads or hidden // heads % 2 or hidden // heads > MAX_HEAD_DIM:
        width = f"even width, {MAX_HEAD_DIM} at most"
        requirement = f"divide hidden_size {hidden} into heads of {width}"
        raise _error("num_attention_heads", requirement, heads)
    if heads % kv_heads:
        raise _error("num_key_value_heads", f"divide num_attention_heads {heads}", kv_heads)
    context = config.context or preset["context"]
    short = config.short_context or context
    if context % short:
        raise _error("short_context", f"divide context {context}", short)
    if (config.warmup or 0) > config.steps:
        raise _error("warmup", f"be at most steps {config.steps}", config.warmup)
    if config.overwrite and config.resume is not None:
        raise _error("overwrite", "be false to resume", config.overwrite)


def _quarter(context: int) -> int:
    """The divisor of ``context`` closest below a quarter of it; all of it if that is far below."""
    wanted = context // 4
    divisors = (n for n in range(wanted, wanted // 2, -1) if context % n == 0)
    return next(divisors, context)


def setting_error(command: str, name: str, requirement: str, value: object) -> ConfigError:
    return ConfigError(f"{command}: {name} must {requirement}, got {value!r}")


def _error(name: str, requirement: str, value: object) -> ConfigError:
    return setting_error("train", name, requirement, value)


def built(kind: type[Settings], command: str, values: dict[str, Any]) -> Settings:
    """A dataclass of settings from plain values, as they stand in a file.

    Raises:
        ConfigError: A name is no setting, or a value is wrong; the message begins with ``command``.
    """
    names = [f.name for f in dataclasses.fields(kind)]
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(f"{command}: {name!r} is no setting{hint}")
    return kind(**{name: _number_from_yaml(kind, name, value) for name, value in values.items()})


def _number_from_yaml(cls: type[Any], name: str, value: Any) -> Any:
    """YAML 1.1 reads 1e-3 (no point) as text; whoever writes it means a number."""
    if isinstance(value, str) and float in (hint := get_type_hints(cls)[name], *get_args(hint)):
        try:
            return float(value)
        except ValueError:
            return value
    return value
