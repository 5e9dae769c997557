"""Plant a bug in a copy of a source file and see whether a check notices."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from support.memory import in_child

ROOT = Path(__file__).parents[2]
_NOT_PLANTED = "the mutant could not be planted"


@dataclass(frozen=True)
class Mutant:
    """One planted bug.

    Attributes:
        name: What the bug is, as a sentence would say it.
        file: Path from the repository root, ``kernels/...`` or ``fastlm/...``.
        old: Text that stands in the file exactly once.
        new: What replaces it.

    Raises:
        ValueError: ``old`` is not in the file exactly once: found where tests are collected, though
            most mutants are planted in long runs alone.
    """

    name: str
    file: str
    old: str
    new: str

    def __post_init__(self) -> None:
        count = (ROOT / self.file).read_text().count(self.old)
        if count != 1:
            raise ValueError(f"{self.name}: old text is {count} times in {self.file}, not once")

    def __str__(self) -> str:
        return self.name


def killed(mutant: Mutant, check: Callable[[], object], seconds: int = 120) -> bool:
    """Whether ``check`` fails, in a forked process, with the bug in place.

    Functions, classes and kernels of the file are replaced wherever a fastlm module holds them.
    A check that runs longer than ``seconds`` counts as failed.

    Raises:
        AssertionError: The changed file cannot be imported, or ``check`` fails without the bug.
    """
    _require_passing(check, seconds)
    changed = (ROOT / mutant.file).read_text().replace(mutant.old, mutant.new)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, Path(mutant.file).name)
        copy.write_text(changed)

        def check_mutant() -> None:
            try:
                _plant(_module_name(mutant.file), copy)
            except BaseException as error:
                raise RuntimeError(_NOT_PLANTED) from error
            check()

        try:
            in_child(check_mutant, seconds)
        except AssertionError as failure:
            if _NOT_PLANTED in str(failure):
                raise
            return True
    return False


_passing: set[Callable[[], object]] = set()


def _require_passing(check: Callable[[], object], seconds: int) -> None:
    """A check that always fails would kill every mutant."""
    if check not in _passing:
        in_child(check, seconds)
        _passing.add(check)


def _module_name(file: str) -> str:
    parts = Path(file).with_suffix("").parts
    return ".".join(parts if parts[0] == "fastlm" else ("fastlm", *parts))


def _plant(name: str, copy: Path) -> None:
    original = importlib.import_module(name)
    # a sibling of the original: its relative imports work, and its file is there for triton.jit
    spec = importlib.util.spec_from_file_location(f"{name}_mutant", copy)
    assert spec is not None
    assert spec.loader is not None
    changed = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = changed
    with mock.patch("fastlm.ops._define.define_op", _registered):
        spec.loader.exec_module(changed)
    swaps = {
        id(value): getattr(changed, key)
        for key, value in vars(original).items()
        if _defined_in(value, original) and hasattr(changed, key)
    }
    for module in [m for m in sys.modules.values() if _is_ours(m) and m is not changed]:
        for key, value in list(vars(module).items()):
            if id(value) in swaps:
                setattr(module, key, swaps[id(value)])


def _registered(op: str, step: str, *rest: Any, **options: Any) -> Any:
    """In place of define_op: the operators of an op's module are there, and none is added."""
    return getattr(torch.ops.fastlm, f"{op}_{step}").default


def _defined_in(value: Any, module: ModuleType) -> bool:
    function = getattr(value, "fn", value)  # what triton.jit wraps
    return callable(function) and getattr(function, "__module__", None) == module.__name__


def _is_ours(module: object) -> bool:
    return isinstance(module, ModuleType) and module.__name__.split(".")[0] == "fastlm"
