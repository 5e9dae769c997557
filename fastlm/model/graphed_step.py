"""A decoding step as a CUDA graph: one launch instead of some hundred."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastlm.model.kv_cache import KVCache

if TYPE_CHECKING:
    from fastlm.model.transformer import CausalLM

Step = Callable[[Tensor], Tensor]
# Runs before the capture, in which kernels are compiled and libraries make their workspaces.
_WARM_UPS = 2
# Tokens by which caches that are kept differ in length.
_LENGTHS = 256


class GraphedStep:
    """Replays ``step`` for as many sequences as a cache has.

    Lengths are read on the device, so one graph serves all of them; tokens are copied in, and the
    logits it returns are written over by the next call.  There is a graph for each number of
    sequences rounded up to a power of two, since sequences leave: the rows beyond those there are
    compute something that nobody reads, in memory that nobody has.  All share one pool of memory.

    Args:
        step: Token ids ``(B, 1)`` to logits ``(B, 1, V)`` by kernels alone; appends to ``cache``.
        cache: On a CUDA device.  Its memory must stay where it is.
    """

    def __init__(self, step: Step, cache: KVCache) -> None:
        self._step, self._cache, self._whole = step, cache, cache.part(0, cache.batch)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        with torch.cuda.device(cache.device):
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(self, tokens: Tensor) -> Tensor:
        batch, count = tokens.shape
        if count != 1:
            return self._step(tokens)
        self._cache.check_room(batch, 1)
        bucket = min(1 << (batch - 1).bit_length(), self._whole.batch)
        # rows that have left stay where every position is one: those that are there are longer
        self._whole.seqlens[batch:bucket].zero_()
        # what follows is about the current device and its current stream
        with torch.cuda.device(self._cache.device):
            if bucket not in self._graphs:
                self._graphs[bucket] = self._captured(bucket)
            graph, inputs, logits = self._graphs[bucket]
            inputs[:batch].copy_(tokens)
            # counts the token on the device; the host is told here
            graph.replay()
        self._cache.lengths = [length + 1 for length in self._cache.lengths]
        return logits[:batch]

    def _captured(self, bucket: int) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """Capture without a lasting trace: what is written to the cache is written again."""
        cache = self._cache
        before = dict(vars(cache))
        lengths = [*cache.lengths, *[0] * (bucket - cache.batch)]
        inputs = torch.zeros((bucket, 1), dtype=torch.int64, device=cache.device)
        try:
            vars(cache).update(vars(self._whole.part(0, bucket)))
            cache.set_lengths(lengths)
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    self._step(inputs)
                    cache.set_lengths(lengths)
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                logits = self._step(inputs)
        finally:
            vars(cache).update(before)
        return graph, inputs, logits


class _Kept:
    """The graphs of a model that rests, and the memory they write to."""

    def __init__(self, model: nn.Module, graphed: GraphedStep) -> None:
        # of the model itself nothing: it is to end when its user has forgotten it
        graphed._step = _rests
        self.graphed = graphed
        self._modules = [weakref.ref(module) for module in model.modules()]
        self._addresses = _addresses(model)
        self._stream = torch.cuda.current_stream(graphed._cache.device)

    def serves(self, model: nn.Module, shape: torch.Size, dtype: torch.dtype) -> bool:
        """Whether the model is what was captured, and the cache of keys the one that is wanted."""
        keys = self.graphed._whole.keys
        modules = list(model.modules())
        return (
            (keys.shape, keys.dtype) == (shape, dtype)
            and len(modules) == len(self._modules)
            and all(a() is b for a, b in zip(self._modules, modules, strict=True))
            and self._addresses == _addresses(model)
        )

    def wake(self, step: Callable[[KVCache], Step], batch: int) -> tuple[GraphedStep, KVCache]:
        """The same with an empty cache of ``batch`` sequences."""
        graphed = self.graphed
        cache = graphed._cache
        # another stream may have replayed last
        torch.cuda.current_stream(cache.device).wait_stream(self._stream)
        vars(cache).update(vars(graphed._whole.part(0, batch)))
        cache.set_lengths([0] * batch)
        graphed._step = step(cache)
        return graphed, cache


# of each model those of the generation that ended last
_kept: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()


def graphed_step(
    model: CausalLM,
    step: Callable[[KVCache], Step],
    batch: int,
    max_length: int,
    dtype: torch.dtype | None,
) -> tuple[GraphedStep, KVCache]:
    """A step and its empty cache of ``batch`` sequences; with the graphs of a generation before.

    A capture takes longer than many tokens.  Graphs write where they did when they were captured,
    so they are kept with their cache, for the next generation of the model whose cache, rounded up
    to a power of two sequences and to a length that many ask for, has the same shape.  Parameters
    may change in place; with other modules, or parameters elsewhere, there is a capture anew.  Who
    takes graphs has them alone, until :func:`keep`.

    Args:
        model: On a CUDA device.
        step: Makes a step of a cache, as :class:`GraphedStep` takes it.
        batch: Number of sequences.
        max_length: Tokens that each may reach.
        dtype: Of the cache, as :meth:`fastlm.CausalLM.new_cache` takes it.
    """
    context = model.config.max_position_embeddings
    rows = 1 << (batch - 1).bit_length()
    length = min(-(-max_length // _LENGTHS) * _LENGTHS, context)
    kept = _kept.pop(model, None)
    if kept is not None:
        layers, *_, kv_heads, head_dim = kept.graphed._whole.keys.shape
        shape = torch.Size((layers, rows, length, kv_heads, head_dim))
        if kept.serves(model, shape, dtype or model.model.embed_tokens.weight.dtype):
            return kept.wake(step, batch)
        # before there is another cache
        del kept
    cache = model.new_cache(rows, length, dtype=dtype)
    graphed = GraphedStep(step(cache), cache)
    cache.keep(range(batch))
    return graphed, cache


def keep(model: CausalLM, step: Any) -> None:
    """Keep the graphs of a step that is done, if it is one of :func:`graphed_step`."""
    if isinstance(step, GraphedStep) and all(map(_is_its_weights, model.modules())):
        _kept[model] = _Kept(model, step)


def _is_its_weights(module: nn.Module) -> bool:
    """Whether nothing but the weights of a module, and what is in it, says what it computes.

    Linear layers of others may have switches, as adapters do.
    """
    kind = type(module)
    return kind in (nn.Linear, nn.Embedding, nn.ModuleList) or kind.__module__.startswith("fastlm.")


def _addresses(model: nn.Module) -> list[tuple[int, torch.dtype]]:
    """Where a graph finds the weights."""
    return [(x.data_ptr(), x.dtype) for x in (*model.parameters(), *model.buffers())]


def _rests(tokens: Tensor) -> Tensor:
    raise RuntimeError("GraphedStep: the generation that it was made for has ended")
