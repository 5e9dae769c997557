"""Train a causal language model on text: data, optimizer, loop, checkpoints, report.

Importing this package, or ``config`` from it, loads no torch, so that a command line built from
:class:`TrainConfig` answers quickly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastlm.training.config import ConfigError, TrainConfig

if TYPE_CHECKING:
    from fastlm.training.loop import TrainResult, train

__all__ = ["ConfigError", "TrainConfig", "TrainResult", "train"]


def __getattr__(name: str) -> Any:
    if name not in ("TrainResult", "train"):
        raise AttributeError(f"module 'fastlm.training' has no attribute {name!r}")
    from fastlm.training import loop

    return getattr(loop, name)
