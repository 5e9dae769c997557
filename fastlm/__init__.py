"""fastlm: fused, verified kernels under a PyTorch causal language model API.

Importing this package loads no torch: each public name is fetched when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> module that holds it
_HOMES = {
    "KernelMismatch": "fastlm.functional",
    "causal_attention": "fastlm.functional",
    "checked": "fastlm.functional",
    "cross_entropy": "fastlm.functional",
    "explain": "fastlm.functional",
    "functional": "",
    "nn": "",
    "testing": "",
}

if TYPE_CHECKING:
    from fastlm.functional import KernelMismatch, causal_attention, checked, cross_entropy, explain

__all__ = [
    "KernelMismatch",
    "__version__",
    "causal_attention",
    "checked",
    "cross_entropy",
    "explain",
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
