"""How DTensor splits causal attention over processes: rules for its operators.

Rows of the batch are independent, and so are heads.  Importing this module hands the rules to
DTensor.  :func:`causal_attention` imports it when it first meets a DTensor, in the middle of a
compilation too, and no sooner: DTensor takes a second to import.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._op_schema import (
    OpSchema,
    OpStrategy,
    PlacementList,
    RuntimeSchemaInfo,
)
from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy
from torch.distributed.tensor.placement_types import Placement

# the dimension of each tensor that is split, of those with one
_BATCH = {
    "query": 0, "key": 0, "value": 0, "out": 0, "lse": 0, "dout": 0, "dlse": 0,
    "key_start": 0, "key_end": 0,
}  # fmt: skip
_HEADS = {
    "query": 2, "key": 2, "value": 2, "out": 2, "lse": 1, "dout": 2, "dlse": 1, "sinks": 0,
}  # fmt: skip
# with one key head for all: each process then has that key, and a part of its gradient
_HEADS_OF_ONE_KEY = {name: dim for name, dim in _HEADS.items() if name not in ("key", "value")}

# each result: the tensor that it is split like, and the argument that says whether it is needed
_FORWARD = (("out", None), ("lse", None))
_BACKWARD = (
    ("query", "need_dquery"),
    ("key", "need_dkey_dvalue"),
    ("value", "need_dkey_dvalue"),
    ("lse", "need_dsinks"),
)


def _ways_to_split(results: tuple[tuple[str, str | None], ...], schema: OpSchema) -> OpStrategy:
    names = [argument.name for argument in schema.op._schema.arguments]
    given: dict[str, Any] = dict(zip(names, schema.args_schema, strict=True))
    inputs = [name for name, value in given.items() if isinstance(value, OpStrategy)]
    heads, kv_heads = given["query"].shape[2], given["key"].shape[2]

    def over(dims: dict[str, int]) -> PlacementList:
        """Placements of results and inputs on one dimension of the mesh."""

        def placed(name: str) -> Placement:
            return Shard(dims[name]) if name in dims else Replicate()

        def placed_result(name: str, need: str | None) -> Placement:
            if need is not None and not given[need]:
                return Replicate()  # it is empty
            return Partial() if dims and name not in dims else placed(name)

        return [*(placed_result(*result) for result in results), *map(placed, inputs)]

    def keeps_heads_with_their_key(input_specs: list[DTensorSpec], _: object) -> bool:
        """Chunks of query heads and of key heads belong together if all are of one size."""
        parts = input_specs[inputs.index("query")].num_shards_map[2]
        return (heads if kv_heads == 1 else kv_heads) % parts == 0

    return expand_to_full_mesh_op_strategy(
        schema.get_mesh_from_args(),
        schema,
        [over({}), over(_BATCH), over(_HEADS if kv_heads > 1 else _HEADS_OF_ONE_KEY)],
        input_index=len(results),
        is_valid_strategy_cb=keeps_heads_with_their_key,
    )


def _register() -> None:
    operators = torch.ops.fastlm
    for operator, results, inputs in (
        (operators.causal_attention_forward.default, _FORWARD, 8),
        (operators.causal_attention_backward.default, _BACKWARD, 12),
    ):
        DTensor._op_dispatcher.sharding_propagator.register_op_strategy(
            operator,
            partial(_ways_to_split, results),
            # what follows the tensors is part of the key under which DTensor keeps its choice
            RuntimeSchemaInfo(inputs),
        )


_register()
