"""A few tokens of every sequence of a cache: the step that decoding repeats.

On a GPU the step is captured in a CUDA graph.  On a CPU a token costs its matrix products and the
calls of operators around them, so the step makes few calls, and none through a module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastlm.model.blocks import (
    ACTIVATION_FUNCTIONS,
    Block,
    Decoder,
    FeedForward,
    UngatedFeedForward,
)
from fastlm.model.direct_attention import (
    Attention,
    CacheAttention,
    DirectAttention,
    PromptAttention,
)
from fastlm.model.graphed_step import GraphedStep, graphed_step
from fastlm.model.kv_cache import KVCache
from fastlm.model.paged_kv_cache import PagedRows
from fastlm.model.products import MOST_ROWS, Call, FewRows, side_by_side
from fastlm.nn import CausalSelfAttention, RMSNorm
from fastlm.ops import _checked

if TYPE_CHECKING:
    from fastlm.model.transformer import CausalLM

Step = Callable[[Tensor], Tensor]
# of rows of vectors in memory, and memory for others: the calls that compute these
_Map = Callable[[Tensor, Tensor], list[Call]]


def decode_step(model: CausalLM, cache: KVCache | PagedRows) -> Step:
    """A function from token ids ``(B, T)``, which it appends to ``cache``, to logits ``(B, T, V)``.

    Modules are called one by one where somebody watches them, by hooks, autocast or
    ``fastlm.checked()``, or has put others in their place.  To be called under
    ``torch.inference_mode()``.
    """
    step = partial(_by_modules, model, cache)
    device_type = cache.device.type
    if _is_watched(model, device_type):
        return step
    if device_type == "cuda":
        # pages are the host's to choose, for each step anew
        return GraphedStep(step, cache) if isinstance(cache, KVCache) else step
    is_wide = model.model.embed_tokens.weight.dtype in (torch.float32, torch.float64)
    return DirectStep(model, cache) if device_type == "cpu" and is_wide else step


def new_step(
    model: CausalLM, batch: int, max_length: int, dtype: torch.dtype | None
) -> tuple[Step, KVCache]:
    """:func:`decode_step` of an empty cache, and that cache; on a GPU with graphs that were kept.

    The arguments are those of :meth:`fastlm.CausalLM.new_cache`.
    """
    if batch and model.device.type == "cuda" and not _is_watched(model, "cuda"):
        return graphed_step(model, partial(partial, _by_modules, model), batch, max_length, dtype)
    cache = model.new_cache(batch, max_length, dtype=dtype)
    return decode_step(model, cache), cache


def _is_watched(model: CausalLM, device_type: str) -> bool:
    """Whether modules are to be called one by one."""
    return (
        _checked.is_on()
        or torch.is_autocast_enabled(device_type)
        or nn.modules.module._has_any_global_hook()
        or not _is_ours(model)
    )


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


def _by_modules(model: CausalLM, cache: KVCache | PagedRows, tokens: Tensor) -> Tensor:
    return cast(Tensor, model(tokens, cache=cache).logits)


class DirectStep:
    """The step on a CPU, in float32 or float64.

    For each number of rows and tokens it is a list of calls on memory of its own, so that little is
    made for a token.  The logits it returns are written over by the next step.  The weights are to
    stay as they are for as long as it is used.
    """

    def __init__(self, model: CausalLM, cache: KVCache | PagedRows) -> None:
        decoder = model.model
        self._model, self._cache = model, cache
        inner = model.config.intermediate_size
        self._layers = [_Layer(cast(Block, block), inner) for block in decoder.layers]
        self._norm, self._head = _norm(decoder.norm), _product(model.lm_head)
        self._memory = self._memory_for(1)
        # of so many rows: number of tokens of each to what is done with them
        self._batch, self._tapes = 0, dict[int, _Tape]()

    def __call__(self, tokens: Tensor) -> Tensor:
        batch, count = tokens.shape
        self._cache.check_room(batch, count)
        if batch != self._batch:
            self._batch, self._tapes = batch, {}
        if count not in self._tapes:
            if batch * count > len(self._memory.stream):
                # what was recorded on the smaller one would keep it
                self._memory, self._tapes = self._memory_for(batch * count), {}
            self._tapes[count] = self._recorded(self._memory.of(batch, count), ends_only=False)
        return self._ran(self._tapes[count], tokens)

    def reads(self, prompts: Sequence[Sequence[int]]) -> bool:
        """Whether :meth:`read` is for these: one for each row, alike in length, of few tokens."""
        lengths = {len(prompt) for prompt in prompts}
        return (
            len(prompts) == self._cache.batch
            and len(lengths) == 1
            and len(prompts) * max(lengths) <= MOST_ROWS
        )

    def read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Store prompts in the empty cache; logits ``(B, V)`` of what follows each."""
        tokens = torch.tensor([list(prompt) for prompt in prompts])
        batch, count = tokens.shape
        self._cache.check_room(batch, count)
        memory = self._memory_for(batch * count, batch).of(batch, count)
        return self._ran(self._recorded(memory, ends_only=True), tokens)[:, 0]

    def _ran(self, tape: _Tape, tokens: Tensor) -> Tensor:
        memory, layers, attend, end = tape
        count, decoder = tokens.shape[1], self._model.model
        torch.index_select(decoder.embed_tokens.weight, 0, tokens.reshape(-1), out=memory.stream)
        if decoder.embed_positions is not None:
            learned = decoder.embed_positions(count, self._cache.positions(count))
            memory.stream.view(*tokens.shape, -1).add_(learned)
        attend.begin()
        for index, (before, after) in enumerate(layers):
            for call in before:
                call()
            attend(index)
            for call in after:
                call()
        for call in end:
            call()
        self._cache.advance(count)
        return memory.logits

    def _memory_for(self, rows: int, ends: int | None = None) -> _Memory:
        """Of so many tokens, all of which or ``ends`` of which are to have logits."""
        weight, layer = self._model.model.embed_tokens.weight, self._layers[0]
        inner = max(layer.inner for layer in self._layers)
        return _Memory(
            stream=weight.new_empty(rows, weight.shape[1]),
            normed=weight.new_empty(rows, weight.shape[1]),
            heads=weight.new_empty(rows, layer.num_heads + 2 * layer.kv_heads, layer.head_dim),
            attended=weight.new_empty(rows, layer.num_heads, layer.head_dim),
            wide=weight.new_empty(rows, 2 * inner),
            inner=weight.new_empty(rows, inner),
            logits=weight.new_empty(rows if ends is None else ends, self._model.config.vocab_size),
        )

    def _recorded(self, memory: _Memory, *, ends_only: bool) -> _Tape:
        """With logits of all tokens, or of the last of each row alone."""
        decoder, cache = self._model.model, self._cache
        windows = [layer.window for layer in self._layers]
        tables = None if decoder.rotary is None else decoder.rotary.tables
        batch, count = memory.heads.shape[:2]
        floats = cache if isinstance(cache, KVCache) and cache.scales[0] is None else None
        attend: Attention
        if floats is not None and count == 1:
            attend = DirectAttention(floats, memory.heads, memory.attended, windows, tables)
        elif floats is not None and ends_only and all(w is None or w >= count for w in windows):
            attend = PromptAttention(floats, memory.heads, memory.attended, tables)
        else:
            attend = CacheAttention(cache, memory.heads, memory.attended, windows, tables)
        stream, normed = memory.stream, memory.normed
        if ends_only:
            stream, normed = stream.view(batch, count, -1)[:, -1], normed[:batch]
        end = [
            *self._norm(stream, normed),
            *self._head(normed, memory.logits.flatten(0, 1)),
        ]
        return memory, [layer.recorded(memory) for layer in self._layers], attend, end


class _Memory(NamedTuple):
    """What the calls of a step read and write, for B rows of T tokens."""

    # (B T, C)
    stream: Tensor
    normed: Tensor
    # (B, T, H + 2 G, D) and (B, T, H, D)
    heads: Tensor
    attended: Tensor
    # of the widest feed-forward layer, (B T, 2 I) and (B T, I)
    wide: Tensor
    inner: Tensor
    # (B, T, V), or of fewer places
    logits: Tensor

    def of(self, batch: int, count: int) -> _Memory:
        """So much of memory whose first two dimensions, B and T, are one."""
        parts = _Memory(*(x[: batch * count] for x in self))
        names = ("heads", "attended", "logits")
        return parts._replace(**{
            name: getattr(parts, name).unflatten(0, (batch, -1)) for name in names
        })  # fmt: skip


# of each layer what is done before attention and what after it, and what is done at last
_Tape = tuple[_Memory, list[tuple[list[Call], list[Call]]], Attention, list[Call]]


class _Layer:
    """A block that adds to the stream in place."""

    def __init__(self, block: Block, inner: int) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.num_heads, self.kv_heads = attention.num_heads, attention.num_kv_heads
        self.head_dim, self.window = attention.head_dim, attention.window_size
        self.inner = cast(int, getattr(mlp.up_proj, "out_features", inner))
        self._norm = _norm(block.input_layernorm)
        self._mlp_norm = _norm(block.post_attention_layernorm)
        self._qkv = _side_by_side([attention.q_proj, attention.k_proj, attention.v_proj])
        self._head_norms = [
            None if norm is None else _norm(norm) for norm in (attention.q_norm, attention.k_norm)
        ]
        self._add_o, self._add_down = _addition(attention.o_proj), _addition(mlp.down_proj)
        self._widen = _widening(mlp)

    def recorded(self, memory: _Memory) -> tuple[list[Call], list[Call]]:
        """Until ``memory.heads`` is there for attention, and from ``memory.attended`` on."""
        stream, normed = memory.stream, memory.normed
        rows = len(stream)
        # layers may differ in width
        wide = memory.wide.view(-1)[: rows * 2 * self.inner].view(rows, -1)
        inner = memory.inner.view(-1)[: rows * self.inner].view(rows, -1)
        before = [*self._norm(stream, normed), *self._qkv(normed, memory.heads.view(rows, -1))]
        parts = memory.heads.split((self.num_heads, self.kv_heads, self.kv_heads), dim=2)
        for norm, part in zip(self._head_norms, parts, strict=False):
            before += [] if norm is None else norm(part, part)
        after = [
            *self._add_o(memory.attended.view(rows, -1), stream),
            *self._mlp_norm(stream, normed),
            *self._widen(normed, wide, inner),
            *self._add_down(inner, stream),
        ]
        return before, after


def _widening(mlp: nn.Module) -> Callable[[Tensor, Tensor, Tensor], list[Call]]:
    """The feed-forward layer before its last product, through memory twice as wide."""
    if isinstance(mlp, UngatedFeedForward):
        up, alone = _product(mlp.up_proj), mlp.activation

        def widened(hidden: Tensor, wide: Tensor, inner: Tensor) -> list[Call]:
            return [*up(hidden, inner), lambda: inner.copy_(alone(inner))]

        return widened
    assert isinstance(mlp, FeedForward)
    activation, both = (
        ACTIVATION_FUNCTIONS[mlp.activation],
        _side_by_side([mlp.gate_proj, mlp.up_proj]),
    )

    def gated(hidden: Tensor, wide: Tensor, inner: Tensor) -> list[Call]:
        gate, linear = wide.chunk(2, dim=1)
        return [*both(hidden, wide), lambda: torch.mul(activation(gate), linear, out=inner)]

    return gated


def _side_by_side(modules: list[nn.Module]) -> _Map:
    if all(type(module) is nn.Linear and module.weight.is_contiguous() for module in modules):
        return side_by_side(cast(list[nn.Linear], modules))

    return lambda input, out: [lambda: torch.cat([x(input) for x in modules], dim=-1, out=out)]


def _product(module: nn.Module) -> _Map:
    if type(module) is nn.Linear and module.weight.is_contiguous():
        return FewRows(module.weight, module.bias).into
    return partial(_by_module, module)


def _addition(module: nn.Module) -> _Map:
    """Of vectors, and of those to which the products are to be added."""
    if type(module) is nn.Linear and module.weight.is_contiguous():
        return FewRows(module.weight, module.bias).added
    return lambda input, total: [lambda: total.add_(module(input))]


def _by_module(module: Callable[[Tensor], Tensor], input: Tensor, out: Tensor) -> list[Call]:
    return [lambda: out.copy_(module(input))]


def _norm(module: nn.Module) -> _Map:
    """RMSNorm in four calls: what the mean divides by is in the weight and eps instead."""
    if type(module) is not RMSNorm:
        return partial(_by_module, module)
    size = len(module.weight)
    weight = (module.weight + module.weight_offset) * math.sqrt(size)
    # a number would be made a tensor in every call
    eps = weight.new_full((1, 1, 1), module.eps * size)

    def into(input: Tensor, out: Tensor) -> list[Call]:
        norms = input.new_empty(*input.shape[:-1], 1)
        if input.dim() == 2:
            # each vector by itself, of which BLAS makes less ado than the norm does
            column = norms[..., None]
            squares = [partial(torch.baddbmm, eps, input[:, None], input[..., None], out=column)]
        else:
            squares = [
                partial(torch.linalg.vector_norm, input, dim=-1, keepdim=True, out=norms),
                partial(torch.addcmul, eps[0, 0], norms, norms, out=norms),
            ]
        return [
            *squares,
            norms.rsqrt_,
            partial(torch.mul, input, norms, out=out),
            partial(torch.mul, out, weight, out=out),
        ]

    return into
