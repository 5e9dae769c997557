"""Judge an op whose definition is a few lines of torch: results, gradients, their subsets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlm.testing import assert_as_accurate

KERNELS = ("triton", "cuda")


def judged(
    shapes: Sequence[Any], dtypes: Sequence[torch.dtype], backends: Sequence[str]
) -> list[Any]:
    """Parameters ``shape``, ``dtype``, ``backend``, all together; some of the kernels' take long.

    Their float64 is left to gradcheck: there the definition is as wrong as what it would judge.
    """
    return [
        pytest.param(
            shape, dtype, backend,
            id=f"{'x'.join(map(str, shape))}-{str(dtype).removeprefix('torch.')}-{backend}",
            marks=[pytest.mark.slow] * (backend in KERNELS and (at + to) % 3 > 0),
        )
        for at, shape in enumerate(shapes)
        for to, dtype in enumerate(dtypes)
        for backend in backends
        if backend not in KERNELS or dtype != torch.float64
    ]  # fmt: skip


def outputs_and_gradients(
    function: Callable[..., Any], inputs: Sequence[Tensor], upstream: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs, then the gradient of each input; ``upstream`` is cast to the outputs' dtype."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = function(*leaves)
    outputs = results if isinstance(results, tuple) else (results,)
    incoming = [grad.to(out.dtype) for grad, out in zip(upstream, outputs, strict=True)]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, incoming)]


def assert_agrees(
    name: str,
    op: Callable[..., Any],
    definition: Callable[..., Any],
    inputs: Sequence[Tensor],
) -> None:
    """Hold ``op`` and its gradients to ``definition`` by the tolerance rule.

    The truth is the definition in float64 from the same rounded inputs and incoming gradients; the
    yardstick is the definition in float32, or wider, rounded once.
    """
    results = op(*inputs)
    outputs = results if isinstance(results, tuple) else (results,)
    upstream = [torch.randn(x.shape, dtype=torch.float64).to(x) for x in outputs]
    actual = outputs_and_gradients(op, inputs, upstream)
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in inputs]
    plain = outputs_and_gradients(definition, wide, upstream)
    exact = outputs_and_gradients(definition, [x.double() for x in inputs], upstream)
    for position, (got, usual, want) in enumerate(zip(actual, plain, exact, strict=True)):
        label = f"{name}[{position}]"
        assert_as_accurate(label, got, plain=usual.to(got.dtype), truth=want)


def assert_same_for_every_subset(op: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    """Each gradient is the same whichever others are asked for."""
    first = op(*inputs)
    outputs = first if isinstance(first, tuple) else (first,)
    upstream = [torch.randn(x.shape).to(x) for x in outputs]
    everything = outputs_and_gradients(op, inputs, upstream)[len(outputs) :]
    for needed in product((False, True), repeat=len(inputs)):
        leaves = [x.detach().requires_grad_(n) for x, n in zip(inputs, needed, strict=True)]
        results = op(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        assert all(x.requires_grad == any(needed) for x in results)
        if any(needed):
            torch.autograd.backward(results, upstream)
        for leaf, grad, wanted in zip(leaves, everything, needed, strict=True):
            assert (leaf.grad is None) != wanted
            if wanted:
                torch.testing.assert_close(leaf.grad, grad, rtol=0, atol=0)
