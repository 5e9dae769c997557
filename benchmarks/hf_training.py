"""A training step of a model of transformers, untouched and after fastlm.optimize: time and memory.

    python benchmarks/hf_training.py --out benchmarks/results/my-machine

All take the same weights and tokens: forward with labels, backward and a fused AdamW step.  Their
losses are compared first.  Times are taken in turns, at the smaller vocabulary.  Memory is that of
a process of its own, beyond what it held before: of whole steps, from weights alone, at the smaller
vocabulary; of forward and backward alone, where weights have their gradients already, so that the
loss shows, at the larger one.  Liger takes part where its kernels run, on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import io
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastlm
from fastlm.benchmarks import _report
from fastlm.benchmarks._memory import extra_peak_mib
from fastlm.benchmarks._timing import measure_ceilings, percentiles, timed

PROVIDERS = ("transformers", "fastlm", "liger")
OP = "hf_training"


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of model and batch, as flags name them."""

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    length: int = 256
    batch: int = 4
    model_type: str = "qwen3"


def build(provider: str, shape: Shape, vocab_size: int, device: str, dtype: torch.dtype) -> Any:
    """A model with the weights that seed 0 gives, as the provider trains it."""
    import transformers

    config = transformers.AutoConfig.for_model(
        shape.model_type,
        vocab_size=vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=shape.length,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model = model.to(device, dtype).train()
    if provider == "fastlm":
        with redirect_stdout(io.StringIO()):
            fastlm.optimize(model, strict=True)
    if provider == "liger":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    return model


def absent(provider: str, device: str) -> str | None:
    """Why a provider cannot take part here, or None."""
    if provider != "liger":
        return None
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None if device == "cuda" else "its kernels need a GPU"


def stepper(model: nn.Module, shape: Shape, *, trains: bool = True) -> Callable[[], float]:
    """A function that takes one step, or leaves the gradients, and returns the loss."""
    parameter = next(model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(1)
    vocab_size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = torch.randint(vocab_size, (shape.batch, shape.length), generator=generator)
    ids = ids.to(parameter.device)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if trains:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        value: float = loss.item()
        return value

    return step


def measure_times(
    providers: list[str], shape: Shape, vocab_size: int, device: str, dtype: torch.dtype,
    rounds: int,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Milliseconds of a step: p20, p50, p80; the providers take turns.

    Raises:
        AssertionError: They do not compute the same losses.
    """
    steps = {
        provider: stepper(build(provider, shape, vocab_size, device, dtype), shape)
        for provider in providers
    }
    losses = {provider: [step() for _ in range(3)] for provider, step in steps.items()}
    # of three steps: rounding of the dtype, which the second and the third carry on
    rtol = 1e-4 if dtype == torch.float32 else 2e-2
    for found in losses.values():
        torch.testing.assert_close(found, losses[providers[0]], rtol=rtol, atol=0)
    times: dict[str, list[float]] = {provider: [] for provider in providers}
    for _ in range(rounds):
        for provider, step in steps.items():
            times[provider].append(1e3 * timed(step, device))
    return {provider: _quantiles(found) for provider, found in times.items()}


def _quantiles(times: list[float]) -> dict[str, float]:
    p20, p50, p80 = percentiles(times)
    return {"ms_p50": p50, "ms_p20": p20, "ms_p80": p80}


def peak_mib(
    provider: str, shape: Shape, vocab_size: int, device: str, dtype: torch.dtype, mode: str
) -> float | None:
    """MiB beyond what there was, in a process of its own; None where the system counts none."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        arguments = (provider, shape, vocab_size, device, dtype, mode)
        return pool.apply(_peak, arguments)


def _peak(
    provider: str, shape: Shape, vocab_size: int, device: str, dtype: torch.dtype, mode: str
) -> float | None:
    # lazy imports and thread pools are paid for before
    small = dataclasses.replace(shape, hidden=16 * shape.heads, layers=1, length=16)
    stepper(build(provider, small, 512, device, dtype), small)()
    model = build(provider, shape, vocab_size, device, dtype)
    step = stepper(model, shape, trains=mode == "step")
    if mode != "step":
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter).add_(0)  # touched: the pages are there
    return extra_peak_mib(functools.partial(_twice, step), device)


def _twice(step: Callable[[], float]) -> None:
    step()
    step()


def rows(options: argparse.Namespace, shape: Shape) -> Iterator[dict[str, Any]]:
    """One row for each provider and each of the two measurements."""
    device, dtype = options.device, getattr(torch, options.dtype)
    missing = {name: why for name in PROVIDERS if (why := absent(name, device)) is not None}
    there = [name for name in PROVIDERS if name not in missing]
    times = measure_times(there, shape, options.vocab, device, dtype, options.rounds)
    for mode, vocab in (("step", options.vocab), ("fwd_bwd", options.large_vocab)):
        for name in PROVIDERS:
            row: dict[str, Any] = {
                "op": OP,
                "mode": mode,
                "provider": name,
                "shape": {**dataclasses.asdict(shape), "vocab": vocab},
                "dtype": options.dtype,
            }
            if name in missing:
                yield {**row, "absent": missing[name]}
                continue
            peak = peak_mib(name, shape, vocab, device, dtype, mode)
            yield {**row, **(times[name] if mode == "step" else {}), "peak_mib": peak}


def line(row: dict[str, Any]) -> str:
    head = f"{row['mode']:9}{row['shape']['vocab']:>9}  {row['provider']:14}"
    if "absent" in row:
        return f"{head}{row['absent']}"
    cells = [row.get(name) for name in ("ms_p20", "ms_p50", "ms_p80")]
    shown = "".join(f"{'' if cell is None else f'{cell:.1f}':>10}" for cell in cells)
    peak = row["peak_mib"]
    return f"{head}{shown}{'' if peak is None else f'{peak:.0f}':>12}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    for field in dataclasses.fields(Shape):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    parser.add_argument("--vocab", type=int, default=8192, help="vocabulary of the steps")
    parser.add_argument("--large-vocab", type=int, default=131_072, help="of the loss's memory")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16" if cuda else "float32"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write hf_training.json there")
    options = parser.parse_args(arguments)
    shape = Shape(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(Shape)}
    )
    print(f"{shape}, torch {torch.__version__}, {options.device}, {options.dtype}")
    print(
        f"{'mode':9}{'vocab':>9}  {'provider':14}{'ms p20':>10}{'p50':>10}{'p80':>10}"
        f"{'peak MiB':>12}"
    )
    found = []
    for row in rows(options, shape):
        print(line(row), flush=True)
        found.append(row)
    if options.out:
        dtype = getattr(torch, options.dtype)
        ceilings = measure_ceilings(options.device, [dtype])
        env = _report.environment(options.device, ceilings)
        _report.save(options.out / "hf_training.json", env, found)


if __name__ == "__main__":
    main()
