"""The files of a fine-tuning run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from fastlm.finetuning.config import COMMAND, FinetuneConfig
from fastlm.finetuning.pretrained import without_bars
from fastlm.training.config import ConfigError
from fastlm.training.config_file import CONFIG, read_settings, write_config
from fastlm.training.folder import RunFolder, environment

SUMMARY = "finetune.json"
# what a run writes, and nothing that somebody put beside it
_WRITTEN = (
    "adapter_*", "model*.safetensors", "model.safetensors.index.json", "config.json",
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "chat_template.jinja", "metrics.jsonl", "report.md", "env.json",
    SUMMARY,
)  # fmt: skip
_NEW = ".new"
_FOLDERS = ("checkpoints", "additional_chat_templates", _NEW)

# what a run cannot change when it goes on
FIXED = (
    "model", "method", "lora_r", "lora_alpha", "lora_dropout", "last_n_layers", "text_column",
    "label_column", "label_prompt", "validation", "max_length", "epochs", "steps", "batch_size",
    "seed",
)  # fmt: skip


def read_run(out: str | Path) -> FinetuneConfig:
    """The settings of the run in a folder, to go on with it.

    Raises:
        ConfigError: There is none.
    """
    file = Path(out) / CONFIG
    if not file.exists():
        raise ConfigError(f"{COMMAND}: out must hold the run to resume, got {out} without one")
    return FinetuneConfig.from_dict(
        {**read_settings(file, COMMAND), "resume": True, "out": str(out)}
    )


def check_out(config: FinetuneConfig) -> None:
    """Refuse an ``out`` that does not suit the run, before anything else is done.

    Raises:
        ConfigError: It is no folder, or holds a run, or files of no run that ours would take the
            place of; or to go on with a run, a setting is another.
    """
    path = Path(config.out)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{COMMAND}: out must be a folder, got the file {path}")
    if config.resume:
        before = read_run(path)
        for name in FIXED:
            old, new = getattr(before, name), getattr(config, name)
            if old != new:
                raise ConfigError(f"{COMMAND}: {name} must stay {old!r} to resume, got {new!r}")
    elif (path / CONFIG).exists() and not config.overwrite:
        raise ConfigError(
            f"{COMMAND}: out must be a folder without a run, got {path}; go on with that run by "
            "resume, replace it by overwrite, or name another folder"
        )
    elif path.is_dir() and Path(config.model).is_dir() and path.samefile(config.model):
        raise ConfigError(f"{COMMAND}: out must be another folder than the model's, got {path}")
    elif not _is_run(path) and (names := [found.name for found in _written(path)]):
        raise ConfigError(
            f"{COMMAND}: out must be a folder without other files of the names that a run writes, "
            f"got {path}, which holds {', '.join(names[:3])}{', ...' if names[3:] else ''}"
        )


def start(config: FinetuneConfig, folder: RunFolder) -> None:
    """Make the folder, or clear it of the run that :func:`check_out` has found there."""
    folder.path.mkdir(parents=True, exist_ok=True)
    if not config.resume:
        for path in _written(folder.path):
            if path.is_dir():
                shutil.rmtree(path)
            elif path != folder.config:
                path.unlink()
    # first, and over the old one: without it the other files would be those of no run
    write_config(_without_resume(config), folder.config)
    also = ("transformers", "peft") if config.method == "lora" else ("transformers",)
    folder.write_json("env.json", environment(*also))


def _is_run(path: Path) -> bool:
    """Whether a run of ours is in a folder, as its settings show."""
    try:
        FinetuneConfig.from_dict(read_settings(path / CONFIG, COMMAND))
    except ConfigError:
        return False
    return True


def _written(path: Path) -> list[Path]:
    """What is in a folder under the names of what a run writes; a user's folders are not."""
    files = {
        found for name in (*_WRITTEN, CONFIG) for found in path.glob(name) if not found.is_dir()
    }
    return sorted(files | {path / name for name in _FOLDERS if (path / name).is_dir()})


def _without_resume(config: FinetuneConfig) -> FinetuneConfig:
    values = {**config.to_dict(), "resume": False, "overwrite": False}
    return FinetuneConfig.from_dict(values)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder to write files into, which then take their places in ``folder``, whole each.

    Until all are written and on the disk, those that were there stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / _NEW
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
        written = sorted(fresh.iterdir())
        for path in (*fresh.rglob("*"), fresh):
            _sync(path)
        for path in written:
            if path.is_dir():
                # of chat templates; only an empty folder can be replaced
                shutil.rmtree(folder / path.name, ignore_errors=True)
            os.replace(path, folder / path.name)
        _sync(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_model(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """An adapter in peft's layout, or a whole model in Hugging Face's, with its tokenizer."""
    with replacing(folder) as fresh, without_bars():
        model.save_pretrained(fresh)  # type: ignore[operator]
        tokenizer.save_pretrained(fresh)
        # peft's form of a model card, with nothing filled in
        (fresh / "README.md").unlink(missing_ok=True)
