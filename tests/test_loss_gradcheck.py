"""Every element of every derivative of the losses, by finite differences through real kernels."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.cross_entropy import force_tiny_blocks
from support.linear_cross_entropy import forced, inputs
from support.losses import OPTIONS, flattened, weights
from torch import Tensor

import fastlm
from fastlm.testing import cross_entropy_inputs

LOSS = {name: OPTIONS[name] for name in ("label_smoothing", "softcap", "logit_scale", "z_loss")}
STATISTICS = ("logprobs", "lse", "entropy")
EVERYTHING = ("loss", *STATISTICS)
# which results are used, and the others get no gradient
SETS = [subset for size in range(1, 5) for subset in itertools.combinations(EVERYTHING, size)]


def together(result: Any, names: tuple[str, ...]) -> Tensor:
    """A sum of some of the results, so that all their gradients come in at once."""
    values = dict(zip(EVERYTHING, flattened(result), strict=True))
    generator = torch.Generator().manual_seed(0)
    parts = []
    for name in names:
        factor = torch.randn(values[name].shape, generator=generator, dtype=torch.float64)
        parts.append((values[name] * factor.to(values[name].device)).sum())
    return torch.stack(parts).sum()


def check_logits(names: tuple[str, ...], reduction: str, backend: str, device: str) -> None:
    logits, _ = cross_entropy_inputs(3, 5, torch.float64, device)
    targets = torch.tensor([4, -100, 1], device=device)
    weight = weights(5, device).double()

    def results(x: Tensor) -> Tensor:
        options = dict(LOSS, return_stats=True, reduction=reduction, backend=backend)
        return together(fastlm.cross_entropy(x, targets, weight, **options), names)

    with pytest.MonkeyPatch.context() as monkeypatch:
        force_tiny_blocks(monkeypatch, block_v=2)
        assert torch.autograd.gradcheck(results, logits.requires_grad_(), nondet_tol=0)


def check_layer(names: tuple[str, ...], reduction: str, backend: str, device: str) -> None:
    *tensors, _ = inputs(4, 2, 5, torch.float64, device)
    # shifted: of four positions the second and third predict something
    targets = torch.tensor([2, -100, 0, 4], device=device)
    weight = weights(5, device).double()

    def results(x: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
        options = dict(LOSS, return_stats=True, reduction=reduction, backend=backend)
        if reduction == "sum":
            options["num_items"] = torch.tensor(3, device=device)
        return together(
            fastlm.linear_cross_entropy(
                x, matrix, targets, linear_bias=bias, weight=weight, shift=1, **options
            ),
            names,
        )

    with forced(rows=2, block_v=2):
        leaves = [t.requires_grad_() for t in tensors]
        assert torch.autograd.gradcheck(results, leaves, nondet_tol=0)


CHECKS = {"logits": check_logits, "layer": check_layer}


@pytest.mark.parametrize("kind", CHECKS)
@pytest.mark.parametrize("names", [("loss",), EVERYTHING], ids="-".join)
def test_gradients_with_all_options(names, kind, device):
    CHECKS[kind](names, "mean", "torch", device)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", CHECKS)
@pytest.mark.parametrize("names", SETS, ids="-".join)
def test_gradients_of_every_set_of_results(names, kind, reduction, device):
    CHECKS[kind](names, reduction, "torch", device)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHECKS)
@pytest.mark.parametrize(
    "names, reduction",
    [(("loss",), "mean"), (("loss",), "sum"), (EVERYTHING, "mean"), (EVERYTHING, "none")],
)
def test_gradients_of_the_kernels_with_all_options(names, reduction, kind, device):
    CHECKS[kind](names, reduction, "triton", device)
