"""A few tokens of every sequence of a cache: the step that decoding repeats.

On a GPU the step is captured in a CUDA graph.  On a CPU a token costs its matrix products and the
calls of operators around them, so the step makes few calls, and none through a module.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.model.blocks import (
    ACTIVATION_FUNCTIONS,
    Block,
    Decoder,
    FeedForward,
    UngatedFeedForward,
)
from fastlm.model.graphed_step import GraphedStep
from fastlm.model.kv_cache import KVCache
from fastlm.model.products import FewRows, joined
from fastlm.nn import CausalSelfAttention, RMSNorm
from fastlm.ops import _checked

if TYPE_CHECKING:
    from fastlm.model.transformer import CausalLM

Step = Callable[[Tensor], Tensor]
# rows of vectors to rows of vectors
_Map = Callable[[Tensor], Tensor]
# of the heads of queries, keys and values side by side, ``(B, T, H + 2 G, D)``, and the window
_Attend = Callable[[int, Tensor, int, int | None], Tensor]


def decode_step(model: CausalLM, cache: KVCache) -> Step:
    """A function from token ids ``(B, T)``, which it appends to ``cache``, to logits ``(B, T, V)``.

    Modules are called one by one where somebody watches them, by hooks, autocast or
    ``fastlm.checked()``, or has put others in their place.  To be called under
    ``torch.inference_mode()``.
    """
    step = functools.partial(_by_modules, model, cache)
    device_type = cache.device.type
    is_watched = _checked.is_on() or torch.is_autocast_enabled(device_type)
    if is_watched or not _is_ours(model):
        return step
    if device_type == "cuda":
        return GraphedStep(step, cache)
    is_wide = cache.keys.dtype in (torch.float32, torch.float64)
    return DirectStep(model, cache) if device_type == "cpu" and is_wide else step


def _is_ours(model: CausalLM) -> bool:
    """Whether the modules are those that the model was made of, or linear layers of others."""
    # here and not above: that module needs this one
    from fastlm.model.transformer import CausalLM

    layers = list(model.model.layers)
    kinds: dict[type, list[Any]] = {
        CausalLM: [model],
        Decoder: [model.model],
        nn.Embedding: [model.model.embed_tokens],
        Block: layers,
        CausalSelfAttention: [getattr(block, "self_attn", None) for block in layers],
    }
    mlps = {type(getattr(block, "mlp", None)) for block in layers}
    return (
        all(type(module) is kind for kind, modules in kinds.items() for module in modules)
        and mlps <= {FeedForward, UngatedFeedForward}
        and model.model.embed_tokens.max_norm is None
        and not any(
            module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
            for module in model.modules()
        )
    )


def _by_modules(model: CausalLM, cache: KVCache, tokens: Tensor) -> Tensor:
    return cast(Tensor, model(tokens, cache=cache).logits)


class DirectStep:
    """The step on a CPU, in float32 or float64.

    Reads the weights that the model's parameters have when it is made.
    """

    def __init__(self, model: CausalLM, cache: KVCache) -> None:
        decoder = model.model
        self._cache = cache
        self._embedding = decoder.embed_tokens.weight
        self._positions = decoder.embed_positions
        self._tables = None if decoder.rotary is None else decoder.rotary.tables
        self._layers = [
            _layer(index, cast(Block, block)) for index, block in enumerate(decoder.layers)
        ]
        self._norm, self._head = _norm(decoder.norm), _product(model.lm_head)
        self._turn = None if self._tables is None else _Turn(self._tables, cache.keys.dtype)
        # the caches of each layer as attention takes them, while the batch is of this size
        self._batch, self._heads_first = -1, list[tuple[Tensor, Tensor]]()

    def __call__(self, tokens: Tensor) -> Tensor:
        batch, count = tokens.shape
        cache = self._cache
        cache.check_room(batch, count)
        stream = F.embedding(tokens, self._embedding)
        if self._positions is not None:
            stream = stream + self._positions(count, cache.positions(count))
        stream = stream.view(batch * count, -1)
        is_even = count == 1 and len(set(cache.lengths)) == 1
        attend = self._attending_alike() if is_even else self._attending()
        for layer in self._layers:
            layer(stream, batch, attend)
        cache.advance(count)
        return self._head(self._norm(stream)).view(batch, count, -1)

    def _attending(self) -> _Attend:
        def attend(layer: int, heads: Tensor, kv_heads: int, window: int | None) -> Tensor:
            query, key, value = heads.split(
                (heads.shape[2] - 2 * kv_heads, kv_heads, kv_heads), dim=2
            )
            return self._cache.attend(layer, query, key, value, window, rotary=self._tables)

        return attend

    def _attending_alike(self) -> _Attend:
        """A token of every sequence, all of one length: what is asked of most steps."""
        cache = self._cache
        if self._batch != cache.batch:
            self._batch = cache.batch
            self._heads_first = [
                (keys.transpose(1, 2), values.transpose(1, 2))
                for keys, values in zip(cache.keys, cache.values, strict=True)
            ]
        views, at = self._heads_first, cache.length
        turn = None if self._turn is None else self._turn(at)

        def attend(layer: int, heads: Tensor, kv_heads: int, window: int | None) -> Tensor:
            # (B, H + 2 G, 1, D)
            heads = heads.transpose(1, 2)
            total = heads.shape[1]
            value, turned = heads.narrow(1, total - kv_heads, kv_heads), heads
            if turn is not None:
                turned = heads.narrow(1, 0, total - kv_heads) @ turn
            query = turned.narrow(1, 0, total - 2 * kv_heads)
            keys, values = views[layer]
            keys.narrow(2, at, 1).copy_(turned.narrow(1, total - 2 * kv_heads, kv_heads))
            values.narrow(2, at, 1).copy_(value)
            first = 0 if window is None else max(0, at + 1 - window)
            count = at + 1 - first
            out = F.scaled_dot_product_attention(
                query, keys.narrow(2, first, count), values.narrow(2, first, count),
                enable_gqa=total > 3 * kv_heads,
            )  # fmt: skip
            return out.transpose(1, 2)

        return attend


class _Turn:
    """Rotation to a position as one small matrix product, whose matrix all layers share."""

    def __init__(self, tables: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
        self._cos, self._sin = tables
        half = self._cos.shape[1]
        self._matrix = torch.zeros(2 * half, 2 * half, dtype=dtype)
        # channel c becomes cos x[c] - sin x[c + D/2], and channel c + D/2 cos x[c + D/2] + sin x[c]
        self._diagonal = self._matrix.diagonal().view(2, half)
        self._below, self._above = self._matrix.diagonal(-half), self._matrix.diagonal(half)

    def __call__(self, at: int) -> Tensor:
        """``(D, D)``, to be multiplied with rows from the right; the next call writes it over."""
        sin = self._sin[at]
        self._diagonal.copy_(self._cos[at])
        self._above.copy_(sin)
        torch.neg(self._above, out=self._below)
        return self._matrix


def _layer(index: int, block: Block) -> Callable[[Tensor, int, _Attend], None]:
    """A block that adds to the stream ``(B * T, C)`` in place."""
    attention, mlp = block.self_attn, block.mlp
    norm, mlp_norm = _norm(block.input_layernorm), _norm(block.post_attention_layernorm)
    qkv = _side_by_side([attention.q_proj, attention.k_proj, attention.v_proj])
    add_o, add_down = _addition(attention.o_proj), _addition(mlp.down_proj)
    widen = _widening(mlp)
    q_norm = None if attention.q_norm is None else _norm(attention.q_norm)
    k_norm = None if attention.k_norm is None else _norm(attention.k_norm)
    num_heads, kv_heads = attention.num_heads, attention.num_kv_heads
    head_dim, window = attention.head_dim, attention.window_size

    def run(stream: Tensor, batch: int, attend: _Attend) -> None:
        heads = qkv(norm(stream)).view(batch, -1, num_heads + 2 * kv_heads, head_dim)
        if q_norm is not None and k_norm is not None:
            query, key, value = heads.split((num_heads, kv_heads, kv_heads), dim=2)
            heads = torch.cat((q_norm(query), k_norm(key), value), dim=2)
        out = attend(index, heads, kv_heads, window)
        add_o(stream, out.reshape(len(stream), -1))
        add_down(stream, widen(mlp_norm(stream)))

    return run


def _widening(mlp: nn.Module) -> _Map:
    """The feed-forward layer before its last product."""
    if isinstance(mlp, UngatedFeedForward):
        up, activation = _product(mlp.up_proj), mlp.activation
        return lambda hidden: activation(up(hidden))
    assert isinstance(mlp, FeedForward)
    activation = ACTIVATION_FUNCTIONS[mlp.activation]
    both, inner = _side_by_side([mlp.gate_proj, mlp.up_proj]), mlp.gate_proj.out_features

    def run(hidden: Tensor) -> Tensor:
        wide = both(hidden)
        return activation(wide.narrow(1, 0, inner)).mul_(wide.narrow(1, inner, inner))

    return run


def _side_by_side(modules: list[nn.Module]) -> _Map:
    if all(type(module) is nn.Linear and module.weight.is_contiguous() for module in modules):
        return joined(cast(list[nn.Linear], modules))
    products = [_product(module) for module in modules]
    return lambda input: torch.cat([product(input) for product in products], dim=-1)


def _product(module: nn.Module) -> _Map:
    if type(module) is nn.Linear and module.weight.is_contiguous():
        return FewRows(module.weight, module.bias)
    return module


def _addition(module: nn.Module) -> Callable[[Tensor, Tensor], object]:
    """Adds the product of its second argument to the first, in place."""
    product = _product(module)
    if isinstance(product, FewRows):
        return product.add_to
    return lambda total, input: total.add_(product(input))


def _norm(module: nn.Module) -> _Map:
    """RMSNorm in five calls: what the mean divides by is in the weight and eps instead."""
    if type(module) is not RMSNorm:
        return module
    size = len(module.weight)
    weight = (module.weight + module.weight_offset) * math.sqrt(size)
    # a number would be made a tensor in every call
    eps = weight.new_tensor(module.eps * size)

    def run(x: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return torch.mul(x, torch.addcmul(eps, norms, norms).rsqrt_()).mul_(weight)

    return run
