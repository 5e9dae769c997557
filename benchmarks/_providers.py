"""Who is measured: one table of all providers that a benchmark may name, and where each is from."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fastlm.ops.cuda._extension import refuses_device


@dataclass(frozen=True)
class Source:
    """What a provider is.

    Attributes:
        what: In a few words.
        package: The distribution that brings it.
        kind: Ours, somebody else's, or what an exact method can at best be and nobody offers.
    """

    what: str
    package: str = "torch"
    kind: Literal["ours", "foreign", "yardstick"] = "foreign"


PROVIDERS: dict[str, Source] = {
    "fastlm": Source("by the backend that it chooses", "fastlm", "ours"),
    "cuda": Source("fastlm by its kernels in CUDA C++", "fastlm", "ours"),
    "gluon": Source("fastlm by its kernels in Gluon, for Hopper", "fastlm", "ours"),
    "fastlm.ragged": Source("prompts of different lengths", "fastlm", "ours"),
    "fastlm.int8": Source("weights in 8 bits", "fastlm", "ours"),
    "torch": Source("what one writes with torch's operators"),
    "torch.compile": Source("the same, compiled for the very shapes"),
    "torch.chunked": Source("F.linear_cross_entropy, which does not hold the logits"),
    "sdpa": Source("scaled_dot_product_attention as torch chooses"),
    "sdpa.flash": Source("forced to FlashAttention"),
    "sdpa.cudnn": Source("forced to cuDNN"),
    "sdpa.efficient": Source("forced to memory-efficient attention"),
    "sdpa.math": Source("forced to plain operators"),
    "sdpa.mask": Source("with a mask that is there already"),
    "sdpa.built": Source("with a mask built in each call"),
    "flex": Source("FlexAttention, compiled, its block mask there already"),
    "varlen": Source("torch.nn.attention.varlen"),
    "transformers": Source("transformers' own layers and models", "transformers"),
    "transformers.static": Source("its static cache", "transformers"),
    "nanogpt-recipe": Source("nanoGPT's model and recipe in plain torch"),
    "gpt-fast": Source("a compiled step over a static cache"),
    "liger": Source("Liger Kernel", "liger-kernel"),
    "cce": Source("Cut Cross Entropy; by torch.compile on a CPU", "cut-cross-entropy"),
    "quack": Source("QuACK", "quack-kernels"),
    "flash-attn": Source("FlashAttention's own package", "flash-attn"),
    "products": Source("the matrix products alone", kind="yardstick"),
}

# A function of a case's inputs, or the reason why it is absent here.
Provider = Callable[..., Any] | str
# Imports and compiles what it needs, when it is wanted.
Make = Callable[[], Provider]

OURS = tuple(name for name, source in PROVIDERS.items() if source.kind == "ours")
PACKAGES = tuple(sorted({source.package for source in PROVIDERS.values()} - {"fastlm", "torch"}))


def kind_of(provider: str) -> str:
    return PROVIDERS[provider].kind


def installed(module: str, name: str) -> Provider:
    """A function of a package that need not be there, or why it is not."""
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except ImportError as error:
        return str(error)
    return function


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` through torch.compile, for the very shapes it is called with."""

    @functools.cache
    def build() -> Callable[..., Any]:
        return torch.compile(function, dynamic=False)

    return lambda *args: build()(*args)


def cuda_kernels(
    function: Callable[..., Any], backends: Mapping[str, str], device: str
) -> Provider:
    """``function`` of an op by its kernels in CUDA C++, or why they are absent."""
    if "cuda" not in backends:
        return "no such kernels"
    refusal = refuses_device(torch.empty(0, device=device), "input")
    return refusal or functools.partial(function, backend="cuda")


def given(function: Callable[..., Any], **options: object) -> Make:
    """Of what is there in any case."""
    return lambda: functools.partial(function, **options) if options else function
