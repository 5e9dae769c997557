"""``fastlm doctor --warm``: compile the kernels that a model needs before its first step does.

Child processes compile, because kernels must not be interpreted there, and as many as there are
cores.  Triton keeps what they make in its cache on disk, where the training run finds it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fastlm._errors import ArgumentError, UserError
from fastlm.cli._flags import parse
from fastlm.model.config import CausalLMConfig
from fastlm.training.config import Size, TrainConfig

if TYPE_CHECKING:
    import torch

    from fastlm.kernels._launch import Launch
    from fastlm.kernels._runtime import Device


@dataclass(frozen=True)
class WarmOptions:
    """Compile ahead the Triton kernels that training and generation of a model launch.

    They go to Triton's cache on disk (TRITON_CACHE_DIR, by default ~/.triton/cache), where the
    first training step finds them.  Sizes are those of a folder or of a preset of fastlm train.
    """

    model: str | None = None
    """Run folder, or any model folder in Hugging Face's layout. None: the two below."""
    size: Size = "nano"
    """Preset of fastlm train."""
    vocab_size: int | None = None
    """Tokens in the vocabulary. None: 1024."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the matrix products in training; generation is compiled in it and in float32."""
    arch: str | None = None
    """A GPU that is not here, such as sm_90; the cache then has to be taken there. None: the GPU
    of this machine."""


def run(argv: Sequence[str]) -> int:
    """Print the kernels, how many variants each has, and the seconds that they took.

    Raises:
        ArgumentError: No such architecture.
        UserError: Triton is not installed, or does not compile.
    """
    options = parse(WarmOptions, "doctor --warm", argv)
    # here and not above: help needs no torch
    if importlib.util.find_spec("triton") is None:
        raise UserError("doctor: --warm needs triton, which is not installed")
    try:
        from fastlm.kernels import _runtime
    except ModuleNotFoundError as error:
        raise UserError(f"doctor: --warm needs {error.name}, which is not installed") from None
    device = _runtime.present()
    if options.arch is not None:
        known = {f"sm_{arch}": arch for arch in _runtime.SHARED_MEMORY}
        if options.arch not in known:
            names = ", ".join(known)
            raise ArgumentError(f"doctor: arch must be one of {names}, got {options.arch!r}")
        device = _runtime.modelled(known[options.arch])
    if device is None:
        print(
            "nothing to warm: torch sees no GPU here, and kernels run on GPUs alone "
            "(--arch sm_90 compiles for one that is elsewhere)"
        )
        return 0
    start = time.perf_counter()
    rows = compile_all(_config(options), options.dtype, device)
    print(_described(rows, device, time.perf_counter() - start))
    return 0


def _config(options: WarmOptions) -> CausalLMConfig:
    if options.model is not None:
        from fastlm.model.checkpoint import read_config

        return read_config(options.model)
    settings = TrainConfig(size=options.size, vocab_size=options.vocab_size).resolved()
    assert settings.vocab_size is not None, "a preset has one"
    return CausalLMConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        num_key_value_heads=settings.num_key_value_heads,
    )


def launches(config: CausalLMConfig, dtype: str, device: Device) -> list[Launch]:
    """What a training step, a validation and a generation launch, on meta tensors.

    Batch and lengths are any: they make no other kernels.
    """
    import torch

    from fastlm.kernels._launch import recorded
    from fastlm.kernels._runtime import pretend

    training = getattr(torch, dtype)
    with pretend(device), recorded(run=False) as log:
        _attend(config, training, trains=True)
        _score(config, training)
        _attend(config, torch.float32, trains=False)
        for of_model in dict.fromkeys((training, torch.float32)):
            _decode(config, of_model)
    return log


def _attend(config: CausalLMConfig, dtype: torch.dtype, *, trains: bool) -> None:
    import torch

    from fastlm.kernels import attention
    from fastlm.kernels.attention.launch import BACKWARD, too_wide

    def empty(heads: int) -> torch.Tensor:
        return torch.empty((2, 64, heads, config.head_size), dtype=dtype, device="meta")

    query, key, value = (
        empty(heads)
        for heads in (config.num_attention_heads, config.num_kv_heads, config.num_kv_heads)
    )
    inputs = (query, key, value, None, None, None, None, None)
    for window in dict.fromkeys(config.windows):
        options = (config.head_size**-0.5, window, None)
        out, lse = attention.forward(*inputs, *options)
        if trains and too_wide(BACKWARD, query, value) is None:
            attention.backward(out, None, *inputs, out, lse, *options, True, True, False)


def _decode(config: CausalLMConfig, dtype: torch.dtype) -> None:
    """A token of every sequence over a cache."""
    import torch

    from fastlm.kernels import attention_with_kv_cache
    from fastlm.kernels.attention_with_kv_cache.launch import forward_refuses
    from fastlm.kernels.attention_with_kv_cache.tuning import SPLIT_KEYS

    def empty(tokens: int, heads: int) -> torch.Tensor:
        return torch.empty((2, tokens, heads, config.head_size), dtype=dtype, device="meta")

    heads = config.num_kv_heads
    new = empty(1, heads), empty(1, heads)
    lengths = torch.empty(2, dtype=torch.int32, device="meta")
    # a cache whose keys one program reads, and one whose keys are divided
    for room in (SPLIT_KEYS, 2 * SPLIT_KEYS):
        angles = torch.empty(room, config.head_size // 2, device="meta")
        tables = (None, None) if config.model_type == "gpt2" else (angles, angles)
        for window in dict.fromkeys(config.windows):
            inputs = (
                empty(1, config.num_attention_heads), empty(room, heads), empty(room, heads),
                None, None, *new, lengths, None, None, *tables, None, 0, False,
                config.head_size**-0.5, window, None, None,
            )  # fmt: skip
            if forward_refuses(*inputs) is None:
                attention_with_kv_cache.forward(*inputs)


def _score(config: CausalLMConfig, dtype: torch.dtype) -> None:
    """The loss with its gradients, and without, as validation needs it."""
    import torch

    from fastlm.kernels import linear_cross_entropy

    def empty(rows: int) -> torch.Tensor:
        return torch.empty((rows, config.hidden_size), dtype=dtype, device="meta")

    targets = torch.empty(64, dtype=torch.int64, device="meta")
    # no bias, no class weights; ignore_index, label_smoothing, softcap, logit_scale, no statistics
    inputs, options = (empty(64), empty(config.vocab_size), None, targets, None), (-100, 0.0, None)
    rest, whole = (1.0, False), ("", config.vocab_size)
    linear_cross_entropy.gradients(*inputs, None, *options, *rest, True, True, False, *whole)
    linear_cross_entropy.forward(*inputs, *options, *rest, *whole)


def compile_all(config: CausalLMConfig, dtype: str, device: Device) -> list[dict[str, Any]]:
    """One row for each variant of a kernel: its name, seconds, registers, stack, shared memory.

    Raises:
        UserError: The compiler failed; its last words are in the message.
    """
    from fastlm.kernels._runtime import compiling_environment

    parts = os.cpu_count() or 1
    task = json.dumps([config.to_dict(), dtype, dataclasses.asdict(device), parts])
    children = [
        subprocess.Popen(
            [sys.executable, "-P", "-m", "fastlm.cli._warm", task, str(part)],
            env=compiling_environment(),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for part in range(parts)
    ]  # fmt: skip
    rows: list[dict[str, Any]] = []
    for output, errors, code in [(*child.communicate(), child.returncode) for child in children]:
        if code:
            raise UserError(f"doctor: a kernel does not compile: {errors[-2000:]}")
        rows += json.loads(output)
    return rows


def _described(rows: list[dict[str, Any]], device: Device, wall: float) -> str:
    columns = f"{'variants':>8}{'seconds':>9}{'registers':>11}{'spills':>8}{'shared':>9}"
    lines = [f"{'kernel':<32}{columns}"]
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        same = [row for row in rows if row["kernel"] == kernel]
        most = {name: max(row[name] for row in same) for name in ("registers", "stack", "shared")}
        seconds = sum(row["seconds"] for row in same)
        lines.append(
            f"{kernel:<32}{len(same):>8}{seconds:>9.1f}"
            f"{most['registers']:>11}{most['stack']:>8}{most['shared']:>9}"
        )
    return "\n".join(
        [*lines, "", f"{len(rows)} kernels for sm_{device.arch} in {wall:.1f} seconds"]
    )


def _compile_part(task: str, part: int) -> list[dict[str, Any]]:
    from fastlm.kernels._ahead import compile_launch, distinct
    from fastlm.kernels._runtime import Device

    values, dtype, device, parts = json.loads(task)
    made = launches(CausalLMConfig.from_dict(values), dtype, Device(**device))
    # in the order of their keys: those of a kernel that take long lie apart
    found = sorted(distinct(made, device["arch"]).items())
    rows = []
    for _, (launch, specialized) in found[part::parts]:
        start = time.perf_counter()
        compiled = compile_launch(specialized, device["arch"], disassemble=False)
        rows.append({
            "kernel": f"{_op(launch)} {launch.name.removesuffix('_kernel')}",
            "seconds": time.perf_counter() - start,
            "registers": compiled.registers,
            "stack": compiled.stack,
            "shared": compiled.shared_memory,
        })  # fmt: skip
    return rows


def _op(launch: Launch) -> str:
    return str(launch.kernel.fn.__module__.split(".")[2])


if __name__ == "__main__":
    print(json.dumps(_compile_part(sys.argv[1], int(sys.argv[2]))))
