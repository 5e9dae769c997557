"""Cross-entropy at the vocabularies of Llama 2, GPT-2 and Llama 3, against torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm

from ._harness import Case, Outputs, Problem, benchmark, compiled

GPU = [Problem({"N": 8192, "V": vocab_size}) for vocab_size in (32_000, 50_257, 128_256)]
# characters, a small tokenizer, GPT-2's padded
CPU = [Problem({"N": n, "V": v}) for n, v in ((768, 65), (1_024, 8_192), (1_024, 50_304))]


@benchmark("cross_entropy", cuda=GPU, cpu=CPU, quick=CPU[:1])
def cross_entropy(shape: dict[str, int], dtype: torch.dtype, device: str) -> Case:
    rows, vocab_size = shape["N"], shape["V"]
    logits = torch.randn(rows, vocab_size, device=device).mul_(4).to(dtype).requires_grad_()
    target = torch.randint(vocab_size, (rows,), device=device)

    def truth(mode: str) -> Outputs:
        loss, grad = exact(logits.detach(), target)
        return (loss,) if mode == "fwd" else (loss, grad)

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


def exact(logits: Tensor, target: Tensor) -> Outputs:
    """Loss and gradient in float64, 512 rows at a time."""
    dlogits = torch.empty_like(logits, dtype=torch.float64)
    losses = []
    for rows in torch.arange(logits.shape[0], device=logits.device).split(512):
        x, y = logits[rows].double(), target[rows]
        losses.append(F.cross_entropy(x, y, reduction="none"))
        dlogits[rows] = (x.softmax(-1) - F.one_hot(y, x.shape[-1])) / logits.shape[0]
    return torch.cat(losses).mean(), dlogits
