"""Inputs and oracles for judging an op, shared by users, tests and benchmarks.

logits, targets = testing.cross_entropy_inputs(64, 50_257, torch.bfloat16)
actual = testing.run(fastlm.cross_entropy, logits, targets)
plain = testing.run(F.cross_entropy, logits, targets, dtype=torch.float32)
truth = testing.run(F.cross_entropy, logits, targets, dtype=torch.float64)
testing.assert_all_as_accurate("cross_entropy", actual, plain=plain, truth=truth)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm.ops._checked import as_tuple
from fastlm.ops._checks import PLAIN
from fastlm.ops._tolerance import compare

__all__ = [
    "assert_all_as_accurate",
    "assert_as_accurate",
    "attention_inputs",
    "cross_entropy_inputs",
    "run",
]


def assert_as_accurate(
    name: str, actual: Tensor, *, plain: Tensor, truth: Tensor, multiple: float = 2.0
) -> None:
    """Check that ``actual`` is about as close to the truth as plain PyTorch is.

    Args:
        name: What is compared, for the message.
        actual: The result to judge.
        plain: The same from eager torch in the dtype of ``actual``.
        truth: The same in float64 from the same rounded inputs.
        multiple: 2, or 3 for attention gradients with softcap or head_dim above 128.

    Raises:
        AssertionError: The tolerance rule of :mod:`fastlm.ops._tolerance` is broken.
    """
    mismatch = compare(actual, plain, truth, multiple=multiple)
    assert mismatch is None, f"{name}: {mismatch}"


def assert_all_as_accurate(
    name: str,
    actual: Sequence[Tensor | None],
    *,
    plain: Sequence[Tensor | None],
    truth: Sequence[Tensor | None],
    multiple: float = 2.0,
) -> None:
    """:func:`assert_as_accurate` for each result of :func:`run`; integers must be equal."""
    for position, (got, usual, want) in enumerate(zip(actual, plain, truth, strict=True)):
        if got is None or usual is None or want is None:
            assert got is want is usual is None, f"{name}[{position}]: a gradient is missing"
            continue
        if not got.is_floating_point():
            assert torch.equal(got, want), f"{name}[{position}]: integers differ"
            continue
        usual = usual.to(got.dtype)
        assert_as_accurate(f"{name}[{position}]", got, plain=usual, truth=want, multiple=multiple)


def run(
    function: Callable[..., Any],
    *inputs: Any,
    dtype: torch.dtype | None = None,
    backward: bool = True,
    upstream_seed: int = 0,
    **kwargs: Any,
) -> list[Tensor | None]:
    """Outputs of ``function`` and its gradients with respect to each float input, in one list.

    Args:
        function: Takes ``inputs`` and ``kwargs``; returns a tensor or a tuple.
        inputs: Tensors and other values; float tensors are detached first, strides kept.
        dtype: Cast float tensors to this before.
        backward: Also compute gradients.
        upstream_seed: Incoming gradients are random, the same for every dtype and device.
        kwargs: Passed on; plain float tensors among them are cast too.
    """
    leaves = [_leaf(x, dtype, backward) for x in inputs]
    if dtype is not None:
        kwargs = {name: _cast(x, dtype) for name, x in kwargs.items()}
    outputs = [x for x in as_tuple(function(*leaves, **kwargs)) if x is not None]
    floats = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
    results: list[Tensor | None] = [x.detach() for x in outputs]
    needing = [x for x in outputs if x.requires_grad]
    if not backward or not needing:
        return results
    generator = torch.Generator().manual_seed(upstream_seed)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in needing]
    return [*results, *torch.autograd.grad(needing, floats, upstream, allow_unused=True)]


def _leaf(x: Any, dtype: torch.dtype | None, requires_grad: bool) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.detach().to(dtype or x.dtype).requires_grad_(requires_grad)


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if type(x) in PLAIN and x.is_floating_point() else x


def attention_inputs(
    batch: int,
    num_queries: int,
    num_keys: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    value_dim: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query ``(B, T, H, D)``, key ``(B, S, G, D)`` and value ``(B, S, G, Dv)``, standard normal."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, num_queries, heads, head_dim),
        (batch, num_keys, kv_heads, head_dim),
        (batch, num_keys, kv_heads, value_dim or head_dim),
    )
    query, key, value = (torch.randn(x, generator=generator).to(device, dtype) for x in shapes)
    return query, key, value


def cross_entropy_inputs(
    rows: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    ignored: float = 0.25,
    likely: float = 0.5,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Logits ``(rows, vocab_size)`` with a peak in each row, and targets.

    Uniform logits would hide a column that is counted twice or not at all.  About ``likely`` of the
    targets are at the peak, and then ``ignored`` of all become -100.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    logits = 3 * torch.randn(rows, vocab_size, generator=generator, dtype=wide)
    peaks = torch.randint(vocab_size, (rows,), generator=generator)
    logits[torch.arange(rows), peaks] += 8
    targets = torch.randint(vocab_size, (rows,), generator=generator)
    agreeing = torch.rand(rows, generator=generator) < likely
    targets = torch.where(agreeing, peaks, targets)
    targets[torch.rand(rows, generator=generator) < ignored] = -100
    return logits.to(device, dtype), targets.to(device)
