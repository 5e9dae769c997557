"""Causal attention against torch's, whose kernel is named in the rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm
from fastlm.ops.reference import attention as reference

from ._harness import Case, Outputs, Problem, benchmark, compiled, cotangent


def _sizes(*lengths: int, tokens: int, width: int, head_dims: tuple[int, ...]) -> list[Problem]:
    """As many tokens and as wide a model at every length; scores are stored only while they fit."""
    return [
        Problem(
            {"B": tokens // length, "T": length, "H": width // d, "G": width // d, "D": d},
            only=() if length <= 2048 else ("sdpa", "fastlm"),
        )
        for d in head_dims
        for length in lengths
    ]


GPU = _sizes(512, 1024, 2048, 4096, 8192, 16384, tokens=16384, width=2048, head_dims=(64, 128, 256))
# grouped queries; the last has the shape of Llama 3 8B
GPU += [
    Problem({"B": 4, "T": 1024, "H": 12, "G": 4, "D": 64}, only=("sdpa", "fastlm")),
    Problem({"B": 2, "T": 8192, "H": 32, "G": 8, "D": 128}, only=("sdpa", "fastlm")),
]
# the models of the demo and of a small CPU run, and one sequence of GPT-2
CPU = [
    Problem({"B": b, "T": t, "H": h, "G": h, "D": d})
    for b, t, h, d in ((12, 64, 4, 32), (4, 256, 6, 64), (1, 1024, 12, 64))
]


@benchmark("attention", cuda=GPU, cpu=CPU, quick=CPU[:1])
def attention(problem: Problem, dtype: torch.dtype, device: str) -> Case:
    b, t, h, g, d = (problem.shape[name] for name in "BTHGD")
    sizes = ((b, t, h, d), (b, t, g, d), (b, t, g, d))
    inputs = tuple(torch.randn(s, device=device).to(dtype).requires_grad_() for s in sizes)
    saved: dict[str, Outputs] = {}

    def truth(mode: str) -> Outputs:
        if not saved:
            q, k, v = (x.detach() for x in inputs)
            scale = d**-0.5
            options = (None, None, None, None, None, scale, None, None)
            out, lse = reference.truth_forward(q, k, v, *options)
            dout = cotangent((b, t, h, d), dtype, str(q.device))
            rest = (*options[:5], out, lse, *options[5:], True, True, False)
            *grads, _ = reference.truth_backward(dout, None, q, k, v, *rest)
            saved.update(fwd=(out,), fwd_bwd=(out, *grads))
        return saved[mode]

    # each visible pair of query and key: one row of q k^T and one of p v, 2 d operations each
    forward_flops = 4 * b * h * d * t * (t + 1) / 2
    query, key = (x.numel() * x.element_size() for x in inputs[:2])
    return Case(
        inputs=inputs,
        providers={
            "sdpa": sdpa,
            "torch": eager,
            "torch.compile": compiled(eager),
            "fastlm": fused,
        },
        truth=truth,
        # out is as large as query, the gradients as their tensors, dout as out
        bytes_moved={"fwd": 2 * query + 2 * key, "fwd_bwd": 6 * query + 6 * key},
        # the backward recomputes the scores: five products instead of two
        flops={"fwd": forward_flops, "fwd_bwd": 3.5 * forward_flops},
    )


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out = fastlm.causal_attention(query, key, value)
    assert isinstance(out, Tensor)
    return out


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    grouped = query.shape[2] != key.shape[2]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(
        1, 2
    )


def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What one writes without a fused kernel: scores, mask, softmax, in the working dtype."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    length = query.shape[1]
    hidden = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    scores = (q @ k.transpose(-2, -1) * query.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)
