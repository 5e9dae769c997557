"""Optimizers: directions, schedules, skipped steps, and state that can be put back."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlm.training.config import TrainConfig
from fastlm.training.optimizer import MOMENTUM, Muon, Optimizer, learning_rate_share, orthogonalize

GOOD, BAD = torch.tensor(True), torch.tensor(False)


class Tiny(nn.Module):
    """Parameters with a causal language model's names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(6, 6)])
        self.norm = nn.RMSNorm(6)

    def set_gradients(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw)


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 20, "warmup": 0, **changes}).resolved()


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


# ---- orthogonalisation


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (8, 24), (64, 64), (1, 9)])
def test_singular_values_come_close_to_one(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape) * 7
    before = torch.linalg.svdvals(matrices.double())
    after = torch.linalg.svdvals(orthogonalize(matrices).double())
    in_reach = before > 0.011 * torch.linalg.matrix_norm(matrices.double())[:, None]
    assert in_reach.any()
    assert (after[in_reach] > 0.73).all()
    assert (after < 1.28).all()


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_scale_of_the_gradient_does_not_matter(scale: float) -> None:
    matrices = torch.randn(2, 8, 12)
    torch.testing.assert_close(orthogonalize(matrices * scale), orthogonalize(matrices))


def test_singular_vectors_stay() -> None:
    matrix = torch.randn(1, 16, 16)
    u, _, v = torch.linalg.svd(matrix[0].double())
    rotated = u.T @ orthogonalize(matrix)[0].double() @ v.T
    assert (rotated - rotated.diag().diag()).abs().max() < 1e-4


def test_zero_gradient_gives_zero_and_not_nan() -> None:
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 8)), torch.zeros(2, 4, 8))


# ---- Muon


def test_muon_follows_its_definition_over_steps() -> None:
    weight, tall = torch.randn(4, 6), torch.randn(8, 4)
    parameters = {"wide": weight.clone(), "tall": tall.clone()}
    muon = Muon(parameters, lr=0.1, weight_decay=0.5)
    expected, momentum = {"wide": weight, "tall": tall}, dict.fromkeys(parameters, torch.zeros(()))
    for step in range(3):
        for name, parameter in parameters.items():
            gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
            parameter.grad = gradient
            momentum[name] = MOMENTUM * momentum[name] + (1 - MOMENTUM) * gradient
            nesterov = MOMENTUM * momentum[name] + (1 - MOMENTUM) * gradient
            rows, columns = gradient.shape
            wide = nesterov if rows <= columns else nesterov.T
            update = orthogonalize(wide[None])[0]
            update = update if rows <= columns else update.T
            rate = 0.1 * 0.5
            decayed = expected[name] * (1 - rate * 0.5)
            expected[name] = decayed - rate * math.sqrt(max(1, rows / columns)) * update
        muon.step(0.5, GOOD)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-6)


def test_matrices_of_one_shape_do_not_mix() -> None:
    draw = torch.Generator().manual_seed(1)
    gradients = [torch.randn(4, 6, generator=draw) for _ in range(3)]

    def updated(chosen: list[int]) -> dict[int, Tensor]:
        parameters = {str(i): torch.zeros(4, 6) for i in chosen}
        for i in chosen:
            parameters[str(i)].grad = gradients[i]
        Muon(parameters, 0.1, 0.0).step(1.0, GOOD)
        return {i: parameters[str(i)] for i in chosen}

    together = updated([0, 1, 2])
    for i in range(3):
        torch.testing.assert_close(together[i], updated([i])[i])


def test_tall_and_wide_matrices_share_a_stack() -> None:
    muon = Muon({"wide": torch.zeros(4, 6), "tall": torch.zeros(6, 4)}, 0.1, 0.0)
    assert [stack.names for stack in muon.stacks] == [["wide", "tall"]]


# ---- the two together


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_parameter_is_updated_once(name: str) -> None:
    model = Tiny()
    optimizer = Optimizer(model, settings(optimizer=name))
    before = values(model)
    model.set_gradients(0)
    optimizer.step(1.0, GOOD)
    after = values(model)
    assert all(not torch.equal(before[n], after[n]) for n in before)
    blocks = {n for n in before if n.startswith("layers") and n.endswith("weight")}
    taken = {n for stack in optimizer.muon.stacks for n in stack.names} if optimizer.muon else set()
    assert taken == (blocks if name == "muon" else set())
    assert taken.isdisjoint(optimizer.names)
    assert taken | set(optimizer.names) == set(before)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_weight_decay_shrinks_matrices_of_blocks_only(name: str) -> None:
    model = Tiny()
    optimizer = Optimizer(model, settings(optimizer=name, weight_decay=1.0, lr=0.1))
    before = values(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(1.0, GOOD)
    for n, value in values(model).items():
        shrinks = n.startswith("layers") and n.endswith("weight")
        torch.testing.assert_close(value, before[n] * (0.9 if shrinks else 1.0))


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_unhealthy_step_changes_nothing_now_or_later(name: str) -> None:
    models = [Tiny(), Tiny()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [Optimizer(model, settings(optimizer=name)) for model in models]
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            model.set_gradients(step)
            optimizer.step(1.0, GOOD)
        models[0].set_gradients(99)
        for parameter in models[0].parameters():
            parameter.grad[0] = math.nan
        optimizers[0].step(1.0, BAD)
    for one, other in zip(*(values(model).values() for model in models), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_state_put_back_continues_bit_for_bit(name: str) -> None:
    model, copy = Tiny(), Tiny()
    config = settings(optimizer=name, weight_decay=0.1)
    optimizer = Optimizer(model, config)
    for step in range(6):
        if step == 3:
            copy.load_state_dict(model.state_dict())
            continued = Optimizer(copy, config)
            continued.load_state({n: t.clone() for n, t in optimizer.state().items()})
        model.set_gradients(step)
        optimizer.step(0.7, GOOD)
        if step >= 3:
            copy.set_gradients(step)
            continued.step(0.7, GOOD)
    for one, other in zip(values(model).values(), values(copy).values(), strict=True):
        assert torch.equal(one, other)


def test_state_of_another_model_is_refused() -> None:
    optimizer = Optimizer(Tiny(), settings())
    with pytest.raises(KeyError):
        optimizer.load_state({})


# ---- the schedule


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_rate_rises_to_its_peak_and_falls_to_zero(schedule: str) -> None:
    config = settings(steps=100, warmup=10, decay=0.5, schedule=schedule)
    shares = [learning_rate_share(step, config) for step in range(100)]
    assert shares[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert shares[10:50] == [1.0] * 40
    assert all(a > b for a, b in itertools.pairwise(shares[50:]))
    assert 0 < shares[-1] < 0.05
    assert learning_rate_share(100, config) == 0
    middle = learning_rate_share(75, config)
    assert middle == pytest.approx(0.5)
    quarter = 0.75 if schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi / 4)
    assert learning_rate_share(62, settings(steps=100, warmup=0, decay=0.5, schedule=schedule)) == (
        pytest.approx(quarter, abs=0.02)
    )


def test_no_decay_stays_at_the_peak() -> None:
    config = settings(steps=10, decay=0.0)
    assert [learning_rate_share(step, config) for step in range(10)] == [1.0] * 10
