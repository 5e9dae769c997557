"""Checkpoints that are whole or absent, whatever moment the machine stops at.

A checkpoint is a folder ``step-000500`` of files and a MANIFEST.json with their SHA-256.  It is
written under a hidden name: each file is fsynced, the manifest comes last, then the folder gets its
name and its parent is fsynced.  Loading believes nothing that the manifest does not confirm.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fastlm._errors import UserError

MANIFEST = "MANIFEST.json"
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_NAME = re.compile(r"step-(\d{6,})(\.replaced)?")


class CheckpointError(UserError, RuntimeError):
    """No usable checkpoint; the message names the folder and what is wrong with it."""


class CheckpointCorruptError(CheckpointError):
    """A checkpoint's files are not those that were written; the message names the file."""


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over."""


class Files:
    """Every change to the disk that saving makes, so that a test can stop between any two."""

    def make_folder(self, path: Path) -> None:
        path.mkdir(parents=True)

    def write(self, path: Path, data: bytes) -> None:
        path.write_bytes(data)

    def sync(self, path: Path) -> None:
        """Wait until a file's bytes, or a folder's names, are on the disk."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        os.replace(old, new)

    def remove_folder(self, path: Path) -> None:
        shutil.rmtree(path)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: weights and optimizer state by name, and plain values."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def save(folder: Path, checkpoint: Checkpoint, *, keep: int, files: Files | None = None) -> Path:
    """Write ``folder/step-...``, then remove all but the newest ``keep`` up to this step.

    A checkpoint of the same step is replaced, and stays until the new one is safe.  Those of later
    steps go: the run went back to before them, because they were damaged or by resuming by name.

    Raises:
        CheckpointError: A weight or an optimizer value is NaN or infinite; nothing is written.
        OSError: The disk is full, or the folder cannot be written.  Older checkpoints are intact.
    """
    files = files or Files()
    for kind, tensors in (("weight", checkpoint.model), ("optimizer value", checkpoint.optimizer)):
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise CheckpointError(
                    f"checkpoint: step {checkpoint.step} is not saved: {kind} {name} is not finite"
                )
    if not folder.is_dir():
        files.make_folder(folder)
        files.sync(folder.parent)
    for leftover in folder.glob(".step-*"):
        files.remove_folder(leftover)

    final = folder / name_of(checkpoint.step)
    hidden = folder / f".{final.name}"
    _write(hidden, checkpoint, files)
    replaced = final.with_name(f"{final.name}.replaced")
    if final.exists():
        if replaced.exists():
            _remove(replaced, files)
        files.rename(final, replaced)
    files.rename(hidden, final)
    files.sync(folder)

    if replaced.exists():
        _remove(replaced, files)
    names = _names(folder)
    newest = names.index(final.name)
    for name in names[:newest] + names[newest + keep :]:
        _remove(folder / name, files)
    return final


def _write(folder: Path, checkpoint: Checkpoint, files: Files) -> None:
    contents = {
        MODEL: safetensors.torch.save(checkpoint.model, {"format": "pt"}),
        OPTIMIZER: safetensors.torch.save(checkpoint.optimizer),
        STATE: _json({"step": checkpoint.step, **checkpoint.state}),
    }
    contents[MANIFEST] = _manifest(
        {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in contents.items()
        }
    )
    files.make_folder(folder)
    for name, data in contents.items():
        files.write(folder / name, data)
        files.sync(folder / name)
    files.sync(folder)


def _remove(folder: Path, files: Files) -> None:
    """Take the name away first: half a checkpoint never stands under one."""
    hidden = folder.with_name(f".{folder.name}.removed")
    files.rename(folder, hidden)
    files.remove_folder(hidden)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode()


def _manifest(entries: dict[str, Any]) -> bytes:
    """The entries under a digest of their own: no byte of the manifest can change either."""
    return _json({"files": entries, "sha256": hashlib.sha256(_json(entries)).hexdigest()})


def _names(folder: Path) -> list[str]:
    """Newest first; of two for one step the one that was replaced last."""
    found = [match for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    found.sort(key=lambda match: (-int(match[1]), match[2] is not None))
    return [match[0] for match in found]


def load(folder: Path) -> Checkpoint:
    """Read one checkpoint folder.

    Raises:
        CheckpointCorruptError: A file is missing, or its bytes are not those that were written.
    """
    entries = _read_manifest(folder)
    contents = {}
    for name in (MODEL, OPTIMIZER, STATE):
        if name not in entries:
            raise CheckpointCorruptError(f"{folder.name}: {MANIFEST} does not list {name}")
        data = _read(folder, name)
        if len(data) != entries[name]["bytes"]:
            wanted = entries[name]["bytes"]
            raise CheckpointCorruptError(
                f"{folder.name}: {name} has {len(data)} bytes, not {wanted}"
            )
        if hashlib.sha256(data).hexdigest() != entries[name]["sha256"]:
            raise CheckpointCorruptError(
                f"{folder.name}: {name} has another SHA-256 than was written"
            )
        contents[name] = data
    state = json.loads(contents[STATE])
    step = state.pop("step")
    if folder.name.removesuffix(".replaced") != name_of(step):
        raise CheckpointCorruptError(f"{folder.name}: {STATE} is that of {name_of(step)}")
    return Checkpoint(
        step,
        safetensors.torch.load(contents[MODEL]),
        safetensors.torch.load(contents[OPTIMIZER]),
        state,
    )


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        reason = f"{name} cannot be read: {error.strerror}"
        raise CheckpointCorruptError(f"{folder.name}: {reason}") from None


def _read_manifest(folder: Path) -> dict[str, Any]:
    data = _read(folder, MANIFEST)
    try:
        entries = json.loads(data)["files"]
        intact = _manifest(entries) == data
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise CheckpointCorruptError(f"{folder.name}: {MANIFEST} is damaged")
    return entries


def load_named(folder: Path, name: str) -> Checkpoint:
    """Read the checkpoint ``name`` of those in ``folder``.

    Raises:
        CheckpointError: There is none of that name, or it is damaged.
    """
    names = _names(folder)
    if name not in names:
        there = ", ".join(names) or "no checkpoint"
        raise CheckpointError(f"checkpoint: {folder} must hold {name} to resume it, got {there}")
    return load(folder / name)


def load_latest(folder: Path) -> Checkpoint:
    """Read the newest checkpoint that is whole; warn about each newer one that is not.

    Raises:
        CheckpointError: There is none.
    """
    names = _names(folder)
    if not names:
        raise CheckpointError(
            f"checkpoint: {folder} must hold a checkpoint to resume from, got none"
        )
    damages = []
    for name in names:
        try:
            checkpoint = load(folder / name)
        except CheckpointCorruptError as error:
            damages.append(str(error))
            continue
        for damage in damages:
            warnings.warn(
                f"checkpoint {damage}; using {name} instead", CheckpointWarning, stacklevel=2
            )
        return checkpoint
    raise CheckpointError(
        f"checkpoint: every checkpoint in {folder} is damaged: {'; '.join(damages)}"
    )
