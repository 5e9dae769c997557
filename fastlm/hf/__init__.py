"""fastlm inside Hugging Face transformers.  Importing registers ``attn_implementation="fastlm"``.

Nothing else is changed by the import: models are changed one by one, by :func:`optimize`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastlm._errors import MissingPackageError

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise MissingPackageError(
        "fastlm.hf needs transformers, which is not installed: pip install 'fastlm[hf]'"
    ) from None

from fastlm.hf.attention import attention_forward, register
from fastlm.hf.instance import Routes, optimize, optimized, restore
from fastlm.hf.instance import explain_attention as explain
from fastlm.hf.loss import LossStatistics, loss_statistics
from fastlm.hf.masks import attention_mask
from fastlm.hf.report import Report, Row

if TYPE_CHECKING:
    from fastlm.hf.trainer import TrainerCallback

__all__ = [
    "LossStatistics",
    "Report",
    "Routes",
    "Row",
    "TrainerCallback",
    "attention_forward",
    "attention_mask",
    "explain",
    "loss_statistics",
    "optimize",
    "optimized",
    "restore",
]

register()


def __getattr__(name: str) -> Any:
    if name != "TrainerCallback":
        raise AttributeError(f"module 'fastlm.hf' has no attribute {name!r}")
    # the Trainer takes seconds to import
    from fastlm.hf.trainer import TrainerCallback

    return TrainerCallback
