"""attention_with_kv_cache: random caches, and how its results are judged."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastlm
from fastlm.kernels.attention_with_kv_cache import tuning
from fastlm.ops.reference import attention_with_kv_cache as reference
from fastlm.testing import assert_as_accurate


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

    def __call__(self, backend: str, **more: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """out, lse and both caches after the call, which are copies."""
        k_cache, v_cache = self.k_cache.clone(), self.v_cache.clone()
        options = {"cache_seqlens": self.seqlens, **self.options, **more}
        with torch.no_grad():
            out, lse = fastlm.attention_with_kv_cache(
                self.query, k_cache, v_cache, return_lse=True, backend=backend, **options
            )
        return out, lse, k_cache, v_cache

    @property
    def seqlens(self) -> Tensor:
        return torch.tensor(self.lengths, dtype=torch.int32, device=self.query.device)

    def tensors(self) -> dict[str, Tensor]:
        """The positional arguments by name, caches copied."""
        caches = {"k_cache": self.k_cache.clone(), "v_cache": self.v_cache.clone()}
        return {"query": self.query, **caches}

    def of_row(self, row: int) -> Call:
        """The same call for one row of the batch alone."""
        table = self.options.get("block_table")
        at = slice(row, row + 1)
        caches = (self.k_cache, self.v_cache)
        if table is None:
            caches = tuple(x[at] for x in caches)
        changed = {name: x[at] for name, x in self.options.items() if name in ("key", "value")}
        if table is not None:
            changed["block_table"] = table[at]
        options = {**self.options, **changed}
        return Call(self.query[at], *caches, self.lengths[at], options)

    def whole(self) -> Call:
        """The same tokens in a cache without pages."""
        table = self.options["block_table"].long()
        k_cache, v_cache = (x[table].flatten(1, 2) for x in (self.k_cache, self.v_cache))
        options = {name: x for name, x in self.options.items() if name != "block_table"}
        return dataclasses.replace(self, k_cache=k_cache, v_cache=v_cache, options=options)

    def arguments(self) -> tuple[Any, ...]:
        """What the forward step of a backend takes."""
        get = self.options.get
        scale = get("scale")
        return (
            self.query, self.k_cache, self.v_cache, get("key"), get("value"), self.seqlens,
            get("block_table"), get("rotary_cos"), get("rotary_sin"), get("sinks"), 0,
            get("rotary_interleaved", False),
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
    seed: int = 0,
    **options: Any,
) -> Call:
    """Random arguments; ``rotary`` is how many channels turn, ``page_size`` 0 for whole caches."""
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
    return Call(query, caches[0], caches[1], list(lengths), options)


def judge(one: Call, backend: str, **more: Any) -> None:
    """Hold a call to the tolerance rule, and what it wrote to the reference's."""
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
    out, lse, k_cache, v_cache = one(backend, **more)
    *_, k_expected, v_expected = one("reference")
    _check_written("k_cache", k_cache, k_expected, one.k_cache)
    _check_written("v_cache", v_cache, v_expected, one.v_cache)
    plain = reference.plain_forward(*one.arguments())
    truth = reference.truth_forward(*one.arguments())
    return list(zip((out, lse), plain, truth, strict=True))


def _judge(results: Sequence[tuple[Tensor, ...]]) -> None:
    for name, (actual, plain, truth) in zip(("out", "lse"), results, strict=True):
        assert_as_accurate(name, actual, plain=plain, truth=truth)


def _check_written(name: str, got: Tensor, want: Tensor, before: Tensor) -> None:
    written = ~same(want, before)
    assert same(got, before)[~written].all(), f"{name}: a token was written that is not new"
    if written.any():
        error = (got[written].double() - want[written].double()).abs().max()
        # one rounding: torch's rotation may use a fused multiply-add, the interpreter has none
        allowed = torch.finfo(got.dtype).eps * want[written].double().abs().max()
        assert error <= allowed, f"{name}: {error} off, {allowed} allowed"


def same(a: Tensor, b: Tensor) -> Tensor:
    """Element by element, NaN being equal to NaN."""
    return (a == b) | (a.isnan() & b.isnan())


def assert_equal(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    for got, want in zip(actual, expected, strict=True):
        assert same(got, want).all()


def placed(options: dict[str, Any], device: str) -> dict[str, Any]:
    """``options`` with their tensors on ``device``."""
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()}
