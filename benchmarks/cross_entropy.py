"""Cross-entropy at the vocabularies of Llama 2, GPT-2 and Llama 3, against torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm
from fastlm.ops.reference import cross_entropy as reference

from ._harness import Case, Outputs, Problem, benchmark, compiled

GPU = [Problem({"N": 8192, "V": vocab_size}) for vocab_size in (32_000, 50_257, 128_256)]
CPU = [Problem({"N": 256, "V": vocab_size}) for vocab_size in (8_192, 50_257)]


@benchmark("cross_entropy", cuda=GPU, cpu=CPU, quick=CPU[:1])
def cross_entropy(shape: dict[str, int], dtype: torch.dtype, device: str) -> Case:
    rows, vocab_size = shape["N"], shape["V"]
    logits = torch.randn(rows, vocab_size, device=device).mul_(4).to(dtype).requires_grad_()
    target = torch.randint(vocab_size, (rows,), device=device)

    def truth(mode: str) -> Outputs:
        losses, lse = reference.truth_forward(logits.detach(), target, -100)
        if mode == "fwd":
            return (losses.mean(),)
        each = torch.full_like(losses, 1 / rows)
        grad = reference.truth_backward(each, logits.detach(), target, lse, -100)
        return losses.mean(), grad

    size = logits.numel() * logits.element_size()
    return Case(
        inputs=(logits, target),
        providers={
            "torch": torch_loss,
            "torch.compile": compiled(torch_loss),
            "fastlm": fastlm.cross_entropy,
        },
        truth=truth,
        bytes_moved={"fwd": size, "fwd_bwd": 3 * size},
        flops={"fwd": 4.0 * logits.numel(), "fwd_bwd": 8.0 * logits.numel()},
    )


def torch_loss(logits: Tensor, target: Tensor) -> Tensor:
    """In float32, as training code does it."""
    return F.cross_entropy(logits.float(), target)
