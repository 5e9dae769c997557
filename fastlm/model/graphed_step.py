"""A decoding step as a CUDA graph: one launch instead of some hundred."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastlm.model.kv_cache import KVCache

# Runs before the capture, in which kernels are compiled and libraries make their workspaces.
_WARM_UPS = 2


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

    def __init__(self, step: Callable[[Tensor], Tensor], cache: KVCache) -> None:
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
