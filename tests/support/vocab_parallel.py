"""Calls of linear_cross_entropy with split classes, made on one of several ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from support.linear_cross_entropy import inputs
from support.losses import flattened, linear_definition, weights
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

import fastlm
from fastlm import testing


def part(num_classes: int) -> slice:
    """The classes of this rank."""
    largest = -(-num_classes // dist.get_world_size())
    return slice(dist.get_rank() * largest, (dist.get_rank() + 1) * largest)


def by_group(
    x: Tensor, matrix: Tensor, bias: Tensor | None, targets: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    return flattened(
        fastlm.linear_cross_entropy(
            x, matrix, targets, linear_bias=bias, process_group=dist.group.WORLD, **options
        )
    )


def distributed(shard: Tensor, num_classes: int) -> DTensor:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shape = torch.Size((num_classes, *shard.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(shard, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def judge(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    options: dict[str, Any],
    *,
    as_dtensor: bool = False,
    has_bias: bool = True,
    scale: float = 1.0,
) -> None:
    """Loss, statistics and gradients against torch's of the whole layer.

    In float64 they must be close, in other dtypes as accurate by the tolerance rule, whose numbers
    mean something for many elements.

    Args:
        shape: Rows, width, classes.
        dtype: Of input and layer.
        options: Of the loss, as in ``support.losses``, and the backend.
        as_dtensor: Hand over DTensors, and not a group.
        has_bias: Of the layer.
        scale: Of the layer.
    """
    x, matrix, bias, targets = inputs(*shape, dtype)
    matrix, bias, num_classes = scale * matrix, scale * bias, shape[2]
    here = part(num_classes)
    given = dict(options)
    if "weight" in options:
        given["weight"] = weights(num_classes, "cpu")

    def call(x: Tensor, matrix: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, ...]:
        if not as_dtensor:
            return by_group(x, matrix, bias, targets, **given)
        vector = None if bias is None else distributed(bias, num_classes)
        return flattened(
            fastlm.linear_cross_entropy(
                x, distributed(matrix, num_classes), targets, linear_bias=vector, **given
            )
        )

    layer = (matrix, bias if has_bias else None)
    shard = (matrix[here], bias[here] if has_bias else None)
    actual = testing.run(call, x, *shard, targets)
    by_torch = {key: value for key, value in options.items() if key != "backend"}
    wide = torch.promote_types(dtype, torch.float32)
    plain, truth = (
        testing.run(linear_definition, x, *layer, targets, dtype=precision, **by_torch)
        for precision in (wide, torch.float64)
    )
    first = len(actual) - 1 - has_bias
    for results in (plain, truth):
        results[first:] = [None if g is None else g[here] for g in results[first:]]
    if dtype == torch.float64:
        torch.testing.assert_close(actual, truth)
    else:
        testing.assert_all_as_accurate("sharded", actual, plain=plain, truth=truth)


def whole_dtensor(tensor: Tensor) -> DTensor:
    return distributed(tensor[part(len(tensor))], len(tensor))
