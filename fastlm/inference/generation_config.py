"""How a model's makers say that its tokens are to be drawn."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastlm._errors import ArgumentError
from fastlm.model.checkpoint import GENERATION_CONFIG, ModelFileError, read_json
from fastlm.model.sampling import Sampling

# what do_sample is about, and what transformers takes for each that the file does not say
_DRAWING = {"temperature": 1.0, "top_k": 50, "top_p": None, "min_p": None}


@dataclasses.dataclass(frozen=True)
class FolderSampling:
    """What Hugging Face's ``generation_config.json`` says, judged value by value where it holds.

    So a value that is impossible stands in nobody's way who does not use it.  Null is as if it were
    not there.

    Attributes:
        path: Of the file.
        values: In it.
    """

    path: Path
    values: Mapping[str, Any]

    def under(self, given: Sampling) -> Sampling:
        """What ``given`` says, and the file where that says nothing.

        As in transformers: without ``do_sample`` the file's temperature, top_k, top_p and min_p are
        not looked at; with it, where the file says nothing, temperature is 1 and top_k 50.

        Raises:
            ModelFileError: A value that is looked at is impossible; the message names it.
        """
        names = _unsaid(given, ["repetition_penalty"])
        # what is greedy does not look at them
        drawing = [] if given.temperature == 0 else _unsaid(given, _DRAWING)
        if drawing and self._samples():
            names += drawing
        return dataclasses.replace(given, **{name: self._value(name) for name in names})

    def _samples(self) -> bool:
        value = self.values.get("do_sample")
        if not (value is None or isinstance(value, bool)):
            raise ModelFileError(f"{self.path}: do_sample must be true or false, got {value!r}")
        return bool(value)

    def _value(self, name: str) -> Any:
        value = self.values.get(name)
        if value is None:
            return _DRAWING.get(name)
        try:
            Sampling(**{name: value})
        except ArgumentError as error:
            said = str(error).removeprefix("generate: ")
            raise ModelFileError(f"{self.path}: {said}") from error
        return value


def _unsaid(given: Sampling, names: Iterable[str]) -> list[str]:
    return [name for name in names if getattr(given, name) is None]


def read_sampling(folder: str | os.PathLike[str]) -> Sampling | FolderSampling:
    """The sampling of a folder's ``generation_config.json``; greedy where there is none.

    Raises:
        ModelFileError: The file cannot be read.
    """
    path = Path(folder) / GENERATION_CONFIG
    return FolderSampling(path, read_json(path)) if path.exists() else Sampling()


def chosen(defaults: Sampling | FolderSampling, **options: Any) -> Sampling:
    """``defaults`` but for the options that are not None.

    Raises:
        ArgumentError: An option is out of range or not a number; the message names it.
        ModelFileError: A value of a file is, that no option replaces; the message names both.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(defaults, FolderSampling):
        return defaults.under(Sampling(**given))
    return dataclasses.replace(defaults, **given)
