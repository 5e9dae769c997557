"""A training step of CausalLM beside transformers' model of the same config: time and memory.

    python benchmarks/train_step.py --json train_step.json

Both take the same weights and tokens, forward, backward and a fused AdamW step.  Times are taken
in turns in one process.  Memory is the high-water mark of a process of its own, less what it held
before the first step, when weights were there, gradients and optimizer state not; Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastlm
from fastlm.benchmarks import _report
from fastlm.benchmarks._memory import extra_peak_mib
from fastlm.benchmarks._timing import measure_ceilings, percentiles

PROVIDERS = ("fastlm", "transformers")


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

    def config(self, vocab_size: int) -> fastlm.CausalLMConfig:
        return fastlm.CausalLMConfig(
            vocab_size=vocab_size,
            hidden_size=self.hidden,
            intermediate_size=3 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.length,
            tie_word_embeddings=True,
            model_type=self.model_type,
        )


def build(provider: str, config: fastlm.CausalLMConfig) -> nn.Module:
    """A model with the weights that seed 0 gives."""
    torch.manual_seed(0)
    model = fastlm.CausalLM(config)
    if provider == "fastlm":
        return model
    import transformers

    values = transformers.AutoConfig.for_model(**config.to_dict())
    theirs = transformers.AutoModelForCausalLM.from_config(values, attn_implementation="sdpa")
    theirs.load_state_dict(model.state_dict())
    return theirs.train()


def stepper(provider: str, config: fastlm.CausalLMConfig, shape: Shape) -> Callable[[], float]:
    """A function that takes one step and returns the loss."""
    model = build(provider, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(1)
    size = (shape.batch, shape.length)
    ids = torch.randint(config.vocab_size, size, generator=generator)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def measure_times(shape: Shape, vocab_size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds per step: p20, p50, p80; the providers take turns.

    Raises:
        AssertionError: The two do not compute the same loss.
    """
    config = shape.config(vocab_size)
    steps = {provider: stepper(provider, config, shape) for provider in PROVIDERS}
    losses = [[step() for _ in range(3)] for step in steps.values()]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)
    seconds: dict[str, list[float]] = {provider: [] for provider in PROVIDERS}
    for _ in range(rounds):
        for provider, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[provider].append(time.perf_counter() - start)
    return {provider: _quantiles(times) for provider, times in seconds.items()}


def _quantiles(times: list[float]) -> dict[str, float]:
    low, middle, high = percentiles([1e3 * seconds for seconds in times])
    return {"ms_min": 1e3 * min(times), "ms_p20": low, "ms_p50": middle, "ms_p80": high}


def measure_memory(shape: Shape, vocab_size: int) -> dict[str, float]:
    """MiB that two steps add to what the process held with the model built."""
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for provider in PROVIDERS:
        with context.Pool(1) as pool:
            peaks[provider] = pool.apply(_peak_of_steps, (provider, shape, vocab_size))
    return peaks


def _peak_of_steps(provider: str, shape: Shape, vocab_size: int) -> float:
    # lazy imports and thread pools are paid for before
    small = dataclasses.replace(shape, hidden=64, layers=1, length=16)
    stepper(provider, small.config(512), small)()
    step = stepper(provider, shape.config(vocab_size), shape)
    peak = extra_peak_mib(lambda: [step() for _ in range(2)], "cpu")
    assert peak is not None, "this system counts no peak"
    return peak


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Print and return the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field in dataclasses.fields(Shape):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    parser.add_argument("--vocab", type=int, default=8192, help="vocabulary for the times")
    parser.add_argument(
        "--large-vocab", type=int, default=131_072, help="and for the memory; 0: not"
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", metavar="FILE")
    options = vars(parser.parse_args(arguments))
    shape = Shape(**{field.name: options[field.name] for field in dataclasses.fields(Shape)})
    times = measure_times(shape, options["vocab"], options["rounds"])
    large = options["large_vocab"]
    memory = measure_memory(shape, large) if large else {}
    rows: list[dict[str, Any]] = []
    for provider in PROVIDERS:
        rows.append(
            {
                "op": "train_step",
                "mode": "step",
                "provider": provider,
                "shape": {**dataclasses.asdict(shape), "vocab": options["vocab"]},
                "dtype": "float32",
                **times[provider],
                "peak_mib_vocab": options["large_vocab"],
                "peak_mib": memory.get(provider),
            }
        )
    print(f"{shape}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    time_title, memory_title = (
        f"ms at V = {options['vocab']}",
        f"MiB at V = {options['large_vocab']}",
    )
    print(f"{'':14}{time_title:>32}{memory_title:>22}")
    print(f"{'provider':14}{'min':>8}{'p20':>8}{'p50':>8}{'p80':>8}{'peak of two steps':>22}")
    for row in rows:
        cells = "".join(f"{row[name]:8.1f}" for name in ("ms_min", "ms_p20", "ms_p50", "ms_p80"))
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        print(f"{row['provider']:14}{cells}{peak:>22}")
    if options["json"]:
        env = _report.environment("cpu", measure_ceilings("cpu", [torch.float32]))
        _report.save(Path(options["json"]), env, rows)
    return rows


if __name__ == "__main__":
    main()
