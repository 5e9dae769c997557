"""Compile every row of every tuning table for a GPU that is not there.

:data:`LAUNCHES` says, op by op, how to reach the rows: a function of a dtype that calls the launch
functions of the op on meta tensors, with all options off and sizes that divide by 16, and with all
options on and sizes that nothing divides.  ``python -m support.ahead`` is the child process that
compiles; it must not interpret.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from support.lint import float_atomics, narrow_products
from torch import Tensor

from fastlm.kernels import (
    _ahead,
    _runtime,
    attention,
    attention_with_kv_cache,
    cross_entropy,
    glu,
    linear_cross_entropy,
    linear_top_k,
    rms_norm,
    rotary,
)
from fastlm.kernels._chunks import Operand, Upstream
from fastlm.kernels._launch import Launch, recorded
from fastlm.kernels._runtime import device_of, pretend
from fastlm.kernels._shards import Shard
from fastlm.kernels.attention.tuning import Plan, shared_memory
from fastlm.kernels.attention.tuning import plan as attention_plan
from fastlm.kernels.linear_cross_entropy import chunk
from fastlm.kernels.linear_top_k.launch import launch_top_k
from fastlm.ops.glu import ACTIVATIONS

ARCHES = (80, 86, 89, 90, 100, 120)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WITH_FLOAT64 = (*DTYPES, torch.float64)  # which only the interpreter runs: reached, not compiled


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# weight, ignore_index, label_smoothing, softcap, logit_scale
NO_LOSS_OPTIONS = (None, -100, 0.0, None, 1.0)


def all_loss_options(vocab_size: int) -> tuple[Any, ...]:
    return empty(vocab_size, dtype=torch.float32), -100, 0.1, 30.0, 0.5


def cross_entropy_launches(dtype: torch.dtype) -> None:
    for vocab_size in (512, 4_096, 50_304):
        _cross_entropy(empty(8, vocab_size, dtype=dtype), with_options=False)
        # a slice of a padded vocabulary, one token short: nothing divides by 16
        padded = empty(2, 5, vocab_size + 1, dtype=dtype)[:, :-1, : vocab_size - 3]
        _cross_entropy(padded, with_options=True)


def _cross_entropy(logits: Tensor, *, with_options: bool) -> None:
    targets = empty(*logits.shape[:-1], dtype=torch.int64)
    weight, *options = all_loss_options(logits.shape[-1]) if with_options else NO_LOSS_OPTIONS
    losses, maximum, log_sum, *stats = cross_entropy.forward(
        logits, targets, weight, *options, with_options
    )
    logprobs, entropy, _ = stats
    upstream = (losses, logprobs, losses, entropy) if with_options else (losses, None, None, None)
    cross_entropy.backward(*upstream, logits, targets, weight, maximum, log_sum, entropy, *options)


def linear_cross_entropy_launches(dtype: torch.dtype) -> None:
    for vocab_size in (512, 4_096, 8_192, 16_384, 50_304):
        _linear_cross_entropy(vocab_size, dtype, with_options=False)
        _linear_cross_entropy(vocab_size - 3, dtype, with_options=True)
    for vocab_size in (512, 50_304):
        _sharded_cross_entropy(vocab_size, dtype, with_options=False)
        _sharded_cross_entropy(vocab_size - 3, dtype, with_options=True)


def _linear_cross_entropy(vocab_size: int, dtype: torch.dtype, *, with_options: bool) -> None:
    inputs, matrix = empty(8, 64, dtype=dtype), empty(vocab_size, 64, dtype=dtype)
    bias = empty(vocab_size, dtype=dtype) if with_options else None
    weight, *options = all_loss_options(vocab_size) if with_options else NO_LOSS_OPTIONS
    arguments = (inputs, matrix, bias, empty(8, dtype=torch.int64), weight)
    whole = ("", vocab_size)
    losses, lse, *stats = linear_cross_entropy.forward(*arguments, *options, with_options, *whole)
    logprobs, entropy, _ = stats
    if not with_options:
        needs = (True, True, False)
        linear_cross_entropy.gradients(*arguments, None, *options, False, *needs, *whole)
        return
    z_weight = empty(dtype=lse.dtype)
    needs = (True, True, False)
    linear_cross_entropy.gradients(*arguments, z_weight, *options, True, *needs, *whole)
    upstream, needs = (losses, logprobs, lse, entropy), (True, True, True)
    linear_cross_entropy.backward(*upstream, *arguments, lse, entropy, *options, *needs, *whole)


def _sharded_cross_entropy(vocab_size: int, dtype: torch.dtype, *, with_options: bool) -> None:
    """The second of two shards, without its collectives."""
    wide = torch.promote_types(dtype, torch.float32)
    logits, row = empty(8, vocab_size, dtype=wide), empty(8, dtype=wide)
    targets = empty(8, dtype=torch.int64)
    group: Any = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    bias = empty(vocab_size, dtype=dtype) if with_options else None
    weight, *options = all_loss_options(2 * vocab_size) if with_options else NO_LOSS_OPTIONS
    shard = Shard(group, 2 * vocab_size, vocab_size)
    loss = chunk.Loss.of(logits, bias, weight, *options, shard)
    sums = empty(6, 8, dtype=wide)
    chunk.launch_shard(logits, targets, loss, shard, sums, need_stats=with_options)
    upstream = Upstream(row, row, row, row, row) if with_options else Upstream(row)
    rows = chunk.Rows.known(row, row)
    if with_options:
        chunk.launch_bias_gradient(logits, targets, loss, upstream, rows, row)
    operand = Operand(dtype)
    chunk.launch_gradient(logits, operand, targets, loss, upstream, rows, lse_is_known=True)


def linear_top_k_launches(dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    for vocab_size in (512, 50_304, 128_256):
        matrix = empty(vocab_size, 64, dtype=dtype)
        whole = (None, 1.0, "", vocab_size)
        linear_top_k.forward(empty(8, 64, dtype=dtype), matrix, None, 64, *whole)
        inputs, matrix = empty(5, 63, dtype=dtype), empty(vocab_size - 3, 63, dtype=dtype)
        bias = empty(vocab_size - 3, dtype=dtype)
        linear_top_k.forward(inputs, matrix, bias, 5, 30.0, -0.5, "", vocab_size - 3)
        # what a shard knows of the same
        logits, best = (empty(5, n, dtype=wide) for n in (vocab_size - 3, 5))
        indices = empty(5, 5, dtype=torch.int64)
        launch_top_k(logits, bias, 30.0, -0.5, best, indices, best, best)


def attention_launches(dtype: torch.dtype) -> None:
    for head_dim in (64, 128, 256, 512):
        if not _attention_fits(head_dim, dtype):
            continue
        _attention(128, 128, 4, 4, head_dim, head_dim, dtype)
        # grouped heads, another value_dim, lengths and strides that nothing divides
        ragged = (77, 133, 6, 2, head_dim - 3, head_dim - 5, dtype)
        _attention(*ragged, sequences="packed", window_size=50, softcap=20.0, with_rest=True)
    if dtype == torch.bfloat16:
        for head_dim in (64, 128, 256, 512):
            regular = (128, 128, 8, 2, head_dim, head_dim, dtype)
            _attention(*regular, sequences="packed")
            _attention(*regular, window_size=50)
            _attention(*regular, sequences="padded", window_size=50, softcap=20.0, with_rest=True)
        # what most models run: grouped heads, nothing padded; then what some do
        for head_dim, value_dim in ((64, 64), (128, 128), (96, 96), (192, 128), (512, 64)):
            _attention(128, 128, 32, 8, head_dim, value_dim, dtype)
    if dtype == torch.float32:
        with allowing_tf32():
            for head_dim in (64, 128, 256, 512):
                if not _attention_fits(head_dim, dtype):
                    continue
                _attention(128, 128, 4, 4, head_dim, head_dim, dtype)
                ragged = (77, 133, 6, 2, head_dim - 3, head_dim - 5, dtype)
                _attention(*ragged, sequences="packed", window_size=50, softcap=20.0)


def _attention_fits(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether both steps take it on the architecture that is modelled."""
    device = device_of(empty(dtype=dtype))
    steps = ("forward", "delta", "dkdv", "dq")
    plans = [attention_plan(step, head_dim, head_dim, dtype, device) for step in steps]
    return all(plan is not None for plan in plans)


@contextlib.contextmanager
def allowing_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _attention(
    num_queries: int, num_keys: int, heads: int, kv_heads: int, head_dim: int, value_dim: int,
    dtype: torch.dtype, *, sequences: str = "", window_size: int | None = None,
    softcap: float | None = None, with_rest: bool = False,
) -> None:  # fmt: skip
    batch = 1 if sequences == "packed" else 2
    query = empty(batch, num_queries, heads, head_dim, dtype=dtype)
    key = empty(batch, num_keys, kv_heads, head_dim, dtype=dtype)
    value = empty(batch, num_keys, kv_heads, value_dim, dtype=dtype)
    sinks = empty(heads, dtype=torch.float32) if with_rest else None
    bounds = empty(5, dtype=torch.int32) if sequences == "packed" else None
    padding = empty(2, dtype=torch.int32) if sequences == "padded" else None
    divided = (bounds, bounds, padding, padding)
    inputs, options = (query, key, value, sinks, *divided), (0.125, window_size, softcap)
    out, lse = attention.forward(*inputs, *options)
    dlse = lse if with_rest else None
    attention.backward(out, dlse, *inputs, out, lse, *options, True, True, with_rest)


def attention_with_kv_cache_launches(dtype: torch.dtype) -> None:
    for head_dim in (64, 128, 256):
        for num_queries in (1, 20):
            _attention_with_kv_cache(num_queries, 32, 8, head_dim, head_dim, dtype)
            # lengths and strides that nothing divides
            ragged = (num_queries, 6, 2, head_dim - 3, head_dim - 5, dtype)
            _attention_with_kv_cache(*ragged, with_options=True)
            if dtype == torch.float32:
                continue
            regular = (num_queries, 32, 8, head_dim, head_dim, dtype)
            _attention_with_kv_cache(*regular, int8=True)
            _attention_with_kv_cache(*ragged, with_options=True, int8=True)
    if dtype == torch.bfloat16:
        _attention_with_kv_cache(20, 32, 8, 128, 128, dtype, packed=True)


def _attention_with_kv_cache(
    num_queries: int, heads: int, kv_heads: int, head_dim: int, value_dim: int,
    dtype: torch.dtype, *, with_options: bool = False, int8: bool = False, packed: bool = False,
) -> None:  # fmt: skip
    size = (7, 48) if with_options else (2, 4096)
    stored = torch.int8 if int8 else dtype
    k_cache = empty(*size, kv_heads, head_dim, dtype=stored)
    v_cache = empty(*size, kv_heads, value_dim, dtype=stored)
    scales = (empty(*size, kv_heads, dtype=torch.float32) if int8 else None,) * 2
    batch, bounds = (1, empty(3, dtype=torch.int32)) if packed else (2, None)
    query = empty(batch, num_queries, heads, head_dim, dtype=dtype)
    key = empty(batch, num_queries, kv_heads, head_dim, dtype=dtype)
    value = empty(batch, num_queries, kv_heads, value_dim, dtype=dtype)
    lengths, sinks = empty(2, dtype=torch.int32), empty(heads, dtype=torch.float32)
    table = empty(4096, head_dim // 2, dtype=torch.float32)
    tables = (empty(2, 99, dtype=torch.int32) if with_options else None, bounds, table, table)
    options = (
        (sinks, 0, True, 0.125, 50, 20.0) if with_options else (None, 0, False, 0.125, None, None)
    )
    arguments = (query, k_cache, v_cache, *scales, key, value, lengths, *tables, *options, None)
    attention_with_kv_cache.forward(*arguments)


def rms_norm_launches(dtype: torch.dtype) -> None:
    for size in (32, 128, 256, 512, 1_024, 2_048, 4_096, 8_192, 16_384, 32_768):
        regular = empty(64, size, dtype=dtype)
        _rms_norm(regular, with_residual=False)
        _rms_norm(regular, with_residual=True)
        # heads of a projection, one element short: nothing divides by 16
        ragged = empty(2, 5, 3, size + 1, dtype=dtype)[:, :, 1, : size - 1]
        _rms_norm(ragged, with_residual=True)
        out, _, rstd = rms_norm.forward(ragged, None, None, 1e-6, 0.0)
        rms_norm.backward(out, None, ragged, None, rstd, 0.0, True, False)
        rms_norm.backward(out, None, ragged, out[0, 0], rstd, 0.0, False, True)


def _rms_norm(input: Tensor, *, with_residual: bool) -> None:
    weight = empty(input.shape[-1], dtype=input.dtype)
    residual = empty(*input.shape, dtype=input.dtype) if with_residual else None
    out, total, rstd = rms_norm.forward(input, weight, residual, 1e-6, 0.0)
    dtotal, vectors = (total, total) if with_residual else (None, input)
    for needs_weight in (False, True):
        rms_norm.backward(out, dtotal, vectors, weight, rstd, 0.0, True, needs_weight)


def rotary_launches(dtype: torch.dtype) -> None:
    for head_dim in (32, 64, 128, 256):
        query, key = empty(2, 16, 8, head_dim, dtype=dtype), empty(2, 16, 2, head_dim, dtype=dtype)
        cos = empty(16, head_dim // 2, dtype=dtype)
        # queries and keys of one projection; some channels stay
        both = empty(2, 5, 3, 3, head_dim + 1, dtype=dtype)[..., : head_dim - 1]
        angles = empty(2, 5, head_dim, dtype=dtype)[..., : 2 * (head_dim // 2 - 2) : 2]
        for interleaved in (False, True):
            for step in (rotary.forward, rotary.backward):
                step(query, key, cos, cos, interleaved)
            rotary.forward(both[:, :, 0], both[:, :, 1], angles, angles, interleaved)


def glu_launches(dtype: torch.dtype) -> None:
    for activation in ACTIVATIONS:
        for size in (512, 4_096):
            both = empty(2, 5, 2 * size, dtype=dtype)
            odd = empty(2, 5, 2 * size + 1, dtype=dtype)
            for gate, up in (both.chunk(2, -1), (odd[..., : size - 1], odd[..., size:-2])):
                glu.backward(glu.forward(gate, up, activation), gate, up, activation)


LAUNCHES: dict[str, Callable[[torch.dtype], None]] = {
    "attention": attention_launches,
    "attention_with_kv_cache": attention_with_kv_cache_launches,
    "cross_entropy": cross_entropy_launches,
    "glu": glu_launches,
    "linear_cross_entropy": linear_cross_entropy_launches,
    "linear_top_k": linear_top_k_launches,
    "rms_norm": rms_norm_launches,
    "rotary": rotary_launches,
}


# Bytes per thread that registers spill at most under Triton 3.6 and 3.7, rounded up to a power of
# two, in float32, with all options on, or on an architecture that borrows its rows.
MOST_STACK = {
    "attention": 32,
    "attention_with_kv_cache": 16,
    "cross_entropy": 0,
    "glu": 32,
    "linear_cross_entropy": 128,
    "linear_top_k": 8,
    "rms_norm": 32,
    "rotary": 32,
}


# Ops that spill nothing on these, whatever is asked of them.
NEVER_SPILL = ("cross_entropy", "linear_cross_entropy")
NEVER_SPILL_ON = (80, 90, 100)


# The same with a window, in float32 or over a cache.
MOST_STACK_WITH_WINDOW = 128


def most_stack(binary: dict[str, Any]) -> int:
    """Bytes this binary may spill: on sm_80 and sm_90 none in a narrow dtype without options.

    There attention spills none in float32 with options either.  The other architectures borrow the
    rows of these two.
    """
    if binary["op"] in NEVER_SPILL and binary["arch"] in NEVER_SPILL_ON:
        return 0
    is_wide = binary["dtype"] == "float32" and binary["op"] == "attention"
    if is_wide and binary["arch"] in (80, 90):
        return 0
    on = {name for name, value in binary["constants"].items() if value == "True"}
    if "HAS_WINDOW" in on and (binary["dtype"] == "float32" or binary["op"] != "attention"):
        return MOST_STACK_WITH_WINDOW
    has_options = binary["dtype"] == "float32" or "HAS_BIAS" in on
    sizes = {int(size) for name, size in binary["constants"].items() if name.endswith("_DIM")}
    # a head_dim above 256 beside another value_dim
    has_options |= len(sizes) == 2 and max(sizes) > 256
    is_usual = binary["arch"] in (80, 90) and not has_options
    return 0 if is_usual else MOST_STACK[binary["op"]]


def is_tf32(binary: dict[str, Any]) -> bool:
    return binary["constants"].get("PRECISION") == "tf32"


def has_small_tiles(binary: dict[str, Any]) -> bool:
    """Whether some rows of these head_dims are too small for the units of sm_90 and sm_100.

    So are those of a few queries over a cache.
    """
    if binary["op"] == "attention_with_kv_cache" and binary["constants"].get("BLOCK_M") == "16":
        return True
    sizes = [int(binary["constants"].get(name, "0")) for name in ("HEAD_DIM", "VALUE_DIM")]
    if is_tf32(binary):
        largest = 64 if binary["kernel"] == "dkdv_kernel" else 128
        return binary["arch"] != 90 or max(sizes) > largest or any(size % 4 for size in sizes)
    return max(sizes) > 256 or any(size % 8 for size in sizes)


def counted_shared_memory(binary: dict[str, Any]) -> int:
    """What the plan of an attention kernel thinks that it takes at most."""
    numbers = binary["constants"]
    value_dim = int(numbers["VALUE_DIM"])
    row = Plan(int(numbers["BLOCK_M"]), int(numbers.get("BLOCK_N", "0")), **binary["options"])
    return shared_memory(
        binary["kernel"].removesuffix("_kernel"), row, int(numbers.get("HEAD_DIM", value_dim)),
        value_dim, getattr(torch, binary["dtype"]),
    )  # fmt: skip


def rows(op: str) -> dict[str, Any]:
    """Every launch setting in the tuning tables of ``op``, by where it stands."""
    tables = vars(importlib.import_module(f"fastlm.kernels.{op}.tuning"))
    return {
        place: row
        for name, table in tables.items()
        if not name.startswith("__")
        for place, row in _rows_in(name, table)
    }


def _rows_in(place: str, table: Any) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(table) and hasattr(table, "num_warps"):
        if not isinstance(table, type):
            yield place, table
    elif isinstance(table, dict | tuple | list):
        items = table.items() if isinstance(table, dict) else enumerate(table)
        for key, value in items:
            yield from _rows_in(f"{place}[{key!r}]", value)


def unreached(op: str) -> list[str]:
    """Rows that the launches of ``op`` read on no architecture and in no dtype."""
    found = rows(op)
    with _watched({type(row) for row in found.values()}) as read:
        for arch in ARCHES:
            for dtype in WITH_FLOAT64:
                launches(op, dtype, arch)
    return [place for place, row in found.items() if id(row) not in read]


@contextlib.contextmanager
def _watched(kinds: set[type]) -> Iterator[set[int]]:
    """Collect the ids of rows whose ``num_warps`` is read."""
    read: set[int] = set()

    def watching(row: Any, name: str) -> Any:
        if name == "num_warps":
            read.add(id(row))
        return object.__getattribute__(row, name)

    for kind in kinds:
        kind.__getattribute__ = watching  # type: ignore[method-assign]
    try:
        yield read
    finally:
        for kind in kinds:
            del kind.__getattribute__


def launches(op: str, dtype: torch.dtype, arch: int, *, thorough: bool = True) -> list[Launch]:
    with pretend(arch), recorded(run=False) as log:
        LAUNCHES[op](dtype)
    return log if thorough else [launch for launch in log if not takes_long(launch)]


def takes_long(launch: Launch) -> bool:
    """Whether the compiler needs half a minute, or all but repeats itself: for test-all."""
    sizes = [launch.constants.get(name, 0) for name in ("HEAD_DIM", "VALUE_DIM")]
    is_ragged = any(size % 8 for size in sizes)
    # of the ops on layers a row of a table each, and one activation
    usual = {"ACTIVATION": "silu", "BLOCK_C": 4_096, "BLOCK_P": 64}
    if any(launch.constants.get(name, value) != value for name, value in usual.items()):
        return True
    if launch.constants.get("PRECISION") == "tf32":
        return max(sizes) != 128 or is_ragged
    return max(sizes) > 256 and (is_ragged or launch.args[0].dtype == torch.float32)


def compiling_environment() -> dict[str, str]:
    """For a child process that compiles kernels and can import ``support``."""
    environment = _runtime.compiling_environment()
    paths = [str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")]
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def compile_all(
    arch: int,
    *,
    op: str = "all",
    dtypes: Sequence[torch.dtype] = DTYPES,
    processes: int = 2,
    thorough: bool = True,
) -> list[dict[str, Any]]:
    """One result per different binary: the attributes of ``Compiled``, what it is, what lint found.

    Raises:
        RuntimeError: A launch does not compile; the message ends with the compiler's.
    """
    environment = compiling_environment()
    arguments = [op, ",".join(map(_name, dtypes)), str(arch), str(int(thorough))]
    children = [
        subprocess.Popen(
            [sys.executable, "-P", "-m", "support.ahead", *arguments, str(part), str(processes)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for part in range(processes)
    ]  # fmt: skip
    results = []
    for child in children:
        output, errors = child.communicate()
        if child.returncode:
            raise RuntimeError(f"sm_{arch}: {errors[-3000:]}")
        results += json.loads(output)
    return results


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _main(op: str, dtypes: str, arch: int, thorough: int, part: int, parts: int) -> None:
    different = {}
    for name in LAUNCHES if op == "all" else [op]:
        for dtype in dtypes.split(","):
            made = launches(name, getattr(torch, dtype), arch, thorough=bool(thorough))
            for key, pair in _ahead.distinct(made, arch).items():
                different.setdefault(key, (name, dtype, *pair))
    results = []
    for name, dtype, launch, made in list(different.values())[part::parts]:
        compiled = _ahead.compile_launch(made, arch)
        results.append({
            "op": name,
            "arch": arch,
            "kernel": launch.name,
            "dtype": dtype,
            "constants": {key: str(value) for key, value in launch.constants.items()},
            "options": launch.options,
            "registers": compiled.registers,
            "stack": compiled.stack,
            "shared_memory": compiled.shared_memory,
            "instructions": compiled.instructions,
            "has_dot": "tt.dot" in compiled.ttir,
            "narrow_products": narrow_products(compiled.ttir),
            "float_atomics": float_atomics(compiled.ttir),
        })  # fmt: skip
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    _main(*sys.argv[1:3], *map(int, sys.argv[3:]))
