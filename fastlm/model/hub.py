"""Models by their name on the Hugging Face hub, downloaded once and then read as folders."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fastlm.model.checkpoint import CONFIG, GENERATION_CONFIG, INDEX, WEIGHTS, ModelFileError

# what we read of a model: no pickle, and no second copy of the weights under another name
FILES = (
    *(CONFIG, GENERATION_CONFIG, WEIGHTS, INDEX, "model-*.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("vocab.json", "merges.txt", "tokenizer.model"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("adapter_config.json", "adapter_model.safetensors"),
)
_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def model_folder(source: str | os.PathLike[str]) -> Path:
    """The folder of a model.

    Args:
        source: A folder; or text that names none here but may be a name on the hub, such as
            ``"Qwen/Qwen3-0.6B"``, whose files are downloaded, or taken from the hub's cache.

    Raises:
        ModelFileError: There is no such folder and no such model, or the hub cannot be reached.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelFileError(f"{folder}: must be a folder, got a file")
    if not isinstance(source, str) or not _NAME.fullmatch(source):
        raise ModelFileError(f"{folder}: no such folder")
    return _downloaded(source)


def _downloaded(name: str) -> Path:
    try:
        # here and not above: most models are folders
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError:
        raise ModelFileError(
            f"{name}: no such folder; models of the Hugging Face hub need huggingface_hub"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(FILES)))
    except errors.GatedRepoError as error:
        reason = "asks for its terms to be accepted there, and for a login"
        raise ModelFileError(f"{name}: no such folder; on the Hugging Face hub {reason}") from error
    except errors.RepositoryNotFoundError as error:
        reason = "nor a model that the Hugging Face hub shows us"
        raise ModelFileError(f"{name}: no such folder, {reason}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        reason = "not in the cache of the Hugging Face hub, which is offline or out of reach"
        advice = (
            f"where there is a network, hf download {name} --local-dir DIR makes a folder of it"
        )
        raise ModelFileError(f"{name}: no such folder, and {reason}; {advice}") from error
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelFileError(
            f"{name}: no such folder, and not to be had from the Hugging Face hub: {reason}"
        ) from error
