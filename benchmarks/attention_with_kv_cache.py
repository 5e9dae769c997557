"""One token of every sequence over a cache of keys and values, against what else reads one.

All there is to it is reading the cache: ``fraction_of_peak`` is the bandwidth over that of a copy.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import fastlm
from fastlm.benchmarks._harness import Case, Problem, benchmark, quick
from fastlm.benchmarks._judge import Outputs
from fastlm.benchmarks._providers import Provider, compiled, cuda_kernels, given, installed
from fastlm.ops.attention_with_kv_cache import BACKENDS


def _cache(batch: int, length: int, heads: int, kv_heads: int, head_dim: int) -> Problem:
    sizes = {"B": batch, "S": length, "H": heads, "G": kv_heads, "D": head_dim}
    return Problem(sizes, modes=("fwd",))


# an 8B model's heads, with caches from the size of the L2 cache to 17 GB
GPU = [
    _cache(batch, length, 32, 8, 128)
    for batch, length in (
        (1, 1024), (1, 32_768), (1, 131_072), (8, 32_768), (64, 1024), (64, 8192), (32, 131_072),
    )
]  # fmt: skip
GPU += [_cache(16, 32_768, 16, 16, 64), _cache(16, 32_768, 64, 8, 256)]
CPU = [_cache(1, 1024, 8, 4, 64), _cache(1, 16_384, 8, 4, 64), _cache(8, 2048, 8, 8, 64)]
QUICK = quick(
    [_cache(1, length, 8, 4, 64) for length in (2048, 512, 8192)],
    ("sdpa", "torch", "flash-attn", "fastlm", "cuda"),
)
PROVIDERS = ("sdpa", "torch", "torch.compile", "flex", "flash-attn", "fastlm", "cuda")


@benchmark("attention_with_kv_cache", PROVIDERS, cuda=GPU, cpu=CPU, quick=QUICK)
def attention_with_kv_cache(problem: Problem, dtype: torch.dtype, device: str) -> Case:
    batch, length, heads, kv_heads, head_dim = problem.shape.values()
    query = torch.randn(batch, 1, heads, head_dim, device=device).to(dtype)
    shape = (batch, length, kv_heads, head_dim)
    keys, values = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)

    def truth(mode: str) -> Outputs:
        # a row at a time: in float64 the caches of all need not fit
        rows = zip(query, keys, values, strict=True)
        return (torch.cat([_exact(q, k, v) for q, k, v in rows])[:, None],)

    ours = functools.partial(fastlm.attention_with_kv_cache, cache_seqlens=lengths)

    def plain(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q = query.view(batch, kv_heads, -1, head_dim)
        k, v = keys.transpose(1, 2), values.transpose(1, 2)
        p = (q @ k.mT * head_dim**-0.5).softmax(-1)
        return (p @ v).view(query.shape)

    def sdpa(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, keys, values))
        grouped = heads != kv_heads
        return scaled_dot_product_attention(q, k, v, enable_gqa=grouped).transpose(1, 2)

    return Case(
        inputs=(query, keys, values),
        providers={
            "sdpa": given(sdpa),
            "torch": given(plain),
            "torch.compile": lambda: compiled(plain),
            "flex": _flex,
            "flash-attn": functools.partial(_flash_attn, lengths),
            "fastlm": given(ours),
            "cuda": lambda: cuda_kernels(ours, BACKENDS, device),
        },
        truth=truth,
        bytes_moved={"fwd": keys.nbytes + values.nbytes + 2.0 * query.nbytes},
        flops={"fwd": 4.0 * batch * length * heads * head_dim},
    )


def _exact(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """``(1, H, D)`` of one sequence, in float64."""
    groups = query.shape[1] // keys.shape[1]
    k, v = (x.double().repeat_interleave(groups, dim=1) for x in (keys, values))
    scores = torch.einsum("hd,shd->hs", query[0].double(), k) * query.shape[-1] ** -0.5
    return torch.einsum("hs,shd->hd", scores.softmax(dim=-1), v)[None]


def _flex() -> Provider:
    function = installed("torch.nn.attention.flex_attention", "flex_attention")
    if isinstance(function, str):
        return function

    def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, keys, values))
        return function(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return compiled(attend)


def _flash_attn(lengths: Tensor) -> Provider:
    function = installed("flash_attn", "flash_attn_with_kvcache")
    return (
        function
        if isinstance(function, str)
        else functools.partial(function, cache_seqlens=lengths)
    )
