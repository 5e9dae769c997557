"""Causal attention, plain and with its options, against what else computes it.

Work is counted over the pairs of query and key that see each other, so what computes more of them
is only slower.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastlm
from fastlm.benchmarks._harness import Case, Problem, benchmark, cotangent, quick
from fastlm.benchmarks._judge import Outputs
from fastlm.benchmarks._providers import Make, Provider, compiled, cuda_kernels, given
from fastlm.ops.attention import BACKENDS
from fastlm.ops.reference import attention as reference
from fastlm.ops.reference._key_ranges import key_ranges

MODES = ("fwd", "bwd", "fwd_bwd")
FORCED = {
    "sdpa.flash": SDPBackend.FLASH_ATTENTION,
    "sdpa.cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa.efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa.math": SDPBackend.MATH,
}
# These neither store scores nor have to be compiled for every shape.
FUSED = (
    "sdpa", "sdpa.flash", "sdpa.cudnn", "sdpa.efficient", "flash-attn", "fastlm", "cuda", "gluon",
)  # fmt: skip
STORING = ("sdpa.math", "torch", "torch.compile")
_BOTH = ("flex", "varlen", "flash-attn", "fastlm", "cuda")
CAUSAL_PROVIDERS = ("sdpa", *FORCED, "torch", "torch.compile", *_BOTH, "gluon")
OPTIONS_PROVIDERS = ("sdpa.mask", "sdpa.built", "torch", *_BOTH)
SOFTCAP = 50.0  # of Gemma 2


def _problem(kind: str, only: tuple[str, ...] = (), **shape: int) -> Problem:
    """``W`` is the window, ``docs`` the number of documents, ``S`` keys where they are not T."""
    return Problem(shape, only=only, inputs=kind, modes=MODES)


def _causal(b: int, t: int, h: int, d: int, *only: str, g: int = 0) -> Problem:
    return _problem("causal", only, B=b, T=t, H=h, G=g or h, D=d)


# one query of the targets first, then as many tokens and as wide a model at every length
GPU = [_causal(16, 1024, 32, 64), _causal(2, 8192, 16, 128, *FUSED, "varlen", "flex")]
GPU += [
    _causal(16384 // t, t, 2048 // d, d, *FUSED, *(STORING if t <= 2048 else ()))
    for d in (64, 128, 256)
    for t in (512, 1024, 2048, 4096, 8192, 16384)
    if (t, d) not in ((1024, 64), (8192, 128))
]
# grouped queries; the last has the shape of Llama 3 8B
GPU += [_causal(4, 1024, 12, 64, *FUSED, g=4), _causal(2, 8192, 32, 128, *FUSED, g=8)]
# the models of the demo and of a small CPU run, one sequence of GPT-2, and grouped queries
CPU = [_causal(b, t, h, d) for b, t, h, d in ((12, 64, 4, 32), (4, 256, 6, 64), (1, 1024, 12, 64))]
CPU += [_causal(2, 512, 12, 64, "sdpa", "fastlm", g=4)]

# windows of a small and of Mistral's size, documents of 1024 tokens on average, Gemma 2, gpt-oss
GPU_OPTIONS = [
    _problem("window", B=2, T=8192, H=16, G=16, D=128, W=1024),
    _problem("window", B=1, T=16384, H=32, G=8, D=128, W=4096),
    _problem("packed", B=1, T=16384, H=32, G=32, D=64, docs=16),
    _problem("packed", B=1, T=16384, H=16, G=16, D=128, docs=16),
    _problem("padded", B=8, T=2048, H=16, G=16, D=128),
    _problem("softcap", B=2, T=4096, H=16, G=8, D=256),
    _problem("sinks", B=2, T=4096, H=64, G=8, D=64),
]
_BESIDE = ("sdpa.mask", "sdpa.built", "flex", "fastlm")
CPU_OPTIONS = [
    _problem("window", _BESIDE, B=1, T=2048, H=12, G=12, D=64, W=256),
    _problem("packed", _BESIDE, B=1, T=2048, H=12, G=12, D=64, docs=8),
    _problem("padded", _BESIDE, B=4, T=512, H=12, G=12, D=64),
    _problem("padded", _BESIDE, B=4, T=64, H=4, G=4, D=32),
    _problem("prefix", _BESIDE, B=1, T=256, S=1024, H=12, G=12, D=64),
    _problem("softcap", ("torch", "fastlm"), B=4, T=256, H=6, G=6, D=64),
    _problem("sinks", ("torch", "fastlm"), B=1, T=1024, H=12, G=4, D=64),
]
_UNCOMPILED = (*FUSED, "sdpa.math", "torch", "sdpa.mask", "sdpa.built", "varlen")
QUICK = quick([_causal(1, t, 4, 64) for t in (256, 128, 512)], _UNCOMPILED)
QUICK += [replace(QUICK[0], only=("flex",), modes=("fwd",))]
_WINDOW = _problem("window", B=1, T=512, H=4, G=4, D=64, W=64)
QUICK_OPTIONS = quick(
    [
        _WINDOW,
        _problem("packed", B=1, T=512, H=4, G=4, D=64, docs=8),
        _problem("padded", B=4, T=128, H=4, G=4, D=64),
        _problem("prefix", B=1, T=64, S=512, H=4, G=4, D=64),
        _problem("softcap", B=1, T=256, H=4, G=4, D=64),
        _problem("sinks", B=1, T=256, H=4, G=2, D=64),
    ],
    _UNCOMPILED,
)
QUICK_OPTIONS += [replace(_WINDOW, only=("flex",), modes=("fwd",))]


@dataclass(frozen=True)
class _Call:
    """What attends to what, as the arguments of ``causal_attention``.

    ``sinks`` are constants here: of their gradient, one number per head, errors say little.
    """

    kind: str
    shape: tuple[int, int, int]  # B, T, S
    scale: float
    window_size: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    cu_seqlens: Tensor | None = None
    longest: int = 0
    key_start: Tensor | None = None
    device: str = "cpu"

    def ranges(self) -> tuple[Tensor, Tensor]:
        """The first and end of the keys of each query, ``(B or 1, T)``."""
        _, num_queries, num_keys = self.shape
        sequences = (self.cu_seqlens, None, self.key_start, None)
        device = torch.device(self.device)
        return key_ranges(num_queries, num_keys, *sequences, self.window_size, device)

    def mask(self) -> Tensor:
        """Bool ``(B or 1, 1, T, S)``."""
        first, end = self.ranges()
        keys = torch.arange(self.shape[2], device=first.device)
        return ((keys >= first[..., None]) & (keys < end[..., None]))[:, None]

    def flops(self, heads: int, head_dim: int) -> float:
        """Of the forward: for each pair one row of q k^T and one of p v, 2 head_dim each."""
        first, end = self.ranges()
        pairs = (end - first).sum().item() * (self.shape[0] // len(first))
        return 4.0 * heads * head_dim * pairs


@benchmark("attention", CAUSAL_PROVIDERS, cuda=GPU, cpu=CPU, quick=QUICK)
def attention(problem: Problem, dtype: torch.dtype, device: str) -> Case:
    return _case(problem, dtype, device)


@benchmark(
    "attention_options", OPTIONS_PROVIDERS, cuda=GPU_OPTIONS, cpu=CPU_OPTIONS, quick=QUICK_OPTIONS
)
def attention_options(problem: Problem, dtype: torch.dtype, device: str) -> Case:
    return _case(problem, dtype, device)


def _case(problem: Problem, dtype: torch.dtype, device: str) -> Case:
    b, t, h, g, d = (problem.shape[name] for name in "BTHGD")
    s = problem.shape.get("S", t)
    sizes = ((b, t, h, d), (b, s, g, d), (b, s, g, d))
    inputs = tuple(torch.randn(size, device=device).to(dtype).requires_grad_() for size in sizes)
    call = _call(problem, dtype, device)
    saved: dict[str, Outputs] = {}

    def truth(mode: str) -> Outputs:
        if not saved:
            q, k, v = (x.detach() for x in inputs)
            divided = (call.sinks, call.cu_seqlens, None, call.key_start, None)
            options = (call.scale, call.window_size, call.softcap)
            out, lse = reference.truth_forward(q, k, v, *divided, *options)
            dout = cotangent((b, t, h, d), dtype, str(q.device))
            *grads, _ = reference.truth_backward(
                dout, None, q, k, v, *divided, out, lse, *options, True, True, False
            )
            saved.update(fwd=(out,), bwd=tuple(grads), fwd_bwd=(out, *grads))
        return saved[mode]

    flops = call.flops(h, d)
    query, key = (x.numel() * x.element_size() for x in inputs[:2])
    return Case(
        inputs=inputs,
        providers=_providers(call),
        truth=truth,
        # out is as large as query, the gradients as their tensors, dout as out
        bytes_moved={
            "fwd": 2 * query + 2 * key,
            "bwd": 4 * query + 4 * key,
            "fwd_bwd": 6 * query + 6 * key,
        },
        # the backward recomputes the scores: five products instead of two
        flops={"fwd": flops, "bwd": 2.5 * flops, "fwd_bwd": 3.5 * flops},
        gradient_multiple=3.0 if call.softcap is not None or d > 128 else 2.0,
    )


def _call(problem: Problem, dtype: torch.dtype, device: str) -> _Call:
    shape, kind = problem.shape, problem.inputs
    b, t = shape["B"], shape["T"]
    call = _Call(kind, (b, t, shape.get("S", t)), shape["D"] ** -0.5, device=device)
    if kind == "window":
        return replace(call, window_size=shape["W"])
    if kind == "packed":
        inner = torch.randperm(t - 1)[: shape["docs"] - 1].sort().values + 1
        bounds = torch.cat([torch.tensor([0]), inner, torch.tensor([t])])
        longest = int(bounds.diff().max())
        return replace(call, cu_seqlens=bounds.int().to(device), longest=longest)
    if kind == "padded":
        # the first row fills the batch, the others are half as long at least
        key_start = torch.randint(t // 2, (b,), dtype=torch.int32)
        key_start[0] = 0
        return replace(call, key_start=key_start.to(device))
    if kind == "softcap":
        return replace(call, softcap=SOFTCAP)
    if kind == "sinks":
        return replace(call, sinks=torch.randn(shape["H"], device=device).to(dtype))
    return call


def _providers(call: _Call) -> dict[str, Make]:
    """The yardstick is what torch fuses, with a mask where it must; else what one writes."""
    fits_mask = call.softcap is None and call.sinks is None
    if call.kind == "causal":
        providers: dict[str, Make] = {"sdpa": given(sdpa)}
        providers |= {name: given(_forced(backend)) for name, backend in FORCED.items()}
        providers["torch"] = given(eager(call))
        providers["torch.compile"] = lambda: compiled(eager(call))
        providers["gluon"] = lambda: hopper(call)
    elif fits_mask:
        providers = {
            "sdpa.mask": given(sdpa_mask(call, at_once=True)),
            "sdpa.built": given(sdpa_mask(call, at_once=False)),
            "torch": given(eager(call)),
        }
    else:
        refusal = f"scaled_dot_product_attention has no {call.kind}"
        providers = {
            "torch": given(eager(call)),
            "sdpa.mask": lambda: refusal,
            "sdpa.built": lambda: refusal,
        }
    return {
        **providers,
        "flex": functools.partial(flex, call),
        "varlen": functools.partial(varlen, call),
        "flash-attn": functools.partial(flash_attn, call),
        "fastlm": given(fused(call)),
        "cuda": lambda: cuda_kernels(fused(call), BACKENDS, call.device),
    }


def fused(call: _Call) -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor, backend: str = "auto") -> Tensor:
        out = fastlm.causal_attention(
            query,
            key,
            value,
            window_size=call.window_size,
            softcap=call.softcap,
            sinks=call.sinks,
            cu_seqlens_q=call.cu_seqlens,
            key_start=call.key_start,
            backend=backend,
        )
        assert isinstance(out, Tensor)
        return out

    return attend


def hopper(call: _Call) -> Provider:
    if call.device != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        return "needs a GPU of sm_90"
    return functools.partial(fused(call), backend="gluon")


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def _forced(backend: SDPBackend) -> Callable[..., Tensor]:
    """SDPA by one of its backends, which says why where it does not take the call."""

    def only(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            try:
                return sdpa(query, key, value)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                with warnings.catch_warnings(record=True) as notes:
                    warnings.simplefilter("always")
                    with contextlib.suppress(RuntimeError):
                        sdpa(query, key, value)
                reasons = (str(note.message).split(" (Triggered")[0] for note in notes)
                raise RuntimeError(" ".join([str(error), *reasons]).replace("\n", " ")) from error

    return only


def sdpa_mask(call: _Call, *, at_once: bool) -> Callable[..., Tensor]:
    """SDPA with a mask: there already, or built in each call, as it is where batches differ."""
    kept = functools.cache(call.mask)
    return lambda q, k, v: sdpa(q, k, v, kept() if at_once else call.mask())


def eager(call: _Call) -> Callable[..., Tensor]:
    """What one writes without a fused kernel: scores, mask, softmax, in the working dtype."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        group = query.shape[2] // key.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
        scores = q @ k.mT * call.scale
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        if call.kind == "causal":
            hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        else:
            hidden = ~call.mask()
        # the lowest number and not -inf: rows of padding see nothing, and would be NaN
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        if call.sinks is not None:
            sinks = call.sinks[:, None, None].expand(len(q), -1, q.shape[2], 1)
            p = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        else:
            p = scores.softmax(-1)
        if call.key_start is not None:
            p = p.masked_fill(hidden, 0.0)
        return (p @ v).transpose(1, 2)

    return attend


def flex(call: _Call) -> Provider:
    """FlexAttention, compiled; the mask of its blocks is there already."""
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError as error:
        return str(error)
    if call.sinks is not None:
        try:
            from torch.nn.attention.flex_attention import AuxRequest
        except ImportError as error:
            return str(error)
    batch, num_queries, num_keys = call.shape

    @functools.cache
    def block_mask() -> object:
        offset, window, start = num_keys - num_queries, call.window_size, call.key_start
        tokens = torch.arange(num_queries, device=call.device)
        document = None
        if call.cu_seqlens is not None:
            document = torch.searchsorted(call.cu_seqlens[1:].contiguous(), tokens, right=True)

        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            visible = k <= q + offset
            if window is not None:
                visible = visible & (k > q + offset - window)
            if document is not None:
                visible = visible & (document[q] == document[k])
            if start is not None:
                visible = visible & (k >= start[b])
            return visible

        rows = None if start is None else batch
        return create_block_mask(seen, rows, None, num_queries, num_keys, device=call.device)

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return SOFTCAP * torch.tanh(score / SOFTCAP)

    def attend(query: Tensor, key: Tensor, value: Tensor, blocks: object) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        options: dict[str, Any] = {
            "score_mod": None if call.softcap is None else capped,
            "block_mask": blocks,
            "enable_gqa": q.shape[1] != k.shape[1],
        }
        if call.sinks is None:
            return flex_attention(q, k, v, **options).transpose(1, 2)
        out, aux = flex_attention(q, k, v, **options, return_aux=AuxRequest(lse=True))
        share = torch.sigmoid(aux.lse - call.sinks.float()[:, None])
        return (out * share[..., None].to(out.dtype)).transpose(1, 2)

    fast = compiled(attend)
    return lambda *inputs: fast(*inputs, block_mask())


def varlen(call: _Call) -> Provider:
    """torch's own for packed sequences, whose every row is a document where none are packed."""
    if refusal := _no_varlen(call):
        return refusal
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        return str(error)
    batch, length, _ = call.shape
    bounds, longest = call.cu_seqlens, call.longest
    if bounds is None:
        bounds = torch.arange(batch + 1, dtype=torch.int32, device=call.device) * length
        longest = length
    left = -1 if call.window_size is None else call.window_size - 1

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.flatten(0, 1) for x in (query, key, value))
        grouped = q.shape[1] != k.shape[1]
        out = varlen_attn(
            q, k, v, bounds, bounds, longest, longest, window_size=(left, 0), enable_gqa=grouped
        )
        assert isinstance(out, Tensor)
        return out.view(query.shape)

    return attend


def _no_varlen(call: _Call) -> str | None:
    if call.kind in ("softcap", "sinks"):
        return f"varlen_attn has no {call.kind}"
    if call.kind in ("padded", "prefix"):
        return f"varlen_attn takes {call.kind} rows only after they are copied together"
    return None


def flash_attn(call: _Call) -> Provider:
    """The package of that name."""
    if call.kind in ("sinks", "padded"):
        return f"flash_attn_func has no {call.kind}"
    try:
        package = importlib.import_module("flash_attn")
    except ImportError as error:
        return str(error)
    left = -1 if call.window_size is None else call.window_size - 1
    options = {"causal": True, "window_size": (left, 0), "softcap": call.softcap or 0.0}
    if call.cu_seqlens is None:
        return functools.partial(package.flash_attn_func, **options)
    bounds, longest = call.cu_seqlens, call.longest

    def packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.flatten(0, 1) for x in (query, key, value))
        return package.flash_attn_varlen_func(
            q, k, v, bounds, bounds, longest, longest, **options
        ).view(query.shape)

    return packed
