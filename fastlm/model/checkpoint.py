"""Models as folders in Hugging Face's layout: JSON and safetensors, never pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastlm._errors import UserError
from fastlm.model import names
from fastlm.model.config import CausalLMConfig
from fastlm.model.names import HEAD

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_NAMES_SHOWN = 4


class ModelFileError(UserError, ValueError):
    """A model folder, or a file in it, that cannot be used; one line says what and why."""


def save(
    folder: str | os.PathLike[str], config: CausalLMConfig, state: Mapping[str, Tensor]
) -> None:
    """Write ``config.json``, ``generation_config.json`` and ``model.safetensors``.

    Each file appears under its name only when it is complete.  A tied head is left out, as Hugging
    Face does.

    Raises:
        ModelFileError: The weights cannot be written; those that were there stay.
        OSError: The folder cannot be made, or another file not be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    named = names.to_file(config.model_type, state)
    tensors = {name: tensor.detach().contiguous() for name, tensor in named.items()}
    if config.tie_word_embeddings:
        del tensors[HEAD]
    dtype = tensors[names.embedding_name(config.model_type)].dtype
    partial = folder / f".{WEIGHTS}.partial"
    # safetensors would leave a file that its owner alone can read
    partial.touch()
    mode = partial.stat().st_mode
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
    except SafetensorError as error:
        partial.unlink(missing_ok=True)
        raise ModelFileError(f"{folder / WEIGHTS}: cannot be written: {error}") from error
    partial.chmod(mode)
    partial.replace(folder / WEIGHTS)
    values = config.to_dict()
    _write_json(folder / CONFIG, {**values, "dtype": str(dtype).removeprefix("torch.")})
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    tokens = {name: values[name] for name in ids if values[name] is not None}
    _write_json(folder / GENERATION_CONFIG, {"_from_model_config": True, **tokens})


def read_config(folder: str | os.PathLike[str]) -> CausalLMConfig:
    """The config of a model folder; the tokens that end a text are those of its generation config.

    Raises:
        ModelFileError: The file is missing, unreadable, or asks for another model.
    """
    folder = Path(folder)
    values = read_json(folder / CONFIG)
    if (folder / GENERATION_CONFIG).exists():
        generation = read_json(folder / GENERATION_CONFIG)
        if generation.get("eos_token_id") is not None:
            values["eos_token_id"] = generation["eos_token_id"]
    try:
        return CausalLMConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise ModelFileError(f"{folder / CONFIG}: {error}") from error


def load_weights(
    model: nn.Module,
    folder: str | os.PathLike[str],
    config: CausalLMConfig,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
) -> None:
    """Give ``model``, which may be on the meta device, the weights of a folder.

    Args:
        model: Its state dict is what the files must hold, under their own names.
        folder: Model folder.
        config: Of the model.  Where it ties the head to the embedding the files may leave it out.
        dtype: Of the loaded weights; None for that of the embedding in the files.
        device: Of the loaded weights.

    Raises:
        ModelFileError: A file is missing, damaged or a pickle, or tensors are missing, unknown or
            of other shapes.
    """
    folder = Path(folder)
    kind, tied = config.model_type, config.tie_word_embeddings
    embedding = names.embedding_name(kind)
    found: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        found |= _read_tensors(path, device)
    tensors = names.standard(kind, found)
    if tied and HEAD in tensors and embedding in tensors:
        if not torch.equal(tensors[HEAD], tensors[embedding]):
            raise ModelFileError(
                f"{folder}: {HEAD} must equal {embedding}, as the config ties them"
            )
        del tensors[HEAD]
    shapes = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    expected = {name: tensor.shape for name, tensor in names.to_file(kind, shapes).items()}
    if tied:
        del expected[HEAD]
    _check_names(folder, expected, tensors)
    dtype = tensors[embedding].dtype if dtype is None else dtype
    state = {name: tensor.to(dtype) for name, tensor in names.from_file(kind, tensors).items()}
    model.load_state_dict(state, strict=False, assign=True)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ModelFileError: The file is missing or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(f"{path.parent}: {path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelFileError(f"{path}: must hold a JSON object, got {type(values).__name__}")
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).exists():
        names = [WEIGHTS]
    elif (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelFileError(f"{folder / INDEX}: weight_map must be an object")
        names = sorted({str(name) for name in weight_map.values()})
    else:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        if pickles:
            raise ModelFileError(
                f"{folder / pickles[0]}: is a pickle, which can run code when it is opened; "
                f"convert it to {WEIGHTS}"
            )
        raise ModelFileError(f"{folder}: {WEIGHTS} is missing")
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelFileError(
                f"{folder / INDEX}: {name!r} must name a safetensors file beside it"
            )
        if not (folder / name).exists():
            raise ModelFileError(f"{folder}: {name} is missing")
        _check_link(folder, folder / name)
    return [folder / name for name in names]


def _check_link(folder: Path, path: Path) -> None:
    """Refuse links out of the folder, except to the blobs of a Hugging Face cache it is part of."""
    inside = [folder.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(place) for place in inside):
        raise ModelFileError(f"{path}: is a link to outside the folder, {path.resolve()}")


def _read_tensors(path: Path, device: torch.device) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # a copy: what safetensors returns is the file in memory, and changes with it
            return {
                name: file.get_tensor(name).to(device, copy=True, non_blocking=False)
                for name in file.keys()  # noqa: SIM118
            }
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path}: is damaged: {error}") from error


def _check_names(
    folder: Path, expected: Mapping[str, torch.Size], tensors: Mapping[str, Tensor]
) -> None:
    missing = [name for name in expected if name not in tensors]
    unknown = [name for name in tensors if name not in expected]
    if missing:
        raise ModelFileError(f"{folder}: weights are missing: {_listed(missing)}")
    if unknown:
        raise ModelFileError(
            f"{folder}: weights that the config has no place for: {_listed(unknown)}"
        )
    misshapen = [
        f"{name} has {tuple(tensor.shape)}, must have {tuple(expected[name])}"
        for name, tensor in tensors.items()
        if tensor.shape != expected[name]
    ]
    if misshapen:
        raise ModelFileError(f"{folder}: weights of other shapes: {_listed(misshapen)}")


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
