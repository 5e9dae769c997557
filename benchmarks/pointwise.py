"""Root-mean-square norm, rotary embedding and gated units: memory is read and written once.

``fraction_of_peak`` is the bandwidth over that of a copy; arithmetic hides behind it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm
from fastlm.benchmarks._harness import Case, Problem, benchmark, cotangent, quick
from fastlm.benchmarks._judge import Outputs
from fastlm.benchmarks._providers import Provider, compiled, cuda_kernels, given, installed
from fastlm.ops.glu import BACKENDS as GLU_BACKENDS
from fastlm.ops.rms_norm import BACKENDS as NORM_BACKENDS
from fastlm.ops.rotary import BACKENDS as ROTARY_BACKENDS

EPS = 1e-6
LIGER = "liger_kernel.transformers.functional"
LLAMA = "transformers.models.llama.modeling_llama"
MODES = ("fwd", "bwd", "fwd_bwd")
_FAST = ("torch", "transformers", "liger", "quack", "flash-attn", "fastlm", "cuda")


def _matrices(width: str, *sizes: tuple[int, int]) -> list[Problem]:
    return [Problem({"N": n, width: size}, modes=MODES) for n, size in sizes]


def _heads(*sizes: tuple[int, int, int, int, int]) -> list[Problem]:
    return [Problem(dict(zip("BTHGD", size, strict=True)), modes=MODES) for size in sizes]


# the widths of GPT-2, Llama 3 8B and 70B
GPU_NORM = _matrices("C", (16_384, 768), (16_384, 4096), (16_384, 8192))
CPU_NORM = _matrices("C", (1024, 128), (1024, 768), (1024, 4096))
QUICK_NORM = quick(_matrices("C", (256, 768), (256, 128), (256, 4096)), _FAST)
GPU_GLU = _matrices("I", (16_384, 3072), (16_384, 14_336), (8192, 28_672))
CPU_GLU = _matrices("I", (1024, 384), (1024, 2048), (1024, 14_336))
QUICK_GLU = quick(_matrices("I", (256, 2048), (256, 384), (256, 8192)), _FAST)
GPU_ROTARY = _heads((16, 1024, 12, 12, 64), (2, 8192, 32, 8, 128), (1, 16_384, 64, 8, 128))
CPU_ROTARY = _heads((4, 256, 6, 6, 64), (1, 2048, 12, 4, 64), (1, 2048, 32, 8, 128))
QUICK_ROTARY = quick(_heads((1, 512, 8, 2, 64), (1, 128, 8, 2, 64), (1, 2048, 8, 2, 64)), _FAST)

NORM_PROVIDERS = ("torch", "torch.compile", "transformers", "liger", "quack", "fastlm", "cuda")
ROTARY_PROVIDERS = (
    "torch", "torch.compile", "transformers", "liger", "flash-attn", "fastlm", "cuda"
)  # fmt: skip
GLU_PROVIDERS = ("torch", "torch.compile", "liger", "fastlm", "cuda")


@benchmark("rms_norm", NORM_PROVIDERS, cuda=GPU_NORM, cpu=CPU_NORM, quick=QUICK_NORM)
def rms_norm(problem: Problem, dtype: torch.dtype, device: str) -> Case:
    rows, width = problem.shape["N"], problem.shape["C"]
    x = torch.randn(rows, width, device=device).to(dtype).requires_grad_()
    weight = torch.rand(width, device=device).add_(0.5).to(dtype).requires_grad_()

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, EPS)

    size = float(x.nbytes)
    return Case(
        inputs=(x, weight),
        providers={
            "torch": given(plain),
            "torch.compile": lambda: compiled(plain),
            "transformers": functools.partial(_llama_norm, width),
            "liger": lambda: _then(installed(LIGER, "liger_rms_norm"), eps=EPS, in_place=False),
            "quack": lambda: _then(installed("quack", "rmsnorm"), eps=EPS),
            "fastlm": given(fastlm.rms_norm, eps=EPS),
            "cuda": lambda: cuda_kernels(fastlm.rms_norm, NORM_BACKENDS, device),
        },
        truth=_truth(functools.partial(fastlm.rms_norm, backend="reference"), (x, weight)),
        bytes_moved={"fwd": 2 * size, "bwd": 3 * size, "fwd_bwd": 5 * size},
        # square, sum, two products; as many again for each of the sums and products of backward
        flops={"fwd": 4.0 * x.numel(), "bwd": 8.0 * x.numel(), "fwd_bwd": 12.0 * x.numel()},
    )


@benchmark("apply_rotary", ROTARY_PROVIDERS, cuda=GPU_ROTARY, cpu=CPU_ROTARY, quick=QUICK_ROTARY)
def apply_rotary(problem: Problem, dtype: torch.dtype, device: str) -> Case:
    b, t, h, g, d = (problem.shape[name] for name in "BTHGD")
    query, key = (
        torch.randn(b, t, heads, d, device=device).to(dtype).requires_grad_() for heads in (h, g)
    )
    angles = torch.arange(t, device=device)[:, None] * 1e4 ** -torch.arange(
        0, 1, 2 / d, device=device
    )
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def plain(query: Tensor, key: Tensor) -> Outputs:
        return tuple(_rotated(x, cos[:, None], sin[:, None]) for x in (query, key))

    ours = functools.partial(fastlm.apply_rotary, cos=cos, sin=sin)
    size = float(query.nbytes + key.nbytes)
    flops = 3.0 * (query.numel() + key.numel())
    return Case(
        inputs=(query, key),
        providers={
            "torch": given(plain),
            "torch.compile": lambda: compiled(plain),
            "transformers": functools.partial(_llama_rotary, cos, sin),
            "liger": functools.partial(_liger_rotary, cos, sin),
            "flash-attn": functools.partial(_flash_rotary, cos, sin),
            "fastlm": given(ours),
            "cuda": lambda: cuda_kernels(ours, ROTARY_BACKENDS, device),
        },
        truth=_truth(
            lambda query, key: fastlm.apply_rotary(
                query, key, cos.double(), sin.double(), backend="reference"
            ),
            (query, key),
        ),
        bytes_moved={"fwd": 2 * size, "bwd": 2 * size, "fwd_bwd": 4 * size},
        flops={"fwd": flops, "bwd": flops, "fwd_bwd": 2 * flops},
        overwriting=("liger",),
    )


@benchmark("glu", GLU_PROVIDERS, cuda=GPU_GLU, cpu=CPU_GLU, quick=QUICK_GLU)
def glu(problem: Problem, dtype: torch.dtype, device: str) -> Case:
    shape = problem.shape["N"], problem.shape["I"]
    gate, up = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2))

    def plain(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    size = float(gate.nbytes)
    return Case(
        inputs=(gate, up),
        providers={
            "torch": given(plain),
            "torch.compile": lambda: compiled(plain),
            "liger": lambda: installed(LIGER, "liger_swiglu"),
            "fastlm": given(fastlm.swiglu),
            "cuda": lambda: cuda_kernels(fastlm.swiglu, GLU_BACKENDS, device),
        },
        truth=_truth(functools.partial(fastlm.swiglu, backend="reference"), (gate, up)),
        bytes_moved={"fwd": 3 * size, "bwd": 5 * size, "fwd_bwd": 8 * size},
        # exponential, sum, quotient, product; its gradients
        flops={
            "fwd": 4.0 * gate.numel(),
            "bwd": 8.0 * gate.numel(),
            "fwd_bwd": 12.0 * gate.numel(),
        },
        overwriting=("liger",),
    )


def _truth(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Callable[[str], Outputs]:
    """``function`` in float64, and its gradients as the harness takes them."""

    @functools.cache
    def exact(mode: str) -> Outputs:
        wide = tuple(x.detach().double().requires_grad_() for x in inputs)
        result = function(*wide)
        outs = (result,) if isinstance(result, Tensor) else result
        outputs = tuple(out.detach() for out in outs)
        if mode == "fwd":
            return outputs
        upstream = [
            cotangent(tuple(out.shape), inputs[0].dtype, str(out.device)).double() for out in outs
        ]
        grads = torch.autograd.grad(outs, wide, upstream)
        return grads if mode == "bwd" else (*outputs, *grads)

    return exact


def _then(function: Callable[..., Any] | str, **options: object) -> Provider:
    return function if isinstance(function, str) else functools.partial(function, **options)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def _llama_norm(width: int) -> Provider:
    kind = installed(LLAMA, "LlamaRMSNorm")
    if isinstance(kind, str):
        return kind
    with torch.device("meta"):
        module = kind(width, EPS)
    return lambda x, weight: torch.func.functional_call(module, {"weight": weight}, (x,))


def _llama_rotary(cos: Tensor, sin: Tensor) -> Provider:
    """Its tables are those of both halves; heads stand before tokens there."""
    rotate = installed(LLAMA, "apply_rotary_pos_emb")
    if isinstance(rotate, str):
        return rotate
    wide = [torch.cat((x, x), -1)[None] for x in (cos, sin)]
    return lambda query, key: rotate(query, key, *wide, unsqueeze_dim=2)


def _liger_rotary(cos: Tensor, sin: Tensor) -> Provider:
    rotate = installed(LIGER, "liger_rope")
    if isinstance(rotate, str):
        return rotate
    wide = [torch.cat((x, x), -1)[None] for x in (cos, sin)]

    def call(query: Tensor, key: Tensor) -> Outputs:
        q, k = rotate(query.transpose(1, 2), key.transpose(1, 2), *wide)
        return q.transpose(1, 2), k.transpose(1, 2)

    return call


def _flash_rotary(cos: Tensor, sin: Tensor) -> Provider:
    rotate = installed("flash_attn.layers.rotary", "apply_rotary_emb")
    if isinstance(rotate, str):
        return rotate
    return lambda query, key: (rotate(query, cos, sin), rotate(key, cos, sin))
