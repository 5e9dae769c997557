"""Fine-tune a model of Hugging Face transformers on rows of text, and say what that changed.

Importing this package, or ``config`` from it, loads neither torch nor transformers, so that a
command line built from :class:`FinetuneConfig` answers quickly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastlm.finetuning.config import FinetuneConfig

if TYPE_CHECKING:
    from fastlm.finetuning.loop import FinetuneResult, finetune

__all__ = ["FinetuneConfig", "FinetuneResult", "finetune"]


def __getattr__(name: str) -> Any:
    if name not in ("FinetuneResult", "finetune"):
        raise AttributeError(f"module 'fastlm.finetuning' has no attribute {name!r}")
    from fastlm.finetuning import loop

    return getattr(loop, name)
