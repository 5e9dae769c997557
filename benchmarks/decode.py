"""Tokens a second of a whole model that generates, beside transformers' generate.

    python benchmarks/decode.py --device cpu --json decode.json
    python benchmarks/decode.py --sweep --json sweep.json

All have the same random weights, take the same prompts and decode greedily; logits of the models
are compared first.  ``fastlm.ragged`` has prompts that begin later row by row, so that no two of
them are of one length; ``gpt-fast`` is a compiled step over a static cache; ``products`` are the
matrix products of a token alone, as fastlm does them.  Times are taken in turns in one process, and
are those of all: prompt, products, sampling.

``--sweep`` is of batches of 1 to 64 over caches of 1k to 128k tokens; ``--batch`` and ``--cache``
name others.  There a prompt fills the cache, and the time is that of the tokens after the first: a
call for all of them less a call for one, taken in turns.  What does not fit in memory, or whose
prompts alone would take longer than ``--most-seconds``, is listed with the reason.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastlm
from fastlm.benchmarks import _report
from fastlm.benchmarks._memory import extra_peak_mib
from fastlm.benchmarks._static_decoder import StaticDecoder
from fastlm.benchmarks._timing import Ceilings, measure_ceilings, name_of, percentiles
from fastlm.model.products import FewRows

PROMPT = 16
SWEPT_BATCHES, SWEPT_CACHES = (1, 4, 16, 64), (1024, 8192, 32_768, 131_072)
RAGGED = "fastlm.ragged"
PROVIDERS = (
    "transformers", "transformers.static", "gpt-fast", "fastlm", RAGGED, "fastlm.int8",
    "products",
)  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# prompts ``(B, T)``, and how many tokens are to follow each
Call = Callable[[Tensor, int], object]


@dataclasses.dataclass(frozen=True)
class Size:
    """A model, how many prompts at once, and how many tokens each is continued by."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    batches: tuple[int, ...]
    new_tokens: int

    def config(self, longest: int = 4096) -> fastlm.CausalLMConfig:
        """For texts of up to ``longest`` tokens."""
        return fastlm.CausalLMConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=3 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=max(longest, 4096),
            tie_word_embeddings=True,
            model_type="llama",
        )

    @functools.cached_property
    def parameters(self) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in fastlm.CausalLM(self.config()).parameters())

    def cache_bytes(self, tokens: float, itemsize: int) -> float:
        """Of keys and values."""
        return 2.0 * self.layers * self.kv_heads * (self.hidden // self.heads) * tokens * itemsize

    def prompt_flops(self, batch: int, prompt: int) -> float:
        attention = 2.0 * self.layers * self.hidden * prompt
        return batch * prompt * (2.0 * self.parameters + attention)


SIZES = {
    "cpu": {
        "1M": Size(128, 4, 4, 4, 1024, (1, 8), 200),
        "60M": Size(512, 13, 8, 4, 32_000, (1, 8), 32),
    },
    "cuda": {
        "1M": Size(128, 4, 4, 4, 1024, (1, 64), 200),
        "60M": Size(512, 13, 8, 4, 32_000, (1, 64), 200),
        # as wide as an 8B model
        "2.5B": Size(4096, 8, 32, 8, 128_256, (1, 16, 64), 100),
    },
}


def refusal(
    size: Size, batch: int, prompt: int, itemsize: int, calls: int, most_seconds: float,
    ceilings: Ceilings, device: str,
) -> str | None:  # fmt: skip
    """Why ``calls`` with so many prompts are not worth trying, or None."""
    # ours and theirs, and a cache that is copied as it grows
    weights = 2 * size.parameters * itemsize
    needed = weights + 2 * size.cache_bytes(batch * (prompt + size.new_tokens), itemsize)
    available = _available_bytes(device)
    if needed > available:
        return (
            f"memory: weights and caches are {needed / 2**30:.1f} GiB, of {available / 2**30:.1f}"
        )
    rate = max(ceilings.tflops.values()) * 1e12
    seconds = calls * size.prompt_flops(batch, prompt) / rate
    if seconds > most_seconds:
        return f"time: the prompts alone would take {seconds:.0f} s or more, of {most_seconds:.0f}"
    return None


def _available_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def providers(
    size: Size, device: str, dtype: torch.dtype, only: list[str], prompt: int = PROMPT
) -> tuple[dict[str, Call], dict[str, float]]:
    """Name to what is timed, and to how far logits are from transformers', by their largest.

    Raises:
        AssertionError: The models do not give the same logits.
    """
    torch.manual_seed(0)
    longest = prompt + size.new_tokens
    model = fastlm.CausalLM(size.config(longest)).to(device, dtype)
    ids = torch.randint(size.vocab, (2, PROMPT), device=device)
    calls: dict[str, Call] = {
        "fastlm": model.generate,
        RAGGED: functools.partial(_ragged, model),
    }
    logits = {"fastlm": _logits(model, ids)}
    if "fastlm.int8" in only:
        narrow = copy.deepcopy(model)
        fastlm.quantize(narrow, 8)
        calls["fastlm.int8"], logits["fastlm.int8"] = narrow.generate, _logits(narrow, ids)
    if "gpt-fast" in only:
        static = StaticDecoder(model, longest)
        calls["gpt-fast"], logits["gpt-fast"] = static.generate, static.first_logits(ids)
    if "products" in only and device == "cpu":
        calls["products"] = functools.partial(_products, model)
    errors: dict[str, float] = {}
    if any(name.startswith("transformers") for name in only):
        theirs = _theirs(model)
        truth, tolerance = _logits(theirs, ids), 1e-3 if dtype == torch.float32 else 3e-2
        for name in logits.keys() - {"fastlm.int8"}:
            torch.testing.assert_close(logits[name], truth, rtol=tolerance, atol=tolerance)
        errors = {
            name: ((x - truth).abs().max() / truth.abs().max()).item() for name, x in logits.items()
        }
        calls["transformers"] = functools.partial(_generated, theirs, "dynamic")
        calls["transformers.static"] = functools.partial(_generated, theirs, "static")
    return {name: calls[name] for name in only if name in calls}, errors


@torch.inference_mode()
def _logits(model: Any, ids: Tensor) -> Tensor:
    """After the last token, ``(B, 1, V)``."""
    return model(ids).logits[:, -1:].float()


def _ragged(model: fastlm.CausalLM, prompts: Tensor, new_tokens: int) -> object:
    rows = [row[number % PROMPT :] for number, row in enumerate(prompts.tolist())]
    return model.generate(rows, new_tokens)


def _theirs(model: fastlm.CausalLM) -> nn.Module:
    import transformers

    values = transformers.AutoConfig.for_model(**model.config.to_dict())
    theirs = transformers.AutoModelForCausalLM.from_config(values, attn_implementation="sdpa")
    theirs.load_state_dict(model.state_dict())
    return theirs.to(model.lm_head.weight).train(False)


def _generated(model: Any, cache: str, prompts: Tensor, new_tokens: int) -> object:
    """transformers compiles the model itself where it finds that the cache allows it."""
    return model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, pad_token_id=0,
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, cache_implementation=cache,
    )  # fmt: skip


@torch.inference_mode()
def _products(model: fastlm.CausalLM, prompts: Tensor, new_tokens: int) -> None:
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    inputs = [torch.randn(len(prompts), weight.shape[1]) for weight in weights]
    outs = [torch.empty(len(prompts), weight.shape[0]) for weight in weights]
    calls = [
        call
        for weight, x, out in zip(weights, inputs, outs, strict=True)
        for call in FewRows(weight).into(x, out)
    ]
    for _ in range(new_tokens):
        for call in calls:
            call()


def measure(
    calls: dict[str, Call], prompts: Tensor, new_tokens: int, rounds: int, *, apart: bool = False
) -> dict[str, list[float]]:
    """Tokens a second of all rows together, of each round; ``apart`` from prompts and the first."""
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(prompts, 4)
    for _ in range(rounds):
        for name, call in calls.items():
            seconds = _seconds(call, prompts, new_tokens)
            count = new_tokens
            if apart:
                # of two noisy times the difference may be none
                seconds = max(seconds - _seconds(call, prompts, 1), 1e-9)
                count -= 1
            rates[name].append(len(prompts) * count / seconds)
    return rates


def _seconds(call: Call, prompts: Tensor, new_tokens: int) -> float:
    _wait(prompts)
    start = time.perf_counter()
    call(prompts, new_tokens)
    _wait(prompts)
    return time.perf_counter() - start


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Print and return the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=list(SIZES), default=default)
    parser.add_argument("--dtype", choices=list(DTYPES), help="bfloat16 on a GPU, else float32")
    parser.add_argument("--size", nargs="+", help="of those of the device; all by default")
    parser.add_argument("--only", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sweep", action="store_true", help="batches 1 to 64, caches 1k to 128k")
    parser.add_argument("--batch", nargs="+", type=int, help="instead of those of the size")
    parser.add_argument(
        "--cache", nargs="+", type=int, help="tokens before the first that is timed"
    )
    parser.add_argument("--most-seconds", type=float, default=120.0)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error("--rounds must be at least 2")
    device = options.device
    sizes = SIZES[device]
    name_of_dtype = options.dtype or ("bfloat16" if device == "cuda" else "float32")
    dtype = DTYPES[name_of_dtype]
    ceilings = measure_ceilings(device, [dtype])
    env = _report.environment(device, ceilings)
    print(f"{_report.heading(env)}\n{torch.get_num_threads()} threads, {name_of_dtype}")
    print(
        f"{'model':6}{'batch':>6}{'cache':>8}  {'provider':20}{'tokens/s':>10}{'p20':>9}{'p80':>9}"
        f"{'GB/s':>8}"
    )
    caches = options.cache or (SWEPT_CACHES if options.sweep else None)
    rows: list[dict[str, Any]] = []
    for name in options.size or sizes:
        size = sizes[name]
        batches = options.batch or (SWEPT_BATCHES if options.sweep else size.batches)
        for prompt in caches or (PROMPT,):
            rows += _of_prompts(
                name, size, batches, prompt, dtype, options, ceilings, apart=caches is not None
            )
            if options.json:
                # what there is, should the time run out
                _report.save(Path(options.json), env, rows)
    return rows


def _of_prompts(
    name: str, size: Size, batches: Sequence[int], prompt: int, dtype: torch.dtype,
    options: argparse.Namespace, ceilings: Ceilings, *, apart: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of every batch of prompts of one length, printed as they come."""
    device, rows = options.device, list[dict[str, Any]]()
    every: dict[str, Call] | None = None
    errors: dict[str, float] = {}
    # one prompt alone is as long as any
    wanted = {
        batch: [x for x in options.only if (x, batch) != (RAGGED, 1)
                and not (x == "products" and device != "cpu")]
        for batch in batches
    }  # fmt: skip
    for batch in batches:
        shape = {
            "model": name, "parameters": size.parameters, "B": batch, "prompt": prompt,
            "new_tokens": size.new_tokens,
        }  # fmt: skip
        common = {
            "op": "generate", "mode": "decode", "shape": shape, "dtype": name_of(dtype)
        }  # fmt: skip
        counted = len(wanted[batch]) * (2 + options.rounds * (2 if apart else 1))
        reason = refusal(
            size, batch, prompt, dtype.itemsize, counted, options.most_seconds, ceilings, device
        )
        if reason is not None:
            rows += [{**common, "provider": x, "absent": reason} for x in wanted[batch]]
            print(f"{name:6}{batch:6}{prompt:8}  not run: {reason}", flush=True)
            continue
        if every is None:
            every, errors = providers(size, device, dtype, options.only, prompt)
        calls = {x: every[x] for x in wanted[batch] if x in every}
        prompts = torch.randint(size.vocab, (batch, prompt), device=device)
        peaks: dict[str, float | None] = {}
        for provider, call in list(calls.items()):
            try:
                peaks[provider] = extra_peak_mib(functools.partial(call, prompts, 4), device)
            except torch.OutOfMemoryError as error:
                rows.append({**common, "provider": provider, "failed": str(error).split("\n")[0]})
                print(f"{name:6}{batch:6}{prompt:8}  {provider:20} out of memory", flush=True)
                del calls[provider]
        measured = measure(calls, prompts, size.new_tokens, options.rounds, apart=apart)
        for provider, rates in measured.items():
            low, middle, high = percentiles(rates)
            # every weight is read once for a token of all rows, the tied embedding as the head; and
            # what each row has seen
            itemsize = 1 if provider == "fastlm.int8" else dtype.itemsize
            read = float(size.parameters * itemsize)
            if provider != "products":
                seen = batch * (prompt + size.new_tokens / 2)
                read += size.cache_bytes(seen, dtype.itemsize)
            gbps = read * middle / batch / 1e9
            low_ms, middle_ms, high_ms = (1e3 * batch / x for x in (high, middle, low))
            rows.append({
                **common,
                "provider": provider,
                "tokens_per_second_p20": low,
                "tokens_per_second_p50": middle,
                "tokens_per_second_p80": high,
                "ms_p50": middle_ms,
                "ms_p20": low_ms,
                "ms_p80": high_ms,
                "tflops": 2 * size.parameters * middle / 1e12,
                "gbps": gbps,
                "fraction_of_peak": gbps / ceilings.gbps,
                "peak_mib": peaks[provider],
                "max_rel_err": errors.get(provider),
            })  # fmt: skip
            numbers = f"{middle:10.1f}{low:9.1f}{high:9.1f}{gbps:8.1f}"
            print(f"{name:6}{batch:6}{prompt:8}  {provider:20}{numbers}", flush=True)
    return rows


if __name__ == "__main__":
    main()
