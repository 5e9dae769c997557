"""Drawing tokens: filters, their order, frequencies, seeds."""

from __future__ import annotations

import pytest
import torch

from fastlm.model.sampling import Sampling, new_generator

PROBABILITIES = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
LOGITS = PROBABILITIES.log()


def kept(**rules):
    return Sampling(**rules).filtered(LOGITS).softmax(-1)


@pytest.mark.parametrize(
    ("rules", "want"),
    [
        ({"temperature": 1.0}, [0.05, 0.4, 0.15, 0.3, 0.1]),
        ({"top_k": 2}, [0, 0.4 / 0.7, 0, 0.3 / 0.7, 0]),
        ({"top_k": 0}, [0.05, 0.4, 0.15, 0.3, 0.1]),
        ({"top_k": 99}, [0.05, 0.4, 0.15, 0.3, 0.1]),
        # the token that crosses the threshold is kept
        ({"top_p": 0.65}, [0, 0.4 / 0.7, 0, 0.3 / 0.7, 0]),
        ({"top_p": 0.75}, [0, 0.4 / 0.85, 0.15 / 0.85, 0.3 / 0.85, 0]),
        ({"top_p": 0.01}, [0, 1, 0, 0, 0]),
        ({"top_p": 1.0}, [0.05, 0.4, 0.15, 0.3, 0.1]),
        ({"min_p": 0.3}, [0, 0.4 / 0.85, 0.15 / 0.85, 0.3 / 0.85, 0]),
        ({"min_p": 1.0}, [0, 1, 0, 0, 0]),
        # top_p sees what top_k left: 0.4 / 0.7 is below 0.6, so the second is needed
        ({"top_k": 2, "top_p": 0.6}, [0, 0.4 / 0.7, 0, 0.3 / 0.7, 0]),
        ({"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0, 0]),
    ],
)
def test_filters(rules, want):
    torch.testing.assert_close(kept(**rules), torch.tensor(want, dtype=torch.float32))


def test_temperature_comes_first():
    squared = PROBABILITIES.square() / PROBABILITIES.square().sum()
    torch.testing.assert_close(kept(temperature=0.5), squared)
    # squared, the two most likely hold 0.86; as they are, 0.7
    torch.testing.assert_close((kept(temperature=0.5, top_p=0.8) > 0).sum(), torch.tensor(2))
    assert (kept(temperature=1.0, top_p=0.8) > 0).sum() == 3


def test_equal_logits_keep_exactly_k():
    assert (Sampling(top_k=3).filtered(torch.zeros(10)).isfinite()).sum() == 3


# the last two are 0 in float32, and the smallest number there is in float64
@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-46, 1e-320, 5e-324])
def test_a_tiny_temperature_is_greedy_and_finite(temperature):
    logits = torch.tensor([1e4, 3e4, -1e4, -torch.inf])
    x = Sampling(temperature=temperature).filtered(logits)
    assert x.softmax(-1).tolist() == [0, 1, 0, 0]
    close = torch.tensor([1.0, 1.0 + 2**-23, 1.0 + 2**-23])
    shared = Sampling(temperature=temperature).filtered(close).softmax(-1)
    assert shared.tolist() == [0, 0.5, 0.5]
    assert Sampling(temperature=temperature).draw(logits, None) == 1


@pytest.mark.parametrize("temperature", [1e30, 1e39, 1.7e308])
def test_a_huge_temperature_draws_all_tokens_alike(temperature):
    logits = torch.tensor([1e4, 3e4, -1e4, 0.0, -torch.inf])
    x = Sampling(temperature=temperature).filtered(logits)
    assert x.softmax(-1).tolist() == [0.25, 0.25, 0.25, 0.25, 0]


def test_draws_have_the_frequencies_of_the_distribution(device):
    logits = LOGITS.to(device).expand(20_000, 5)
    ids = Sampling(temperature=1.0).draw(logits, new_generator(0, logits.device))
    counts = torch.bincount(ids.cpu(), minlength=5) / 20_000
    # five standard deviations
    assert ((counts - PROBABILITIES).abs() < 5 * (0.25 / 20_000) ** 0.5).all()
    allowed = Sampling(top_k=2).draw(logits, new_generator(0, logits.device))
    assert set(allowed.tolist()) == {1, 3}


def test_seeds_repeat_and_leave_the_global_generator_alone(device):
    logits = torch.randn(100, 50, device=device)
    state = torch.get_rng_state()
    sampling = Sampling(temperature=1.0)
    draws = [sampling.draw(logits, new_generator(seed, logits.device)) for seed in (1, 1, 2)]
    unseeded = [sampling.draw(logits, new_generator(None, logits.device)) for _ in range(2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not torch.equal(*unseeded)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 0.5])
def test_a_seed_that_is_no_seed_is_named(seed):
    with pytest.raises(ValueError, match=f"seed must be a whole number of 64 bits, got {seed}"):
        new_generator(seed, torch.device("cpu"))


@pytest.mark.parametrize("rules", [{}, {"temperature": 0}, {"temperature": 0.0, "top_k": 3}])
def test_greedy_takes_the_most_likely(rules):
    assert Sampling(**rules).is_greedy
    assert Sampling(**rules).draw(LOGITS, None).item() == 1


@pytest.mark.parametrize(
    "rules", [{"temperature": 0.1}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}]
)
def test_any_rule_alone_means_sampling(rules):
    assert not Sampling(**rules).is_greedy


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("rules", [{}, {"temperature": 1.0}])
def test_logits_that_are_not_finite_raise(rules, bad):
    logits = torch.tensor([[0.0, 1.0], [0.0, bad]])
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        Sampling(**rules).draw(logits, new_generator(0, logits.device))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"temperature": float("nan")}, "temperature must be a number of at least 0, got nan"),
        ({"temperature": -0.1}, "temperature must be a number of at least 0, got -0.1"),
        ({"temperature": float("inf")}, "temperature must be a number of at least 0, got inf"),
        ({"top_k": -1}, "top_k must be a whole number of at least 0, got -1"),
        ({"top_k": 2.5}, "top_k must be a whole number of at least 0, got 2.5"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ({"top_p": float("nan")}, "top_p must be above 0 and at most 1, got nan"),
        ({"min_p": -0.1}, "min_p must be from 0 to 1, got -0.1"),
        ({"min_p": 1.5}, "min_p must be from 0 to 1, got 1.5"),
        ({"min_p": float("nan")}, "min_p must be from 0 to 1, got nan"),
    ],
)
def test_values_out_of_range_are_named(rules, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**rules)
