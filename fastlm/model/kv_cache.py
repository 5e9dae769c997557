"""Keys and values of the tokens a model has seen, in memory allocated once."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Room for ``max_length`` tokens of ``batch`` sequences in every layer.

    Every sequence of a batch has the same length.  Memory behind that length is never read.

    Attributes:
        keys: ``(layers, B, max_length, G, D)``.
        values: Same shape.
        length: Tokens stored so far.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, batch, max_length, num_kv_heads, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def batch(self) -> int:
        return self.keys.shape[1]

    @property
    def max_length(self) -> int:
        return self.keys.shape[2]

    def check_room(self, batch: int, tokens: int) -> None:
        """Refuse tokens that do not fit, before anything is written.

        Raises:
            ValueError: The batch differs, or the cache is too short.
        """
        if batch != self.batch:
            raise ValueError(f"KVCache: input must have batch {self.batch}, got {batch}")
        if self.length + tokens > self.max_length:
            raise ValueError(
                f"KVCache: input must fit in the {self.max_length - self.length} of "
                f"{self.max_length} tokens that are free, got {tokens}"
            )

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``(B, T, G, D)`` behind what ``layer`` holds; return all of it, as views.

        The length changes only with :meth:`advance`, once every layer has stored its part.
        """
        end = self.length + key.shape[1]
        keys, values = self.keys[layer, :, :end], self.values[layer, :, :end]
        keys[:, self.length :].copy_(key)
        values[:, self.length :].copy_(value)
        return keys, values

    def advance(self, tokens: int) -> None:
        """Count tokens that every layer has stored."""
        self.length += tokens

    def reset(self, length: int = 0) -> None:
        """Forget the tokens from ``length`` on.

        Raises:
            ValueError: The cache holds fewer.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"KVCache: length must be in [0, {self.length}], got {length}")
        self.length = length
