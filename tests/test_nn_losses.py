"""The loss modules against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn as torch_nn

import fastlm
from fastlm import nn, testing


@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 7, 4), (2, 7, 3, 2)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_classes_are_in_dimension_one_as_in_torch(backend, reduction, shape, device):
    logits = torch.randn(shape, device=device)
    target = torch.randint(7, shape[:1] * (len(shape) > 1) + shape[2:], device=device)
    if target.dim():
        target[0] = 3
    options = {"ignore_index": 3 if target.dim() else -100, "reduction": reduction}
    theirs = torch_nn.CrossEntropyLoss(**options)
    actual = testing.run(nn.CrossEntropyLoss(**options, backend=backend), logits, target)
    plain = testing.run(theirs, logits, target)
    truth = testing.run(theirs, logits, target, dtype=torch.float64)
    testing.assert_all_as_accurate("loss", actual, plain=plain, truth=truth)


def test_are_instances_of_torchs_where_torch_has_them():
    assert isinstance(nn.CrossEntropyLoss(), torch_nn.CrossEntropyLoss)
    theirs = getattr(torch_nn, "LinearCrossEntropyLoss", torch_nn.Module)
    assert isinstance(nn.LinearCrossEntropyLoss(4, 5), theirs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_loss_is_the_two_modules_in_a_row(reduction, bias, device):
    loss = nn.LinearCrossEntropyLoss(
        6, 9, bias=bias, reduction=reduction, ignore_index=2, device=device, dtype=torch.float64
    )
    assert dict(loss.named_parameters()).keys() == (
        {"linear.weight", "linear.bias"} if bias else {"linear.weight"}
    )
    x = torch.randn(5, 6, device=device, dtype=torch.float64)
    target = torch.tensor([0, 2, 8, 1, 1], device=device)

    def in_a_row(x, target):
        classes = torch_nn.CrossEntropyLoss(reduction=reduction, ignore_index=2)
        return classes(loss.linear(x), target)

    torch.testing.assert_close(testing.run(loss, x, target), testing.run(in_a_row, x, target))
    loss(x, target).sum().backward()
    assert all(p.grad is not None for p in loss.parameters())


@pytest.mark.skipif(
    not hasattr(torch_nn, "LinearCrossEntropyLoss"), reason="torch has no LinearCrossEntropyLoss"
)
def test_linear_loss_loads_the_state_of_torchs(device):
    theirs = torch_nn.LinearCrossEntropyLoss(6, 9, bias=True, device=device)
    loss = nn.LinearCrossEntropyLoss(6, 9, bias=True, device=device)
    loss.load_state_dict(theirs.state_dict())
    x, target = torch.randn(5, 6, device=device), torch.randint(9, (5,), device=device)
    torch.testing.assert_close(loss(x, target), theirs(x, target))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_and_smoothing_are_those_of_torch(reduction, device):
    weight = torch.rand(7, device=device)
    options = {"weight": weight, "label_smoothing": 0.2, "reduction": reduction}
    logits = torch.randn(5, 7, 3, device=device)
    target = torch.randint(7, (5, 3), device=device)
    target[1, 2] = -100
    ours, theirs = nn.CrossEntropyLoss(**options), torch_nn.CrossEntropyLoss(**options)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(
        testing.run(ours, logits, target), testing.run(theirs, logits, target)
    )
    linear = nn.LinearCrossEntropyLoss(6, 7, **options, device=device)
    x, target = torch.randn(4, 6, device=device), torch.tensor([0, -100, 3, 6], device=device)
    expected = theirs(linear.linear(x), target)
    torch.testing.assert_close(linear(x, target), expected)


def test_probabilities_as_targets_are_left_to_torch(device):
    logits, target = torch.randn(5, 7, device=device), torch.rand(5, 7, device=device).softmax(1)
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    theirs = torch_nn.CrossEntropyLoss(label_smoothing=0.1)
    torch.testing.assert_close(loss(logits, target), theirs(logits, target))
    for name, value in (("softcap", 3.0), ("logit_scale", 2.0), ("z_loss", 0.1)):
        with pytest.raises(NotImplementedError, match=f"with probabilities as targets: {name}"):
            nn.CrossEntropyLoss(**{name: value})(logits, target)
    with pytest.raises(NotImplementedError, match="with probabilities as targets: backend"):
        nn.CrossEntropyLoss(backend="triton")(logits, target)


def test_the_modules_pass_on_what_torch_does_not_have(device):
    options = {"softcap": 3.0, "logit_scale": 0.5, "z_loss": 0.1}
    linear = nn.LinearCrossEntropyLoss(6, 7, **options, device=device)
    x, target = torch.randn(4, 6, device=device), torch.tensor([0, 1, 3, 6], device=device)
    expected = fastlm.cross_entropy(linear.linear(x), target, **options)
    torch.testing.assert_close(linear(x, target), expected)
    torch.testing.assert_close(nn.CrossEntropyLoss(**options)(linear.linear(x), target), expected)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, ""),
        ({"ignore_index": -1, "reduction": "sum"}, "reduction='sum', ignore_index=-1"),
        ({"weight": torch.ones(7), "label_smoothing": 0.1}, "weight=(7,), label_smoothing=0.1"),
        (
            {"softcap": 30.0, "logit_scale": 0.5, "z_loss": 1e-4, "backend": "torch"},
            "softcap=30.0, logit_scale=0.5, z_loss=0.0001, backend='torch'",
        ),
    ],
)
def test_shows_what_it_was_told(options, shown):
    assert repr(nn.CrossEntropyLoss(**options)) == f"CrossEntropyLoss({shown})"
    linear = nn.LinearCrossEntropyLoss(6, 7, **options)
    assert linear.extra_repr() == shown
    assert "(linear): Linear(in_features=6, out_features=7, bias=False)" in repr(linear)


OPTIONS = [
    (nn.CrossEntropyLoss, (), "size_average", True),
    (nn.CrossEntropyLoss, (), "reduce", False),
    (nn.LinearCrossEntropyLoss, (4, 5), "out_features", (2,)),
    (nn.LinearCrossEntropyLoss, (4, 5), "options", object()),
]


@pytest.mark.parametrize(("module", "sizes", "name", "value"), OPTIONS)
def test_refuses_by_name_what_it_does_not_have(module, sizes, name, value):
    with pytest.raises(NotImplementedError, match=f"{module.__name__}: {name} is not supported"):
        module(*sizes, **{name: value})


@pytest.mark.parametrize(
    "make", [nn.CrossEntropyLoss, lambda **o: nn.LinearCrossEntropyLoss(4, 5, **o)]
)
def test_refuses_an_unknown_reduction(make):
    with pytest.raises(ValueError, match="CrossEntropyLoss: reduction must be one of"):
        make(reduction="avg")
