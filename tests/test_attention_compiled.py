"""causal_attention inside torch: compilers, checkpointing, autocast, graphs, inputs given twice."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.attention import assert_same_bits, backends, blocks, run, upstream
from support.captured import captured
from support.interpreter import interpreted_only
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import fastlm
from fastlm.ops.eager import _flash
from fastlm.ops.eager import attention as eager
from fastlm.testing import attention_inputs

KERNELS = backends("triton", "torch")


@pytest.fixture(autouse=True)
def _small_blocks():
    with blocks(16, 16):
        yield


Options = dict[str, Any]


def packed(num_queries: int, num_keys: int, count: int, device: str) -> Options:
    def ends(length: int) -> Tensor:
        return torch.linspace(0, length, count + 1, device=device).int()

    return {"cu_seqlens_q": ends(num_queries), "cu_seqlens_k": ends(num_keys)}


def padded(num_queries: int, num_keys: int, count: int, device: str) -> Options:
    rows = torch.arange(count, device=device)
    return {"key_start": rows, "key_end": num_keys - 2 * rows}


def windowed(num_queries: int, num_keys: int, count: int, device: str) -> Options:
    return {"window_size": 5 + count}


def capped(num_queries: int, num_keys: int, count: int, device: str) -> Options:
    return {"softcap": 2.0, "scale": -0.4}


def with_sinks(num_queries: int, num_keys: int, count: int, device: str) -> Options:
    return {"sinks": torch.linspace(-1.0, 1.0, 4, device=device)}


def together(*options: Callable[..., Options]) -> Callable[..., Options]:
    def every(*args: Any) -> Options:
        return {name: value for option in options for name, value in option(*args).items()}

    return every


REST = (windowed, capped, with_sinks)
ALONE = {option.__name__: option for option in (packed, padded, *REST)}
ALL = {"all packed": together(packed, *REST), "all padded": together(padded, *REST)}
# T, S, and rows or documents; of the first no two sizes are equal, which is compiled in
LENGTHS = [(20, 25, 5), (33, 40, 3), (9, 12, 6), (50, 21, 7)]


def compiled_as_eager(
    options: Callable[..., Options], backend: str, device: str, compiler: str = "aot_eager"
) -> None:
    def function(query: Tensor, key: Tensor, value: Tensor, more: Options) -> Any:
        return fastlm.causal_attention(query, key, value, return_lse=True, backend=backend, **more)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=compiler)
    for at, (num_queries, num_keys, count) in enumerate(LENGTHS):
        more = options(num_queries, num_keys, count, device)
        rows = 1 if "cu_seqlens_q" in more else count
        sizes = (rows, num_queries, num_keys, 4, 2, 8)
        results = []
        for call in (function, compiled):
            leaves = [x.requires_grad_() for x in attention_inputs(*sizes, device=device)]
            given = dict(more)
            if "sinks" in more:
                given["sinks"] = more["sinks"].clone().requires_grad_()
                leaves.append(given["sinks"])
            grads = upstream(leaves[0], leaves[2])
            # other lengths, documents, rows and windows: nothing is compiled anew
            with torch.compiler.set_stance("fail_on_recompile" if at else "default"):
                outputs = call(*leaves[:3], given)
            results.append((*outputs, *torch.autograd.grad(outputs, leaves, grads)))
        if compiler == "inductor":  # sums the sinks' gradients in its own order
            torch.testing.assert_close(results[1], results[0])
        else:
            assert_same_bits(results[1], results[0])


@pytest.mark.parametrize("names", ["padded", "all packed"])
def test_compiled_once_for_all_lengths(names, device):
    compiled_as_eager((ALONE | ALL)[names], "torch", device)


@pytest.mark.slow
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("names", ALONE | ALL)
def test_compiled_with_any_option(names, backend, device):
    compiled_as_eager((ALONE | ALL)[names], backend, device)


# which inductor itself uses
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("names", ALL)
def test_compiled_by_inductor(names, device):
    compiled_as_eager(ALL[names], "torch", device, compiler="inductor")


# Inputs given twice


SAME = {
    "all": lambda x, y: (x, x, x),
    "query and key": lambda x, y: (x, x, y),
    "query and value": lambda x, y: (x, y, x),
    "key and value": lambda x, y: (x, y, y),
}


@pytest.mark.parametrize("given", SAME)
def test_one_tensor_may_be_given_twice(given, device):
    def function(x: Tensor, y: Tensor, bounds: Tensor) -> Tensor:
        out = fastlm.causal_attention(
            *SAME[given](x, y), key_start=bounds, key_end=bounds, backend="torch"
        )
        assert isinstance(out, Tensor)
        return out + 0.0

    inputs = attention_inputs(2, 9, 9, 2, 2, 8, device=device)
    bounds = torch.tensor([9, 4], device=device)

    def results(call: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        leaves = [x.detach().clone().requires_grad_() for x in given]
        out = call(*leaves)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out), materialize_grads=True)
        return out, *grads

    got = [
        results(functools.partial(call, bounds=bounds), inputs[:2])
        for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager"))
    ]
    assert_same_bits(got[1], got[0])
    # as of three tensors, whose gradients add up
    ends = {"key_start": bounds, "key_end": bounds.clone(), "backend": "torch"}
    out, *grads = results(
        functools.partial(fastlm.causal_attention, **ends), SAME[given](*inputs[:2])
    )
    assert torch.equal(out, got[0][0])
    for at in (0, 1):
        same = [SAME[given](0, 1)[i] == at for i in range(3)]
        total = sum(grad for grad, mine in zip(grads, same, strict=True) if mine)
        torch.testing.assert_close(got[0][1 + at], torch.zeros_like(inputs[at]) + total)


# Activation checkpointing


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One more element for each forward of the torch backend."""
    calls, forward = [], eager.forward

    def counted(*args: Any) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return forward(*args)

    monkeypatch.setattr(eager, "forward", counted)
    return calls


def saves_attention(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = torch.ops.fastlm.causal_attention_forward.default
    return CheckpointPolicy.MUST_SAVE if operator == saved else CheckpointPolicy.PREFER_RECOMPUTE


SELECTIVE = functools.partial(create_selective_checkpoint_contexts, saves_attention)


@pytest.mark.parametrize(
    ("how", "forwards"),
    [
        ({"use_reentrant": False}, 2),
        ({"use_reentrant": True}, 2),
        ({"use_reentrant": False, "context_fn": SELECTIVE}, 1),
    ],
    ids=["checkpoint", "reentrant", "selective"],
)
@pytest.mark.parametrize("names", [None, *ALL])
def test_checkpoints_give_the_same_gradients(names, how, forwards, device, monkeypatch):
    more = {} if names is None else ALL[names](20, 25, 3, device)
    rows = 1 if "cu_seqlens_q" in more else 3

    def function(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        given = more if sinks is None else {**more, "sinks": sinks}
        out, lse = fastlm.causal_attention(
            2 * query, key, value, return_lse=True, backend="torch", **given
        )
        return (out.square().sum() + lse.masked_fill(lse == -torch.inf, 0.0).sum()).sin()

    calls, results = counting(monkeypatch), []
    for call in (function, functools.partial(checkpoint, function, **how)):
        leaves = [
            x.requires_grad_() for x in attention_inputs(rows, 20, 25, 4, 2, 8, device=device)
        ]
        sinks = more["sinks"].clone().requires_grad_() if "sinks" in more else None
        calls.clear()
        call(*leaves, sinks).backward()
        results.append([x.grad for x in (*leaves, sinks) if x is not None])
    assert len(calls) == forwards
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


WATCHES = {
    "checked": fastlm.checked,
    "profiler": torch.profiler.profile,
    "flops": functools.partial(FlopCounterMode, display=False),
}


@interpreted_only
@pytest.mark.parametrize("watched", ["forward", "backward"])
@pytest.mark.parametrize("watch", WATCHES)
def test_a_checkpoint_of_which_one_half_is_watched(watch, watched):
    leaves = [x.requires_grad_() for x in attention_inputs(2, 8, 8, 4, 2, 8)]
    halves = {"forward": contextlib.nullcontext(), "backward": contextlib.nullcontext()}
    halves[watched] = WATCHES[watch]()
    with halves["forward"]:
        out = checkpoint(fastlm.causal_attention, *leaves, use_reentrant=False)
    with halves["backward"]:
        got = torch.autograd.grad(out.square().sum(), leaves)
    want = torch.autograd.grad(fastlm.causal_attention(*leaves).square().sum(), leaves)
    for mine, alone in zip(got, want, strict=True):
        torch.testing.assert_close(mine, alone)


# Autocast


@pytest.mark.parametrize("working", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", backends("triton", "torch", "reference"))
def test_autocast_casts_what_torch_would(backend, working, device):
    def dtypes(x: Tensor) -> list[torch.dtype]:
        mine, _ = fastlm.causal_attention(x, x, x, return_lse=True, backend=backend)
        heads = x.transpose(1, 2)
        return [mine.dtype, F.scaled_dot_product_attention(heads, heads, heads).dtype]

    x = torch.randn(1, 4, 2, 8, device=device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        with torch.autocast(device, working):
            mine, torchs = dtypes(x.to(dtype))
        assert mine == torchs
        assert mine == (dtype if dtype == torch.float64 else working)


@pytest.mark.parametrize("backend", KERNELS)
def test_autocast_gives_gradients_in_the_dtypes_of_the_inputs(backend, device):
    # mixed, as a rotary embedding in float32 leaves them
    wide = attention_inputs(1, 20, 20, 4, 2, 8, device=device)
    given = [wide[0], wide[1], wide[2].bfloat16()]
    more = {"sinks": torch.linspace(-1.0, 1.0, 4, device=device), "window_size": 5}
    with torch.autocast(device, torch.bfloat16):
        got = run(*given, backend=backend, **more)
    want = run(*(x.bfloat16() for x in given), backend=backend, **more)
    for name, a, b in zip(("out", "lse"), got, want, strict=False):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
    for x, a, b in zip((*given, more["sinks"]), got[2:], want[2:], strict=True):
        assert a.dtype == x.dtype
        assert torch.equal(a, b.to(x.dtype))
    with pytest.raises(TypeError, match="value must have the dtype of query, float32"):
        run(*given, backend=backend)


def test_autocast_is_compiled(device):
    def function(*inputs: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return fastlm.causal_attention(*inputs, backend="torch").float()

    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [x.requires_grad_() for x in attention_inputs(1, 9, 9, 2, 1, 8, device=device)]
        out = call(*leaves)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    assert_same_bits(results[1], results[0])


# Graphs


@pytest.mark.parametrize("names", ALL)
def test_a_captured_graph_is_right_for_other_values(names, device):
    sizes = (1, 6, 6, 4, 2, 16)

    def example(seed: int) -> list[Tensor]:
        more = ALL[names](6, 6, 1 + seed if names == "all packed" else 1, device)
        inputs = attention_inputs(*sizes, torch.bfloat16, device, seed=seed)
        if names == "all packed":
            bounds = F.pad(more["cu_seqlens_q"], (0, 1 - seed), value=6)
        else:
            bounds = more["key_start"] + 2 * seed
        return [*inputs, more["sinks"] + seed, bounds]

    def step(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, bounds: Tensor) -> Any:
        leaves = [x.detach().requires_grad_() for x in (query, key, value, sinks)]
        name = "cu_seqlens_q" if names == "all packed" else "key_start"
        outputs = fastlm.causal_attention(
            *leaves[:3], sinks=leaves[3], window_size=3, softcap=3.0, return_lse=True,
            backend="triton", **{name: bounds},
        )  # fmt: skip
        grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])
        return [*(x.detach() for x in outputs), *grads]

    places, results = example(0), []

    def fixed_step() -> None:
        results[:] = step(*places)

    replay = captured(fixed_step, device)
    others = example(1)
    for place, values in zip(places, others, strict=True):
        place.copy_(values)
    replay()
    for got, want in zip(results, step(*others), strict=True):
        assert torch.equal(got, want)


# A loss scaled for float16


def test_a_gradient_of_lse_may_pass_the_largest_float16(device, monkeypatch):
    leaves = [
        x.requires_grad_() for x in attention_inputs(1, 20, 20, 2, 1, 8, torch.float16, device)
    ]
    outputs = fastlm.causal_attention(*leaves, scale=0.1, return_lse=True, backend="torch")
    dout, dlse = upstream(leaves[0], leaves[2])
    dlse[0, 1, 3] = 1e5
    # as on CPUs that multiply it
    monkeypatch.setattr(_flash, "_cpu_dtype", lambda dtype: dtype)
    with fastlm.checked():
        grads = torch.autograd.grad(outputs, leaves, (dout, dlse))
    assert all(grad.isfinite().all() for grad in grads)
