"""The losses against what else there is: of logits that are there, and of a linear layer's.

Inputs are random, or ``peaked`` as a trained model's: what skips small gradients is flattered by
random logits, where all of them are small.  ``products`` is no loss but the matrix products that
every exact one needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlm
from fastlm.benchmarks._harness import Case, Problem, benchmark, quick
from fastlm.benchmarks._judge import Outputs
from fastlm.benchmarks._providers import Provider, compiled, cuda_kernels, installed
from fastlm.ops.cross_entropy import BACKENDS as LOGITS_BACKENDS
from fastlm.ops.linear_cross_entropy import BACKENDS as LAYER_BACKENDS

_ROWS_AT_ONCE = 512
LIGER = "liger_kernel.transformers"


def _logits(*sizes: tuple[int, int], inputs: str = "random") -> list[Problem]:
    return [Problem({"N": n, "V": v}, inputs=inputs) for n, v in sizes]


def _layers(*sizes: tuple[int, int, int], inputs: str = "random") -> list[Problem]:
    return [Problem({"N": n, "C": c, "V": v}, inputs=inputs) for n, c, v in sizes]


# the vocabularies of GPT-2, Llama 2, Llama 3 and Qwen 2.5
GPU_LOGITS = _logits((4096, 50_257), (8192, 32_000), (8192, 128_256), (16_384, 151_936))
GPU_LOGITS += _logits((8192, 128_256), inputs="peaked")
# with the widths of GPT-2, a 1B and an 8B model
GPU_LAYERS = _layers(
    (4096, 768, 50_257), (8192, 2048, 32_000), (8192, 2048, 128_256), (8192, 4096, 128_256),
    (16_384, 4096, 151_936),
)  # fmt: skip
GPU_LAYERS += _layers(
    (4096, 768, 50_257), (8192, 2048, 128_256), (16_384, 4096, 151_936), inputs="peaked"
)
# characters, a small tokenizer, GPT-2's padded
CPU_LOGITS = _logits((768, 65), (1024, 8192), (1024, 50_304))
CPU_LAYERS = _layers((768, 128, 65), (1024, 768, 8192), (1024, 768, 50_304))
CPU_LAYERS += _layers((1024, 768, 8192), inputs="peaked")
# its logits and their gradient take 2 GB each; torch.chunked takes minutes a call
CPU_LAYERS += [
    Problem(
        {"N": 4096, "C": 768, "V": 128_256},
        only=("torch", "fastlm"),
        inputs="random",
        modes=("fwd_bwd",),
    )
]
_FAST = ("torch", "torch.chunked", "liger", "quack", "fastlm", "cuda", "products")
QUICK_LOGITS = quick(_logits((128, 8192), (128, 1024), (128, 32_768)), _FAST)
QUICK_LAYERS = quick(
    _layers((128, 128, 8192), (128, 128, 1024), (128, 128, 32_768))
    + _layers((128, 128, 8192), inputs="peaked"),
    _FAST,
)
# Name to a function of the device; the yardstick first.
Providers = dict[str, Callable[[str], Provider]]
LOGITS_PROVIDERS: Providers = {
    "torch": lambda device: torch_loss,
    "torch.compile": lambda device: compiled(torch_loss),
    "liger": lambda device: installed(f"{LIGER}.functional", "liger_cross_entropy"),
    "quack": lambda device: installed("quack.cross_entropy", "cross_entropy"),
    "fastlm": lambda device: fastlm.cross_entropy,
    "cuda": lambda device: cuda_kernels(fastlm.cross_entropy, LOGITS_BACKENDS, device),
}
LAYER_PROVIDERS: Providers = {
    "torch": lambda device: torch_layer_loss,
    "torch.compile": lambda device: compiled(torch_layer_loss),
    "torch.chunked": lambda device: torch_chunked(),
    "liger": lambda device: installed(f"{LIGER}.functional", "liger_fused_linear_cross_entropy"),
    "cce": lambda device: cut_cross_entropy(device),
    "quack": lambda device: installed("quack.linear_cross_entropy", "chunked_linear_cross_entropy"),
    "fastlm": lambda device: fastlm.linear_cross_entropy,
    "cuda": lambda device: cuda_kernels(fastlm.linear_cross_entropy, LAYER_BACKENDS, device),
}


@benchmark("cross_entropy", LOGITS_PROVIDERS, cuda=GPU_LOGITS, cpu=CPU_LOGITS, quick=QUICK_LOGITS)
def cross_entropy(problem: Problem, dtype: torch.dtype, device: str) -> Case:
    rows, vocab_size = problem.shape["N"], problem.shape["V"]
    logits = torch.randn(rows, vocab_size, device=device).mul_(4)
    target = torch.randint(vocab_size, (rows,), device=device)
    if problem.inputs == "peaked":
        logits += log_frequencies(vocab_size, device)
        target = drawn(logits)
    logits = logits.to(dtype).requires_grad_()

    def truth(mode: str) -> Outputs:
        loss, grad = exact(logits.detach(), target)
        return (loss,) if mode == "fwd" else (loss, grad)

    size = logits.numel() * logits.element_size()
    return Case(
        inputs=(logits, target),
        providers={name: functools.partial(of, device) for name, of in LOGITS_PROVIDERS.items()},
        truth=truth,
        bytes_moved={"fwd": size, "fwd_bwd": 3 * size},
        flops={"fwd": 4.0 * logits.numel(), "fwd_bwd": 8.0 * logits.numel()},
        overwriting=("liger",),
    )


@benchmark(
    "linear_cross_entropy", (*LAYER_PROVIDERS, "products"),
    cuda=GPU_LAYERS, cpu=CPU_LAYERS, quick=QUICK_LAYERS,
)  # fmt: skip
def linear_cross_entropy(problem: Problem, dtype: torch.dtype, device: str) -> Case:
    rows, width, vocab_size = (problem.shape[name] for name in "NCV")
    hidden, weight, target = layer(rows, width, vocab_size, problem.inputs, dtype, device)
    saved: dict[str, Outputs] = {}

    def truth(mode: str) -> Outputs:
        if not saved:
            loss, *grads = exact_layer(hidden.detach(), weight.detach(), target)
            saved.update(fwd=(loss,), fwd_bwd=(loss, *grads))
        return saved[mode]

    product = 2.0 * rows * width * vocab_size
    inputs = (hidden.numel() + weight.numel()) * hidden.element_size()
    return Case(
        inputs=(hidden, weight, target),
        providers={name: functools.partial(of, device) for name, of in LAYER_PROVIDERS.items()},
        truth=truth,
        bytes_moved={"fwd": inputs, "fwd_bwd": 3 * inputs},
        # logits, gradient of hidden, gradient of weight
        flops={"fwd": product, "fwd_bwd": 3 * product},
        yardsticks={"products": Products(hidden.detach(), weight.detach())},
    )


def layer(
    rows: int, width: int, vocab_size: int, inputs: str, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and targets.

    Random: logits of a spread of 2, and any target.  Peaked: classes are as frequent as words, the
    rest has a spread of 4, and targets are drawn from what comes out, whose entropy is 3 to 5 nats.
    """
    hidden = torch.randn(rows, width, device=device)
    spread = 4 if inputs == "peaked" else 2
    weight = torch.randn(vocab_size, width, device=device).mul_(spread * width**-0.5)
    target = torch.randint(vocab_size, (rows,), device=device)
    if inputs == "peaked":
        # one direction that all hidden states share; 4 keeps both factors near 1
        hidden[:, 0] = 4.0
        weight[:, 0] = log_frequencies(vocab_size, device) / 4.0
        parts = hidden.split(_ROWS_AT_ONCE)
        target = torch.cat([drawn(part @ weight.t()) for part in parts])
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target


def log_frequencies(vocab_size: int, device: str) -> Tensor:
    """Of classes as frequent as words, 1 / rank (Zipf's law), in random order."""
    ranks = torch.randperm(vocab_size, device=device)
    return -(ranks + 10.0).log()


def drawn(logits: Tensor) -> Tensor:
    """A class per row with the probabilities of the softmax: the maximum after Gumbel noise."""
    classes = []
    for part in logits.split(_ROWS_AT_ONCE):
        noise = torch.empty_like(part).exponential_().log_()
        classes.append((part - noise).argmax(-1))
    return torch.cat(classes)


class Products:
    """The matrix products of the layer and its gradients, with one buffer for all the logits."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self._hidden, self._weight = hidden, weight
        self._buffers: tuple[Tensor, ...] = ()

    def __call__(self, mode: str) -> None:
        hidden, weight = self._hidden, self._weight
        if not self._buffers:
            logits = hidden.new_empty(len(hidden), len(weight))
            self._buffers = (logits, torch.empty_like(hidden), torch.empty_like(weight))
        logits, dhidden, dweight = self._buffers
        torch.mm(hidden, weight.t(), out=logits)
        if mode == "fwd_bwd":
            torch.mm(logits, weight, out=dhidden)
            torch.mm(logits.t(), hidden, out=dweight)


def torch_loss(logits: Tensor, target: Tensor) -> Tensor:
    """In float32, as training code does it."""
    return F.cross_entropy(logits.float(), target)


def torch_layer_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """In float32 after a product in the working dtype, as training code does it."""
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def torch_chunked() -> Provider:
    """Torch's own that does not hold the logits; without its options it does."""
    if not hasattr(F, "linear_cross_entropy"):
        return "torch has F.linear_cross_entropy from 2.13 on"
    options = nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, target: F.linear_cross_entropy(
        hidden, weight, target, options=options
    )


def cut_cross_entropy(device: str) -> Provider:
    """Its kernels on a GPU; on a CPU what it offers there, its definition by torch.compile."""
    function = installed("cut_cross_entropy", "linear_cross_entropy")
    if device == "cuda" or isinstance(function, str):
        return function
    return functools.partial(function, impl="torch_compile")


def exact(logits: Tensor, target: Tensor) -> Outputs:
    """Loss and gradient in float64."""
    dlogits = torch.empty_like(logits, dtype=torch.float64)
    losses = []
    for rows in torch.arange(len(logits), device=logits.device).split(_ROWS_AT_ONCE):
        loss, dlogits[rows] = _exact_rows(logits[rows].double(), target[rows])
        losses.append(loss)
    return torch.cat(losses).mean(), dlogits.div_(len(logits))


def exact_layer(hidden: Tensor, weight: Tensor, target: Tensor) -> Outputs:
    """Loss and both gradients in float64."""
    wide = weight.double()
    dhidden, dweight = torch.empty_like(hidden, dtype=torch.float64), torch.zeros_like(wide)
    losses = []
    for rows in torch.arange(len(hidden), device=hidden.device).split(_ROWS_AT_ONCE):
        x = hidden[rows].double()
        loss, dlogits = _exact_rows(x @ wide.T, target[rows])
        losses.append(loss)
        dhidden[rows] = dlogits @ wide
        dweight.addmm_(dlogits.T, x)
    return torch.cat(losses).mean(), dhidden.div_(len(hidden)), dweight.div_(len(hidden))


def _exact_rows(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    losses = F.cross_entropy(logits, target, reduction="none")
    dlogits = logits.softmax(-1)
    dlogits[torch.arange(len(target), device=target.device), target] -= 1
    return losses, dlogits
