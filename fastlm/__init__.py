"""fastlm: fused, verified kernels under a PyTorch causal language model API.

Importing this package loads no torch: each public name is fetched when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> module that holds it
_HOMES = {
    "CausalLM": "fastlm.model.transformer",
    "CausalLMConfig": "fastlm.model.config",
    "FinetuneConfig": "fastlm.finetuning.config",
    "FinetuneResult": "fastlm.finetuning.loop",
    "KernelMismatch": "fastlm.functional",
    "LanguageModel": "fastlm.inference.language_model",
    "LossStats": "fastlm.functional",
    "ModelFileError": "fastlm.model.checkpoint",
    "TopK": "fastlm.functional",
    "TrainConfig": "fastlm.training.config",
    "TrainResult": "fastlm.training.loop",
    "apply_rotary": "fastlm.functional",
    "attention_with_kv_cache": "fastlm.functional",
    "causal_attention": "fastlm.functional",
    "checked": "fastlm.functional",
    "cross_entropy": "fastlm.functional",
    "cu_seqlens_from_document_ids": "fastlm.functional",
    "cu_seqlens_from_position_ids": "fastlm.functional",
    "explain": "fastlm.functional",
    "finetune": "fastlm.finetuning.loop",
    "functional": "",
    "glu": "fastlm.functional",
    "hf": "",
    "linear_cross_entropy": "fastlm.functional",
    "linear_logprobs": "fastlm.functional",
    "linear_top_k": "fastlm.functional",
    "load": "fastlm.inference.language_model",
    "nn": "",
    "optimize": "fastlm.hf",
    "optimized": "fastlm.hf",
    "perplexity": "fastlm.inference.perplexity",
    "quantize": "fastlm.model.quantize",
    "restore": "fastlm.hf",
    "rms_norm": "fastlm.functional",
    "scaled_dot_product_attention": "fastlm.functional",
    "swiglu": "fastlm.functional",
    "testing": "",
    "train": "fastlm.training.loop",
    "use_as_sdpa": "fastlm.compat.provider",
}

if TYPE_CHECKING:
    from fastlm.compat.provider import use_as_sdpa
    from fastlm.finetuning.config import FinetuneConfig
    from fastlm.finetuning.loop import FinetuneResult, finetune
    from fastlm.functional import (
        KernelMismatch,
        LossStats,
        TopK,
        apply_rotary,
        attention_with_kv_cache,
        causal_attention,
        checked,
        cross_entropy,
        cu_seqlens_from_document_ids,
        cu_seqlens_from_position_ids,
        explain,
        glu,
        linear_cross_entropy,
        linear_logprobs,
        linear_top_k,
        rms_norm,
        scaled_dot_product_attention,
        swiglu,
    )
    from fastlm.hf import optimize, optimized, restore
    from fastlm.inference.language_model import LanguageModel, load
    from fastlm.inference.perplexity import perplexity
    from fastlm.model.checkpoint import ModelFileError
    from fastlm.model.config import CausalLMConfig
    from fastlm.model.quantize import quantize
    from fastlm.model.transformer import CausalLM
    from fastlm.training.config import TrainConfig
    from fastlm.training.loop import TrainResult, train

__all__ = [
    "CausalLM",
    "CausalLMConfig",
    "FinetuneConfig",
    "FinetuneResult",
    "KernelMismatch",
    "LanguageModel",
    "LossStats",
    "ModelFileError",
    "TopK",
    "TrainConfig",
    "TrainResult",
    "__version__",
    "apply_rotary",
    "attention_with_kv_cache",
    "causal_attention",
    "checked",
    "cross_entropy",
    "cu_seqlens_from_document_ids",
    "cu_seqlens_from_position_ids",
    "explain",
    "finetune",
    "glu",
    "linear_cross_entropy",
    "linear_logprobs",
    "linear_top_k",
    "load",
    "optimize",
    "optimized",
    "perplexity",
    "quantize",
    "restore",
    "rms_norm",
    "scaled_dot_product_attention",
    "swiglu",
    "train",
    "use_as_sdpa",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastlm' has no attribute {name!r}")
    home = _HOMES[name]
    value = getattr(importlib.import_module(home), name) if home else _submodule(name)
    globals()[name] = value
    return value


def _submodule(name: str) -> Any:
    return importlib.import_module(f"fastlm.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
