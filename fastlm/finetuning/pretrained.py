"""Models of transformers with their tokenizers, as folders hold them: whole, or as an adapter."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from fastlm._errors import MissingPackageError
from fastlm.finetuning.config import COMMAND
from fastlm.hf.verify import first_line
from fastlm.inference.chat import ChatTemplate
from fastlm.inference.language_model import ADAPTER
from fastlm.model.checkpoint import ModelFileError, read_json
from fastlm.model.hub import model_folder
from fastlm.training.config import ConfigError

# what transformers raises about files that it does not understand
_MISTAKES = (
    AttributeError, ImportError, KeyError, OSError, RuntimeError, SafetensorError, TypeError,
    ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class Pretrained:
    """What belongs to a model, which itself is opened when it is needed.

    Attributes:
        source: Folder, or name on the hub, as it was given.
        folder: Where the files are.
        tokenizer: Of transformers.
        template: How the model writes down messages, or None.
    """

    source: str
    folder: Path
    tokenizer: Any
    template: ChatTemplate | None

    @property
    def is_adapter(self) -> bool:
        return is_adapter(self.folder)

    def open(
        self, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> nn.Module:
        """The model, of transformers, or of peft around one where the folder is an adapter.

        Args:
            dtype: Of the weights; None for float32.
            device: None for the CPU.

        Raises:
            ModelFileError: Something is missing, damaged, or not what transformers knows.
            MissingPackageError: An adapter needs peft, which is not installed.
        """
        dtype, device = dtype or torch.float32, device or torch.device("cpu")
        if not self.is_adapter:
            return _open_model(self.folder, self.source, dtype, device)
        base = base_of(self.folder)
        peft = import_peft(f"{self.source} is an adapter, and")
        inner = _open_model(model_folder(base), base, dtype, device)
        try:
            with peft_is_behind():
                model: nn.Module = peft.PeftModel.from_pretrained(inner, self.folder)
        except _MISTAKES as error:
            raise ModelFileError(
                f"{self.source}: the adapter does not fit {base}: {first_line(error)}"
            ) from error
        return model


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter in peft's layout, and no model of its own."""
    return (folder / ADAPTER).exists() and not (folder / "config.json").exists()


def locate(source: str | Path) -> Pretrained:
    """Find a model folder, a run of fastlm, an adapter, or a model of the hub by its name.

    Raises:
        ModelFileError: There is none, or its tokenizer cannot be opened.
    """
    folder = model_folder(source)
    if not is_adapter(folder) and not (folder / "config.json").exists():
        raise ModelFileError(f"{source}: config.json is missing, so this is no model folder")
    told = folder
    if is_adapter(folder) and not (folder / "tokenizer_config.json").exists():
        told = model_folder(base_of(folder))
    return Pretrained(str(source), folder, _open_tokenizer(told, source), ChatTemplate.read(told))


def base_of(folder: Path) -> str:
    """The model that an adapter was made for, as its folder names it.

    Raises:
        ModelFileError: It names none.
    """
    base = read_json(folder / ADAPTER).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelFileError(f"{folder / ADAPTER}: base_model_name_or_path must name a model")
    return base


def import_peft(who: str) -> Any:
    """The package, which is optional.

    Raises:
        MissingPackageError: It is not installed; the message begins with ``who``.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise MissingPackageError(
            f"{who} needs peft, which is not installed: pip install 'fastlm[finetune]'"
        ) from None
    return peft


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Without transformers' progress bars, of which there would be one for each file."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def peft_is_behind() -> Iterator[None]:
    """Without the warning that peft 0.21 uses a name that transformers 5.23 has given up."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        yield


def device_of(name: str) -> torch.device:
    """``"auto"`` is a GPU where there is one.

    Raises:
        ConfigError: The machine has no such GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device, count = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(
            f"{COMMAND}: device must be one of this machine's {count} GPUs or cpu, got {name!r}"
        )
    return device


def _open_model(
    folder: Path, source: str | Path, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    try:
        with without_bars():
            model, told = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, local_files_only=True,
                output_loading_info=True,
            )  # fmt: skip
    except _MISTAKES as error:
        raise ModelFileError(
            f"{source}: transformers cannot open it: {first_line(error)}"
        ) from error
    # transformers would give them random numbers
    if missing := sorted(told["missing_keys"]):
        raise ModelFileError(
            f"{source}: the weights have no {missing[0]}"
            + (f", nor {len(missing) - 1} others" if len(missing) > 1 else "")
        )
    # what adapters and configs name the model by
    model.name_or_path = str(folder.resolve()) if Path(source).is_dir() else str(source)
    opened: nn.Module = model.to(device)
    return opened


def _open_tokenizer(folder: Path, source: str | Path) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (*_MISTAKES, json.JSONDecodeError) as error:
        raise ModelFileError(
            f"{source}: transformers cannot open its tokenizer: {first_line(error)}"
        ) from error
