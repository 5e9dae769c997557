"""Run folders as others take them: an adapter merged into its model, or the files of a model."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastlm._errors import ArgumentError, UserError
from fastlm.finetuning.folder import SUMMARY, replacing, write_model
from fastlm.finetuning.pretrained import Pretrained, base_of, locate
from fastlm.model.checkpoint import CONFIG, read_json
from fastlm.model.hub import FILES, model_folder
from fastlm.training.config_file import CONFIG as RUN
from fastlm.training.config_file import TOKENS

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# of the tokens on which a merged model is compared
_TRIED = 16


class ExportError(UserError, RuntimeError):
    """What was written is not what it was made of; the message names the folder."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        out: The folder.
        files: Names in it.
        dtype: Of the weights of a merged model, or None.
        error: By how much its log-probabilities of the next token differ from those of model and
            adapter at most, over a few random tokens; None where nothing was merged.
    """

    out: Path
    files: tuple[str, ...]
    dtype: str | None = None
    error: float | None = None


def export(
    source: str | Path, out: str | Path | None = None, *, merge: bool = False, dtype: str = "auto"
) -> Exported:
    """Write a folder that needs nothing of fastlm, and a merged one nothing of peft.

    Args:
        source: Run or model folder, or an adapter.
        out: A new or empty folder; None for ``merged`` or ``export`` inside ``source``, which then
            must be a run folder.
        merge: Add an adapter to the weights of its model.  The sums are taken in float32, and
            afterwards the folder is opened and compared.
        dtype: Of the merged weights: float32, bfloat16 or float16; ``"auto"`` is that of the model.

    Raises:
        ArgumentError: ``out`` has something in it, or is needed, or there is nothing to merge.
        ModelFileError: The model cannot be opened.
        MissingPackageError: Merging needs peft, which is not installed.
        ExportError: The folder does not open as what was written.
        OSError: The folder cannot be written.
    """
    found = locate(source)
    if merge and not found.is_adapter:
        raise ArgumentError(f"export: merge must have an adapter, and {source} is a whole model")
    if dtype != "auto" and dtype not in _DTYPES:
        raise ArgumentError(f"export: dtype must be auto or {', '.join(_DTYPES)}, got {dtype!r}")
    if out is None and not _is_run(Path(source)):
        raise ArgumentError(f"export: out must be given for {source}, which is no run folder")
    folder = found.folder / ("merged" if merge else "export") if out is None else Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArgumentError(f"export: out must be a new or an empty folder, got {folder}")
    if merge:
        return _merged(found, folder, dtype)
    with replacing(folder) as fresh:
        for pattern in FILES:
            for path in found.folder.glob(pattern):
                copy = fresh / path.relative_to(found.folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
    return Exported(folder, _names(folder))


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run of ``fastlm finetune`` or ``fastlm train``."""
    return (folder / SUMMARY).exists() or ((folder / RUN).exists() and (folder / TOKENS).is_dir())


def _merged(found: Pretrained, folder: Path, dtype: str) -> Exported:
    model = found.open()
    ids = torch.arange(_TRIED)[None] * 7919 % model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    before = _logprobs(model, ids)
    merged: nn.Module = model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    if dtype == "auto":
        file = read_json(model_folder(base_of(found.folder)) / CONFIG)
        dtype = str(file.get("dtype") or file.get("torch_dtype") or "float32")
    wanted = _DTYPES.get(dtype, torch.float32)
    write_model(merged.to(wanted), found.tokenizer, folder)
    # as anyone will open it
    reopened = locate(folder).open()
    written, read = merged.state_dict(), reopened.state_dict()
    if written.keys() != read.keys() or any(
        not torch.equal(written[name].float(), read[name]) for name in written
    ):
        raise ExportError(f"export: what {folder} opens as is not the model that was written there")
    error = float((_logprobs(reopened, ids) - before).abs().max())
    if not math.isfinite(error):
        raise ExportError(
            f"export: {folder} gives log-probabilities that are not finite: "
            f"{str(wanted).removeprefix('torch.')} may hold too small a range for this model, or "
            "the adapter is damaged"
        )
    return Exported(folder, _names(folder), str(wanted).removeprefix("torch."), error)


@torch.no_grad()
def _logprobs(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model.train(False)(input_ids=ids).logits
    return logits.double().log_softmax(-1)


def _names(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir()))
