"""Decoding as gpt-fast does it, with the weights of a model of ours.

A compiled step takes a token of every row, stores its keys and values in a cache that never grows,
and attends over all of the cache under a mask (https://github.com/pytorch-labs/gpt-fast).
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm


class StaticDecoder:
    """Greedy decoding of a Llama model.

    Args:
        model: Its weights are read; those of queries, keys and values are copied side by side.
        max_length: Tokens of the cache.
    """

    def __init__(self, model: fastlm.CausalLM, max_length: int) -> None:
        decoder, config = model.model, model.config
        assert decoder.rotary is not None, "Llama turns queries and keys"
        self._sizes = config.num_attention_heads, config.num_kv_heads, config.num_kv_heads
        self._head_dim, self._eps = config.head_size, config.rms_norm_eps
        self._embedding, self._head = decoder.embed_tokens.weight, model.lm_head.weight
        self._layers = [cast(Any, layer) for layer in decoder.layers]
        self._qkv = [
            torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]).detach()
            for a in (layer.self_attn for layer in self._layers)
        ]
        self._norm = decoder.norm.weight
        cos, sin = (table[:max_length].to(self._head.dtype) for table in decoder.rotary.tables)
        self._cos, self._sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        self._mask = torch.ones(max_length, max_length, dtype=torch.bool, device=cos.device).tril()
        self._max_length, self._caches = max_length, list[tuple[Tensor, Tensor]]()
        mode = "reduce-overhead" if cos.is_cuda else None
        self._step = torch.compile(self._next, mode=mode, fullgraph=True, dynamic=False)

    @torch.inference_mode()
    def generate(self, prompts: Tensor, new_tokens: int) -> Tensor:
        """``(B, new_tokens)`` that follow prompts ``(B, T)``."""
        self._make_room(len(prompts))
        positions = torch.arange(prompts.shape[1], device=prompts.device)
        tokens = self._next(prompts, positions)
        at, out = positions[-1:].clone(), [tokens]
        for _ in range(new_tokens - 1):
            at += 1
            tokens = self._step(tokens, at).clone()
            out.append(tokens)
        return torch.cat(out, 1)

    @torch.inference_mode()
    def first_logits(self, prompts: Tensor) -> Tensor:
        """``(B, 1, V)`` after prompts ``(B, T)``, float32: of a step behind all but their last."""
        self._make_room(len(prompts))
        positions = torch.arange(prompts.shape[1], device=prompts.device)
        self._logits(prompts[:, :-1], positions[:-1])
        return self._logits(prompts[:, -1:], positions[-1:]).float()

    def _make_room(self, batch: int) -> None:
        shape = (batch, self._sizes[1], self._max_length, self._head_dim)
        if not self._caches or self._caches[0][0].shape != shape:
            self._caches = [
                (self._head.new_zeros(shape), self._head.new_zeros(shape)) for _ in self._layers
            ]

    def _next(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self._logits(ids, positions).argmax(-1)

    def _logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        """``(B, 1, V)`` after tokens ``(B, T)`` at ``positions`` ``(T,)``, which are stored."""
        x, mask = F.embedding(ids, self._embedding), self._mask[positions]
        cos, sin = self._cos[positions], self._sin[positions]
        for layer, qkv, (keys, values) in zip(self._layers, self._qkv, self._caches, strict=True):
            heads = F.linear(self._normed(x, layer.input_layernorm.weight), qkv)
            heads = heads.unflatten(-1, (-1, self._head_dim)).transpose(1, 2)
            query, key, value = heads.split(self._sizes, dim=1)
            query, key = (y * cos + _swapped(y) * sin for y in (query, key))
            keys[:, :, positions], values[:, :, positions] = key, value
            out = F.scaled_dot_product_attention(
                query, keys, values, attn_mask=mask, enable_gqa=self._sizes[0] > self._sizes[1]
            )
            x = x + layer.self_attn.o_proj(out.transpose(1, 2).flatten(2))
            h, mlp = self._normed(x, layer.post_attention_layernorm.weight), layer.mlp
            x = x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))
        return F.linear(self._normed(x[:, -1:], self._norm), self._head)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self._eps)


def _swapped(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((high, low), dim=-1)
