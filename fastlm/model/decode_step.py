"""One token of every sequence of a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastlm.model.kv_cache import KVCache

if TYPE_CHECKING:
    from fastlm.model.transformer import CausalLM


class DecodeStep:
    """Token ids ``(B,)`` to logits ``(B, V)``."""

    def __init__(self, model: CausalLM, cache: KVCache) -> None:
        self._model, self._cache = model, cache

    def __call__(self, tokens: Tensor) -> Tensor:
        return self._model(tokens[:, None], cache=self._cache).logits[:, -1]
