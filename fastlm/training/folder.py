"""The files of a run, beside its checkpoints."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from fastlm.training import tokenizer as tokenizers_
from fastlm.training.config import DEFAULT_VOCAB_SIZE, ConfigError, ResolvedConfig
from fastlm.training.config_file import CONFIG, TOKENS, read_run, write_config
from fastlm.training.data import Corpus, DataError, Tokens, read_tokens, write_tokens

# settings that a run cannot change when it goes on: what its files hold, and which batch is next
FIXED = (
    *("data", "tokenizer", "vocab_size", "validation", "size"),
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "qk_norm", "tie_word_embeddings", "rope_theta", "optimizer"),
    *("context", "short_context", "batch_size", "grad_accumulation", "seed"),
)


class RunFolder:
    """Paths and small files under ``out``.

    Args:
        path: The run folder; made by :meth:`start`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.tokens = self.path / TOKENS
        self.metrics = self.path / "metrics.jsonl"
        self.config = self.path / CONFIG

    def start(self, config: ResolvedConfig) -> tuple[Tokenizer, Tokens]:
        """Make the folder for a new run, with its tokenizer and its tokens.

        Raises:
            ConfigError: A run is there already, or something that is no folder, or the prompt is
                longer than the context.
            DataError: The corpus cannot be used.
            OSError: The folder cannot be written.
        """
        corpus = Corpus(config.data)
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"train: out must be a folder, got the file {self.path}")
        if self.config.exists() and not config.overwrite:
            raise ConfigError(
                f"train: out must be a folder without a run, got {self.path}; go on with that "
                "run by resume=latest, replace it by overwrite, or name another folder"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        # beside what is there, which stays until the new corpus has proved usable
        fresh = self.path / ".tokens"
        try:
            tokenizer = _train_tokenizer(corpus, config)
            _check_prompt(tokenizer, config)
            write_tokens(
                corpus, tokenizer, fresh, context=config.context, validation=config.validation
            )
            self._clear()
            fresh.rename(self.tokens)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        tokens = read_tokens(self.tokens)
        tokenizers_.save_tokenizer(tokenizer, self.path, config.context)
        self.write_json("env.json", environment())
        # last: what a complete preparation is known by
        self.record(config)
        return tokenizer, tokens

    def reopen(self, config: ResolvedConfig) -> tuple[Tokenizer, Tokens]:
        """The tokenizer and the tokens of the run that is there.

        Raises:
            ConfigError: There is no run, it has another value of a setting that cannot change, or
                the prompt is longer than the context.
            DataError: The token files or the tokenizer are missing or damaged.
        """
        before = read_run(self.path).resolved()
        for name in FIXED:
            old, new = getattr(before, name), getattr(config, name)
            if old != new and not (name == "data" and _same_path(old, new)):
                raise ConfigError(f"train: {name} must stay {old!r} to resume, got {new!r}")
        file = self.path / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_buffer(file.read_bytes())
        except OSError as error:
            raise DataError(f"data: {file} cannot be read: {error.strerror}") from None
        except ValueError:
            raise DataError(f"data: {file} is damaged") from None
        _check_prompt(tokenizer, config)
        return tokenizer, read_tokens(self.tokens)

    def record(self, config: ResolvedConfig) -> None:
        """Write config.yaml, which starts a run of the same settings and replaces none."""
        write_config(dataclasses.replace(config, resume=None, overwrite=False), self.config)

    def _clear(self) -> None:
        """Remove what a run writes, and nothing that somebody put beside it."""
        self.config.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.tokens):
            shutil.rmtree(folder, ignore_errors=True)
        self.metrics.unlink(missing_ok=True)
        for name in ("model.safetensors", "report.md", "loss.png"):
            (self.path / name).unlink(missing_ok=True)

    def keep_metrics_until(self, step: int, *, last_validation: bool = True) -> float:
        """Drop the rows after ``step``, which come again; return the seconds of training until it.

        Without ``last_validation`` also a row that says nothing but a validation at the end.
        """
        rows = [
            row
            for row in self.read_metrics()
            if row["step"] <= step and (last_validation or "loss" in row)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        replace_file(self.metrics, text.encode())
        return rows[-1]["elapsed_s"] if rows else 0.0

    def add_metrics(self, row: dict[str, Any]) -> None:
        with self.metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows; a last line that a crash cut short is left out.

        Raises:
            DataError: Another line is no row.
        """
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_bytes().split(b"\n")
        try:
            rows = [json.loads(line) for line in lines[:-1]]
        except ValueError:
            rows = [None]
        if not all(isinstance(row, dict) and row.keys() >= {"step", "elapsed_s"} for row in rows):
            raise DataError(
                f"data: {self.metrics} is damaged; the run goes on without it, if you remove it"
            )
        return rows

    def write_json(self, name: str, value: Any) -> None:
        replace_file(self.path / name, (json.dumps(value, indent=2) + "\n").encode())


def _same_path(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and Path(one).resolve() == Path(other).resolve()


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that a reader, also after a crash, finds the old bytes or the new ones."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def _train_tokenizer(corpus: Corpus, config: ResolvedConfig) -> Tokenizer:
    if config.tokenizer == "bpe":
        return tokenizers_.train_bpe(corpus, config.vocab_size or DEFAULT_VOCAB_SIZE)
    tokenizer = tokenizers_.train_characters(corpus)
    size = tokenizer.get_vocab_size()
    if config.vocab_size is not None and size > config.vocab_size:
        raise DataError(
            f"data: vocab_size must be at least {size} for the {size - 1} characters of "
            f"{corpus.name} and end of text, got {config.vocab_size}"
        )
    return tokenizer


def _check_prompt(tokenizer: Tokenizer, config: ResolvedConfig) -> None:
    """Before the training rather than after it, when the samples are drawn."""
    length = len(tokenizer.encode(config.prompt or "").ids)
    if length > config.context:
        raise ConfigError(
            f"train: prompt must fit in the context of {config.context} tokens, got {length}"
        )


def environment(*also: str) -> dict[str, Any]:
    """What the numbers of a run depend on, beside its configuration; ``also`` names packages."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu,
        "packages": {
            name: metadata.version(name)
            for name in ("fastlm", "torch", "numpy", "safetensors", "tokenizers", *also)
        },
    }


def _processor() -> str:
    """The processor's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
