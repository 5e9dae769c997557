"""Modules of the functional ops, with the names and state of torch's own where torch has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from fastlm.ops.attention import causal_attention
from fastlm.ops.rms_norm import rms_norm
from fastlm.ops.rotary import apply_rotary

__all__ = ["CausalSelfAttention", "RMSNorm"]


class RMSNorm(nn.Module):
    """:func:`fastlm.rms_norm` with a learned weight.

    Args:
        hidden_size: C, the last dimension of the input.
        eps: Added to the mean square.
        weight_offset: Added to the weight; the weight starts at ``1 - weight_offset``.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6, *, weight_offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((hidden_size,), 1.0 - weight_offset))
        self.eps = eps
        self.weight_offset = weight_offset

    def forward(
        self, input: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        return rms_norm(
            input, self.weight, self.eps, weight_offset=self.weight_offset, residual=residual
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention with shared key/value heads and rotary positions.

    The projections are called ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``, as in Hugging
    Face's Llama and Qwen3, and no tensor is transposed on the way to
    :func:`fastlm.causal_attention`.

    Args:
        hidden_size: C, width of input and output.
        num_heads: H, query heads.
        num_kv_heads: G, key and value heads; None for H.
        head_dim: D; None for C / H.
        qk_norm: Normalise each query and key head before rotation (Qwen3; Henry et al., 2020,
            https://arxiv.org/abs/2010.04245).
        bias: The projections have biases.
        eps: Of that normalisation.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        qk_norm: bool = False,
        bias: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)
        self.q_norm = RMSNorm(head_dim, eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps) if qk_norm else None

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        extend: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """``(B, T, C)`` to the same shape.

        Args:
            hidden: Input.
            rotary: cos and sin of the T positions, each ``(T, D/2)`` or ``(B, T, D/2)``.
            extend: Given the keys and values of these tokens, ``(B, T, G, D)``, stores them and
                returns those of all tokens so far, ``(B, S, G, D)``: a cache.
        """
        batch, length, _ = hidden.shape
        query = self.q_proj(hidden).view(batch, length, self.num_heads, self.head_dim)
        key = self.k_proj(hidden).view(batch, length, self.num_kv_heads, self.head_dim)
        value = self.v_proj(hidden).view(batch, length, self.num_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if rotary is not None:
            query, key = apply_rotary(query, key, *rotary)
        if extend is not None:
            key, value = extend(key, value)
        out = cast(Tensor, causal_attention(query, key, value))
        return self.o_proj(out.flatten(2))
