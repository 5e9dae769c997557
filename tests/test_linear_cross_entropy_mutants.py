"""Bugs planted in the op linear_cross_entropy itself, above its backends."""

from __future__ import annotations

import pytest
import torch
from support.interpreter import interpreted_only
from support.linear_cross_entropy import assert_same_bits, definition, inputs, ours
from support.mutants import Mutant, killed

from fastlm import testing

GRADIENTS = "fastlm/ops/_linear_loss.py"
LAYER = "fastlm/ops/_linear.py"
LOSSES = "fastlm/ops/cross_entropy.py"
MUTANTS = [
    Mutant("num_items does not divide the gradients", GRADIENTS,
           "scale = over(dloss, divisor)", "scale = dloss"),
    Mutant("num_items does not divide the loss", GRADIENTS,
           "total = over(summed(losses), divisor)", "total = losses.sum()"),
    Mutant("targets are shifted the other way", LAYER,
           "F.pad(target[..., shift:], (0, shift), value=ignore_index)",
           "F.pad(target[..., : steps - shift], (shift, 0), value=ignore_index)"),
    Mutant("the last positions predict the first class", LAYER,
           "(0, shift), value=ignore_index)", "(0, shift), value=0)"),
    Mutant("no positions divide their gradients by zero", GRADIENTS,
           "divisor.masked_fill(count == 0, 1)", "divisor"),
    Mutant("gradients of a kept graph are scaled twice", GRADIENTS,
           "x * scale if kept else x.mul_(scale)", "x.mul_(scale)"),
    Mutant("the incoming gradient is forgotten per position", GRADIENTS,
           "if dlosses is None else dlosses\n", "if True else dlosses\n"),
    Mutant("ignored positions are counted", LOSSES,
           "(self._target != self._ignore_index).sum()", "(self._target == self._target).sum()"),
]  # fmt: skip


def _check() -> None:
    x, weight, bias, targets = inputs(10, 6, 20, torch.float64)
    x, targets = x.view(2, 5, 6), targets.view(2, 5)
    for options in ({}, {"num_items": 3}, {"num_items": torch.tensor(3)}, {"reduction": "none"}):
        got = testing.run(ours, x, weight, bias, targets, shift=1, backend="torch", **options)
        reduction = "sum" if "num_items" in options else options.get("reduction", "mean")
        divisor = 3 if "num_items" in options else 1

        def sliced(x, weight, bias, reduction=reduction, divisor=divisor):
            loss = definition(x[:, :-1], weight, bias, targets[:, 1:], reduction=reduction)
            return loss / divisor

        torch.testing.assert_close(got, testing.run(sliced, x, weight, bias))
    nothing = testing.run(ours, x, weight, bias, targets.fill_(-100), backend="torch")
    assert not any(gradient.any() for gradient in nothing[1:])
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    loss = ours(*leaves, targets.fill_(1), backend="torch")
    once = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    kept = [gradient.clone() for gradient in once]
    assert_same_bits(list(torch.autograd.grad(3 * loss, leaves, retain_graph=True)), kept)


@interpreted_only
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_planted_bug_is_noticed(mutant):
    assert killed(mutant, _check)


@interpreted_only
def test_a_changed_comment_is_not():
    comment = Mutant(
        "a comment", GRADIENTS, "The gradient of a mean over nothing is zero;", "The divisor."
    )
    assert not killed(comment, _check)
