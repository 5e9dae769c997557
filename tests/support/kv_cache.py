"""attention_with_kv_cache: random caches, and how its results are judged."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastlm
from fastlm.kernels.attention_with_kv_cache import tuning
from fastlm.ops.reference import attention_with_kv_cache as reference
from fastlm.ops.reference.attention_with_kv_cache import quantized
from fastlm.testing import assert_as_accurate

SCALES = ("k_scale", "v_scale")


@contextlib.contextmanager
def small_splits(keys: int = 16, most: int = 3) -> Iterator[None]:
    """Blocks of 16 by 16 and splits so small that a short row has several."""
    row = tuning.Plan(16, 16, num_warps=4, num_stages=1)
    with (
        mock.patch.object(tuning, "plan", lambda *_: row),
        mock.patch.object(tuning, "SPLIT_KEYS", keys),
        mock.patch.object(tuning, "MOST_SPLITS", most),
    ):
        yield


@dataclass(frozen=True)
class Call:
    """Arguments of one call.  What no row has in the caches is NaN.

    Attributes:
        query: ``(B, T, H, D)``.
        k_cache: ``(B, S_max, G, D)`` or pages.
        v_cache: The same with Dv.
        lengths: Tokens of each row before the call.
        options: The other arguments.
    """

    query: Tensor
    k_cache: Tensor
    v_cache: Tensor
    lengths: list[int]
    options: dict[str, Any]

    def __call__(self, backend: str, **more: Any) -> tuple[Tensor, ...]:
        """out, lse, both caches and their scales after the call, which are copies."""
        written = {name: x.clone() for name, x in self.written.items()}
        options = {"cache_seqlens": self.seqlens, **self.options, **written, **more}
        with torch.no_grad():
            out, lse = fastlm.attention_with_kv_cache(
                self.query, return_lse=True, backend=backend, **options
            )
        return out, lse, *written.values()

    @property
    def written(self) -> dict[str, Tensor]:
        """The arguments that are written in place."""
        caches = {"k_cache": self.k_cache, "v_cache": self.v_cache}
        return caches | {name: x for name, x in self.options.items() if name in SCALES}

    def holding(self, *written: Tensor) -> Call:
        """The same call of caches and scales that hold something else."""
        k_cache, v_cache, *scales = written
        options = self.options | dict(zip(SCALES, scales, strict=False))
        return dataclasses.replace(self, k_cache=k_cache, v_cache=v_cache, options=options)

    @property
    def seqlens(self) -> Tensor:
        return torch.tensor(self.lengths, dtype=torch.int32, device=self.query.device)

    def tensors(self) -> dict[str, Tensor]:
        """The positional arguments by name, caches copied; and the scales."""
        return {"query": self.query, **{name: x.clone() for name, x in self.written.items()}}

    def of_row(self, row: int) -> Call:
        """The same call for one row of the batch alone."""
        table = self.options.get("block_table")
        at = slice(row, row + 1)
        changed = {name: x[at] for name, x in self.options.items() if name in ("key", "value")}
        if table is not None:
            changed["block_table"] = table[at]
        written = [x if table is not None else x[at] for x in self.written.values()]
        one = self.holding(*written)
        options = {**one.options, **changed}
        return dataclasses.replace(
            one, query=self.query[at], lengths=self.lengths[at], options=options
        )

    def whole(self) -> Call:
        """The same tokens in a cache without pages."""
        table = self.options["block_table"].long()
        one = self.holding(*(x[table].flatten(1, 2) for x in self.written.values()))
        options = {name: x for name, x in one.options.items() if name != "block_table"}
        return dataclasses.replace(one, options=options)

    def with_counts(self, counts: Sequence[int], spare: int = 2) -> Call:
        """The first ``counts`` queries and tokens of the rows, side by side, and NaN after them."""

        def joined(x: Tensor) -> Tensor:
            rows = [row[:count] for row, count in zip(x, counts, strict=True)]
            return torch.cat([*rows, x.new_full((spare, *x.shape[2:]), torch.nan)])[None]

        tokens = {name: joined(x) for name, x in self.options.items() if name in ("key", "value")}
        bounds = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
        options = {**self.options, **tokens, "cu_seqlens_q": bounds.to(self.query.device)}
        return dataclasses.replace(self, query=joined(self.query), options=options)

    def arguments(self) -> tuple[Any, ...]:
        """What the forward step of a backend takes."""
        get = self.options.get
        scale = get("scale")
        return (
            self.query, self.k_cache, self.v_cache, get("k_scale"), get("v_scale"), get("key"),
            get("value"), self.seqlens, get("block_table"), get("cu_seqlens_q"), get("rotary_cos"),
            get("rotary_sin"), get("sinks"), 0, get("rotary_interleaved", False),
            self.query.shape[-1] ** -0.5 if scale is None else scale,
            get("window_size"), get("softcap"), None,
        )  # fmt: skip


def call(
    lengths: Sequence[int],
    num_queries: int = 1,
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    capacity: int = 100,
    page_size: int = 0,
    value_dim: int | None = None,
    appends: bool = True,
    rotary: int = 0,
    int8: bool = False,
    seed: int = 0,
    **options: Any,
) -> Call:
    """Random arguments; ``rotary`` is how many channels turn, ``page_size`` 0 for whole caches.

    What no row has in int8 caches has the scale NaN and the integer 99.
    """
    generator = torch.Generator().manual_seed(seed)
    value_dim = head_dim if value_dim is None else value_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    batch = len(lengths)
    query = normal(batch, num_queries, heads, head_dim)
    if page_size:
        max_pages = -(-capacity // page_size)
        # pages lie anywhere, and three belong to nobody
        pages = torch.randperm(batch * max_pages + 3, generator=generator).to(device)
        table = pages[: batch * max_pages].view(batch, max_pages).int()
        options["block_table"] = table
        shape = (len(pages), page_size, kv_heads)
    else:
        shape = (batch, capacity, kv_heads)
    caches = [normal(*shape, head_dim), normal(*shape, value_dim)]
    for row, length in enumerate(lengths):
        for cache in caches:
            if page_size:
                for page, at in enumerate(table[row].tolist()):
                    cache[at, max(0, length - page * page_size) :] = torch.nan
            else:
                cache[row, length:] = torch.nan
    if page_size:
        for cache in caches:
            cache[pages[batch * max_pages :]] = torch.nan
    if appends:
        options["key"] = normal(batch, num_queries, kv_heads, head_dim)
        options["value"] = normal(batch, num_queries, kv_heads, value_dim)
    if rotary:
        angles = torch.randn(capacity, rotary // 2, generator=generator).to(device)
        options |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    if int8:
        caches, scales = map(list, zip(*(quantized(x) for x in caches), strict=True))
        for cache, scale in zip(caches, scales, strict=True):
            cache[scale.isnan()] = 99
        options |= zip(SCALES, scales, strict=True)
    return Call(query, caches[0], caches[1], list(lengths), options)


def judge(one: Call, backend: str, **more: Any) -> None:
    """Hold what a call wrote to the tolerance rule, and attention over that."""
    _judge(_three(one, backend, more))


def judge_pooled(calls: Sequence[Call], backend: str) -> None:
    """The same for calls too small to be judged one by one: those of a dtype together."""
    for dtype in {one.query.dtype for one in calls}:
        rows = [_three(one, backend, {}) for one in calls if one.query.dtype == dtype]
        _judge(
            [tuple(torch.cat([x.flatten() for x in kind]) for kind in zip(*results, strict=True))
             for results in zip(*rows, strict=True)]
        )  # fmt: skip


def _three(one: Call, backend: str, more: dict[str, Any]) -> list[tuple[Tensor, ...]]:
    """Actual, plain and true results, for out and for lse."""
    out, lse, *written = one(backend, **more)
    _check_written(one, written)
    after = one.holding(*written)
    plain = reference.plain_forward(*after.arguments())
    truth = reference.truth_forward(*after.arguments())
    return list(zip((out, lse), plain, truth, strict=True))


def _judge(results: Sequence[tuple[Tensor, ...]]) -> None:
    for name, (actual, plain, truth) in zip(("out", "lse"), results, strict=True):
        assert_as_accurate(name, actual, plain=plain, truth=truth)


def _check_written(one: Call, written: Sequence[Tensor]) -> None:
    expected = reference.written_forward(*one.arguments())
    for (name, before), got, (at, plain, truth) in zip(
        one.written.items(), written, expected, strict=True
    ):
        assert_as_accurate(name, got[at], plain=plain, truth=truth)
        untouched = before.clone()
        untouched[at] = got[at]
        assert same(got, untouched).all(), f"{name}: a token was written that is not new"


def same(a: Tensor, b: Tensor) -> Tensor:
    """Element by element, NaN being equal to NaN."""
    return (a == b) | (a.isnan() & b.isnan())


def assert_equal(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    for got, want in zip(actual, expected, strict=True):
        assert same(got, want).all()


def placed(options: dict[str, Any], device: str) -> dict[str, Any]:
    """``options`` with their tensors on ``device``."""
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()}
