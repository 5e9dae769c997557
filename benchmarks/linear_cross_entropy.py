"""The last layer and its loss together, at the sizes of GPT-2, a 1B and an 8B model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm

from ._harness import Case, Outputs, Problem, benchmark, compiled

GPU = [
    Problem({"N": 4096, "C": 768, "V": 50_257}),
    Problem({"N": 8192, "C": 2048, "V": 32_000}),
    Problem({"N": 8192, "C": 2048, "V": 128_256}),
    Problem({"N": 8192, "C": 4096, "V": 128_256}),
]
# characters, a small tokenizer, GPT-2's padded
CPU = [
    Problem({"N": 768, "C": 128, "V": 65}),
    Problem({"N": 1_024, "C": 768, "V": 8_192}),
    Problem({"N": 1_024, "C": 768, "V": 50_304}),
]


@benchmark("linear_cross_entropy", cuda=GPU, cpu=CPU, quick=CPU[:1])
def linear_cross_entropy(shape: dict[str, int], dtype: torch.dtype, device: str) -> Case:
    rows, width, vocab_size = (shape[name] for name in "NCV")
    hidden = torch.randn(rows, width, device=device).to(dtype).requires_grad_()
    # logits of a spread of 2, between those of an untrained and of a trained model
    weight = torch.randn(vocab_size, width, device=device).mul_(2 * width**-0.5)
    weight = weight.to(dtype).requires_grad_()
    target = torch.randint(vocab_size, (rows,), device=device)
    saved: dict[str, Outputs] = {}

    def truth(mode: str) -> Outputs:
        if not saved:
            loss, *grads = exact(hidden.detach(), weight.detach(), target)
            saved.update(fwd=(loss,), fwd_bwd=(loss, *grads))
        return saved[mode]

    product = 2.0 * rows * width * vocab_size
    inputs = (hidden.numel() + weight.numel()) * hidden.element_size()
    return Case(
        inputs=(hidden, weight, target),
        providers={
            "torch": torch_loss,
            "torch.compile": compiled(torch_loss),
            **({"torch.fused": F.linear_cross_entropy} if FUSED else {}),
            "fastlm": fastlm.linear_cross_entropy,
        },
        truth=truth,
        bytes_moved={"fwd": inputs, "fwd_bwd": 3 * inputs},
        # logits, gradient of hidden, gradient of weight
        flops={"fwd": product, "fwd_bwd": 3 * product},
    )


# in torch from 2.13 on
FUSED = hasattr(F, "linear_cross_entropy")


def torch_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """In float32 after a product in the working dtype, as training code does it."""
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def exact(hidden: Tensor, weight: Tensor, target: Tensor) -> Outputs:
    """Loss and both gradients in float64, 512 rows at a time."""
    wide = weight.double()
    dhidden, dweight = torch.empty_like(hidden, dtype=torch.float64), torch.zeros_like(wide)
    losses = []
    for rows in torch.arange(hidden.shape[0], device=hidden.device).split(512):
        x, y = hidden[rows].double(), target[rows]
        logits = x @ wide.T
        losses.append(F.cross_entropy(logits, y, reduction="none"))
        dlogits = logits.softmax(-1)
        dlogits[torch.arange(len(y), device=y.device), y] -= 1
        dlogits /= hidden.shape[0]
        dhidden[rows] = dlogits @ wide
        dweight += dlogits.T @ x
    return torch.cat(losses).mean(), dhidden, dweight
