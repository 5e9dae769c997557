"""How a model's makers say that its tokens are to be drawn."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from fastlm.model.checkpoint import GENERATION_CONFIG, ModelFileError, read_json
from fastlm.model.sampling import Sampling

_FILTERS = ("top_k", "top_p", "min_p")


def read_sampling(folder: str | os.PathLike[str]) -> Sampling:
    """The sampling of Hugging Face's ``generation_config.json``; greedy where there is none.

    Without ``do_sample`` the file's temperature, top_k, top_p and min_p are not looked at, as in
    transformers; with it, temperature is 1 where the file has none.

    Raises:
        ModelFileError: The file cannot be read, or a value in it is impossible.
    """
    path = Path(folder) / GENERATION_CONFIG
    if not path.exists():
        return Sampling()
    values = read_json(path)
    options = {"repetition_penalty": values.get("repetition_penalty")}
    if values.get("do_sample"):
        temperature = values.get("temperature")
        options["temperature"] = 1.0 if temperature is None else temperature
        options |= {name: values.get(name) for name in _FILTERS}
    try:
        return Sampling(**options)
    except (TypeError, ValueError) as error:
        raise ModelFileError(f"{path}: {error}") from error


def chosen(defaults: Sampling, **options: Any) -> Sampling:
    """``defaults`` but for the options that are not None.

    Raises:
        ArgumentError: A value is out of range or not a number; the message names it.
    """
    given = {name: value for name, value in options.items() if value is not None}
    return dataclasses.replace(defaults, **given)
