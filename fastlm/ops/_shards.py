"""A linear layer whose classes are split over processes: what a call is given, and its checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastlm.kernels._shards import mark_of
from fastlm.ops._checks import (
    INDEX_DTYPES,
    PLAIN,
    check_dtype,
    check_shape,
    check_tensor,
    check_that,
    is_distributed,
)

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class ShardedLayer(NamedTuple):
    """The tensors of a call on this process.

    Attributes:
        linear_weight: ``(classes here, C)``; rank r of n has the classes [r S, (r + 1) S), where S
            is V / n rounded up.
        linear_bias: ``(classes here,)``.
        group: Registered name of the processes.
        num_classes: V.
    """

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    group: str
    num_classes: int


class ShardedLoss(NamedTuple):
    """:class:`ShardedLayer`, and what a loss needs.

    Attributes:
        weight: ``(V,)``.
    """

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    weight: Tensor | None
    group: str
    num_classes: int


def sharded_loss(
    op: str,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    process_group: dist.ProcessGroup | None,
) -> ShardedLoss:
    """:func:`sharded_layer` of a loss, whose targets and class weights every rank has whole."""
    if is_distributed(linear_weight):
        matrix: DTensor = linear_weight  # type: ignore[assignment]
        target = _replica(op, "target", target, matrix)
        weight = None if weight is None else _replica(op, "weight", weight, matrix)
    check_tensor(op, "target", target)
    check_dtype(op, "target", target, INDEX_DTYPES)
    if weight is not None:
        check_tensor(op, "weight", weight)
        check_dtype(op, "weight", weight)
    input, linear_weight, linear_bias, group, num_classes = sharded_layer(
        op, input, linear_weight, linear_bias, process_group, target=target
    )
    return ShardedLoss(input, linear_weight, linear_bias, target, weight, group, num_classes)


def sharded_layer(
    op: str,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    process_group: dist.ProcessGroup | None,
    **shared: Tensor | int,
) -> ShardedLayer:
    """Check how the layer is split, and take the part of this process.

    An error that one rank alone raises leaves the others waiting for it, so these checks look at
    what all ranks know, or, on CPU, ask them first.  Types are refused before; what else one rank
    alone has wrong, the shape of class weights say, is its error and the others' wait.

    Args:
        op: Who asks.
        input: Whole on every rank.
        linear_weight: ``(classes here, C)``, or a DTensor.
        linear_bias: Split as ``linear_weight`` is.
        process_group: None takes a DTensor's.
        shared: What else must be the same on all ranks, under the names of the arguments.

    Raises:
        ValueError: ``linear_weight`` is no DTensor with ``Shard(0)`` over a mesh of one dimension,
            another tensor is distributed otherwise, or ``process_group`` is not the mesh's; on CPU,
            ranks differ in the sizes of their inputs, their numbers of classes, or what is shared.
        TypeError: ``process_group`` is none, or not one of this process; an argument is no tensor.
    """
    if process_group is not None and not (
        dist.is_available() and isinstance(process_group, dist.ProcessGroup)
    ):
        raise TypeError(
            f"{op}: process_group must be a ProcessGroup that this process belongs to, "
            f"got {process_group!r}"
        )
    if process_group is None or is_distributed(linear_weight):
        matrix: DTensor = linear_weight  # type: ignore[assignment]
        group, num_classes = _group_of(op, matrix, process_group), matrix.shape[0]
        linear_bias = _shard_beside(op, "linear_bias", linear_bias, matrix)
        input = _replica(op, "input", input, matrix)
        linear_weight = matrix.to_local()
    else:
        check_tensor(op, "linear_weight", linear_weight)
        check_shape(op, "linear_weight", linear_weight, ("V / ranks", "C"))
        group = process_group
        num_classes = linear_weight.shape[0] * dist.get_world_size(group)
    params = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    for name, x in params.items():
        if x is not None:
            check_tensor(op, name, x)
            check_dtype(op, name, x)
    tensors = [input, linear_weight, *(x for x in shared.values() if isinstance(x, Tensor))]
    if not torch.compiler.is_compiling() and all(type(x) in PLAIN and x.is_cpu for x in tensors):
        _check_agreement(op, input, linear_weight, linear_bias, shared, group, num_classes)
    check_that(op, "linear_weight", num_classes > 0, "have at least one class", "V = 0")
    return ShardedLayer(input, linear_weight, linear_bias, group.group_name, num_classes)


def _group_of(
    op: str, matrix: DTensor, process_group: dist.ProcessGroup | None
) -> dist.ProcessGroup:
    from torch.distributed.tensor import Shard

    mesh, placements = matrix.device_mesh, tuple(matrix.placements)
    fits = mesh.ndim == 1
    check_that(op, "linear_weight", fits, "be sharded over a mesh of 1 dimension", f"{mesh.ndim}")
    fits = type(placements[0]) is Shard and placements[0].dim == 0
    check_that(op, "linear_weight", fits, "have the placement Shard(0)", placements)
    group = mesh.get_group()
    if process_group is not None and process_group.group_name != group.group_name:
        name = process_group.group_name
        check_that(op, "process_group", False, "be None or that of linear_weight's mesh", name)
    return group


def _shard_beside(op: str, name: str, tensor: Tensor | None, matrix: DTensor) -> Tensor | None:
    """The part here of a tensor that must be split as ``matrix`` is."""
    if tensor is None:
        return None
    requirement = "be a DTensor placed as linear_weight is"
    if not is_distributed(tensor):
        check_that(op, name, False, requirement, f"a {type(tensor).__name__}")
    vector: DTensor = tensor  # type: ignore[assignment]
    same = vector.device_mesh == matrix.device_mesh and vector.placements == matrix.placements
    check_that(op, name, same, requirement, f"{vector.placements} over {vector.device_mesh}")
    check_shape(op, name, vector, matrix.shape[:1], "to match linear_weight")
    return vector.to_local()


def _replica(op: str, name: str, tensor: Tensor, matrix: DTensor) -> Tensor:
    """A tensor that every rank has the whole of."""
    if not is_distributed(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    replica: DTensor = tensor  # type: ignore[assignment]
    everywhere = replica.device_mesh == matrix.device_mesh and all(
        type(placement) is Replicate for placement in replica.placements
    )
    got = f"{replica.placements} over {replica.device_mesh}"
    requirement = "be a local tensor, or replicated over linear_weight's mesh"
    check_that(op, name, everywhere, requirement, got)
    return replica.to_local(grad_placements=[Replicate()])


def _check_agreement(
    op: str,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    shared: Mapping[str, Tensor | int],
    group: dist.ProcessGroup,
    num_classes: int,
) -> None:
    """Compare what the ranks have, and raise on all of them or on none."""
    mine = {
        "linear_weight": linear_weight.shape[0],
        "input": input.numel(),
        "input's width": linear_weight.shape[-1],
        "input's dtype": input.itemsize,
        "input's need of a gradient": int(input.requires_grad and torch.is_grad_enabled()),
        "linear_bias": -1 if linear_bias is None else linear_bias.numel() - linear_weight.shape[0],
    }
    for name, value in shared.items():
        mine[name] = int(mark_of(value)) if isinstance(value, Tensor) else value
    all_of = [torch.empty(len(mine), dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_of, torch.tensor(list(mine.values())), group=group)
    sizes, *rest = torch.stack(all_of, 1)
    largest = -(-num_classes // len(all_of))
    expected = (num_classes - largest * torch.arange(len(all_of))).clamp(0, largest)
    even, shown = torch.equal(sizes, expected), [int(size) for size in sizes]
    check_that(op, "linear_weight", even, "be split evenly over the ranks", f"{shown} classes")
    for name, found in zip(list(mine)[1:], rest, strict=True):
        same = bool((found == found[0]).all())
        check_that(op, name, same, "be the same on all ranks", "one that differs")
