"""Drawing tokens: filters, their order, frequencies, seeds, and what a batch must not change."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.captured import captured
from support.host_sync import no_host_sync
from torch import Tensor

from fastlm.model.sampling import NO_TOKEN, Sampler, Sampling

PROBABILITIES = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
LOGITS = PROBABILITIES.log()
# of chi-square with 0 to 4 degrees of freedom: once in a million is more
CHI_SQUARE = (0.0, 23.93, 27.63, 30.66, 33.38)

ALL_RULES = [
    {},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_k": 40, "top_p": 0.6},
    {"top_p": 0.9, "temperature": 1.5},
    {"min_p": 0.2},
    {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "min_p": 0.01},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.7, "temperature": 1.0},
    {"logit_bias": {3: 2.5, 700: -math.inf, 0: -1.0}, "temperature": 1.0, "top_p": 0.8},
    {"logit_bias": {9: 30.0}},
]


def sampler(rules, seeds, *, logits: Tensor, max_draws: int = 1) -> Sampler:
    """One request per seed, all with these rules, or with one of these each."""
    each = rules if isinstance(rules, list) else [rules] * len(seeds)
    return Sampler(
        [Sampling(**one) for one in each],
        seeds,
        vocab_size=logits.shape[-1],
        max_draws=max_draws,
        device=logits.device,
    )


def draws(rules, seeds, logits: Tensor, count: int = 1, **history) -> Tensor:
    """``(B, count)`` tokens: each request draws from the same logits ``(V,)`` or its own row."""
    made = sampler(rules, seeds, logits=logits, max_draws=count)
    rows = logits.expand(len(seeds), -1)
    steps = torch.zeros(len(seeds), dtype=torch.int64, device=logits.device)
    return torch.stack([made.draw(rows, steps + t, **history) for t in range(count)], dim=1)


def uniforms(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_frequencies(tokens: Tensor, want: Tensor) -> None:
    counts = torch.bincount(tokens.flatten().cpu(), minlength=len(want)).double()
    expected = want.double() * tokens.numel()
    possible = want > 0
    assert counts[~possible].sum() == 0
    off = ((counts - expected).square() / expected)[possible].sum()
    assert off <= CHI_SQUARE[int(possible.sum()) - 1], (counts, expected)


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
        # min_p sees what the others left, and the most likely is always left
        ({"top_k": 4, "min_p": 0.3}, [0, 0.4 / 0.85, 0.15 / 0.85, 0.3 / 0.85, 0]),
        # temperature comes first: squared, the first two hold 0.25 of 0.285, and as they are 0.7
        ({"temperature": 0.5, "top_p": 0.8}, [0, 0.16 / 0.25, 0, 0.09 / 0.25, 0]),
        ({"temperature": 1.0, "logit_bias": {1: -math.inf}}, [0.05 / 0.6, 0, 0.25, 0.5, 0.1 / 0.6]),
        ({"top_k": 2, "logit_bias": {0: math.log(10)}}, [0.5 / 0.9, 0.4 / 0.9, 0, 0, 0]),
    ],
)  # fmt: skip
def test_draws_have_the_frequencies_that_the_rules_define(rules, want, device):
    if Sampling(**rules).is_greedy:
        rules = {**rules, "temperature": 1.0}
    tokens = draws(rules, range(1000), LOGITS.to(device), count=20)
    check_frequencies(tokens, torch.tensor(want))


def test_frequencies_that_are_wrong_are_refused():
    tokens = draws({"temperature": 1.0}, range(1000), LOGITS, count=20)
    for wrong in ([0.06, 0.39, 0.15, 0.3, 0.1], [0, 0.4, 0.2, 0.3, 0.1]):
        with pytest.raises(AssertionError):
            check_frequencies(tokens, torch.tensor(wrong))


def test_a_token_is_the_inverse_of_the_cumulative_distribution(device):
    torch.manual_seed(0)
    logits = torch.randn(64, 1003, device=device)
    seeds = list(range(64))
    tokens = draws({"temperature": 1.0}, seeds, logits, count=3)
    sums = logits.cpu().double().softmax(-1).cumsum(-1)
    for row, seed in enumerate(seeds):
        want = torch.searchsorted(sums[row], uniforms(seed, 3), right=True)
        assert torch.equal(tokens[row].cpu(), want)


def test_agrees_with_the_processors_of_transformers():
    from transformers.generation import logits_process as theirs

    torch.manual_seed(1)
    logits = torch.randn(32, 1003) * 2
    history = torch.randint(1003, (32, 40))
    bias = {3: 2.5, 700: -math.inf, 0: -1.0}
    rules = {
        "logit_bias": bias, "repetition_penalty": 1.7, "temperature": 0.8, "top_k": 50,
        "top_p": 0.9, "min_p": 0.05,
    }  # fmt: skip
    chain = [
        theirs.SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()}),
        theirs.RepetitionPenaltyLogitsProcessor(1.7),
        theirs.TemperatureLogitsWarper(0.8),
        theirs.TopKLogitsWarper(50),
        theirs.TopPLogitsWarper(0.9),
        theirs.MinPLogitsWarper(0.05),
    ]
    # each alone, then all together in their order
    names = list(rules)
    for only in [*([name] for name in names), names]:
        scores = logits
        for name, processor in zip(names, chain, strict=True):
            scores = processor(history, scores) if name in only else scores
        one = {name: rules[name] for name in only}
        greedy = draws({**one, "temperature": 0.0}, range(32), logits, history=history)[:, 0]
        assert torch.equal(greedy, scores.argmax(-1)), only
        tokens = draws({"temperature": 1.0, **one}, range(32), logits, 5, history=history)
        sums = scores.double().softmax(-1).cumsum(-1)
        want = torch.stack([uniforms(seed, 5) for seed in range(32)])
        assert torch.equal(tokens, torch.searchsorted(sums, want, right=True)), only


@pytest.mark.parametrize("rubbish", [-1, 5, 1003, 2**62])
def test_history_beyond_its_length_is_not_looked_at(rubbish, device):
    torch.manual_seed(2)
    logits = torch.randn(4, 1003, device=device)
    logits[:, 5] = 9.0
    history = torch.randint(1003, (4, 30), device=device)
    lengths = torch.tensor([30, 0, 7, 1], device=device)
    rules = {"repetition_penalty": 3.0, "temperature": 1.0}
    want = [
        draws(rules, [row], logits[row : row + 1], 8, history=history[row : row + 1, :length])
        for row, length in enumerate(lengths.tolist())
    ]
    beyond = torch.arange(30, device=device) >= lengths[:, None]
    history = history.masked_fill(beyond, rubbish)
    got = draws(rules, range(4), logits, 8, history=history, lengths=lengths)
    assert torch.equal(got, torch.cat(want))


def test_ids_outside_the_vocabulary_are_passed_over(device):
    logits = torch.tensor([3.0, 2.0, 1.0], device=device)
    history = torch.tensor([[-1, 0, 3, -(2**62), 2**62]], device=device)
    rules = {"repetition_penalty": 2.0}
    assert draws(rules, [0], logits, history=history).item() == 1
    assert draws(rules, [0], logits, history=history[:, 2:]).item() == 0


# with all rules everything is sorted, without top_p as much as the largest top_k, or nothing
@pytest.mark.parametrize("without", [None, "top_p", "top_k"])
def test_tokens_do_not_depend_on_the_batch(without, device):
    torch.manual_seed(3)
    some = [rules for rules in ALL_RULES if without not in rules and "top_p" not in rules]
    some = some if without else ALL_RULES
    size, count, requests = 1003, 6, 3 * len(some)
    rules = [some[row % len(some)] for row in range(requests)]
    # few different values: many ties; and rows of a wider tensor
    logits = torch.randn(requests, 2, size, device=device).mul(4).round().div(4)[:, 1]
    history = torch.randint(size, (requests, 9), device=device)
    together = draws(rules, range(requests), logits, count, history=history)
    for row in range(requests):
        alone = draws(
            rules[row], [row], logits[row : row + 1], count, history=history[row : row + 1]
        )
        assert torch.equal(alone[0], together[row]), rules[row]


def test_positions_drawn_at_once_are_those_drawn_one_by_one(device):
    torch.manual_seed(4)
    logits = torch.randn(2, 6, 1003, device=device)
    rules = [{"temperature": 1.2, "top_p": 0.9}, {"top_k": 9}]
    made = sampler(rules, [5, 6], logits=logits, max_draws=6)
    steps = torch.arange(6, device=device)
    at_once = made.keep([0] * 6 + [1] * 6).draw(logits.flatten(0, 1), steps.repeat(2))
    for step in steps.tolist():
        one = made.draw(logits[:, step], torch.full((2,), step, device=device))
        assert torch.equal(one, at_once.view(2, 6)[:, step])


def test_kept_rows_go_on_as_they_would_have(device):
    torch.manual_seed(5)
    logits = torch.randn(len(ALL_RULES), 1003, device=device)
    history = torch.randint(1003, (len(ALL_RULES), 4), device=device)
    made = sampler(ALL_RULES, range(len(ALL_RULES)), logits=logits, max_draws=3)
    steps = torch.full((len(ALL_RULES),), 2, device=device)
    want = made.draw(logits, steps, history)
    for rows in ([9, 2, 2, 7], [0], [], torch.tensor([5, 1], device=device)):
        kept = made.keep(rows)
        index = torch.as_tensor(rows, dtype=torch.int64, device=device)
        got = kept.draw(logits[index], steps[index], history[index])
        assert torch.equal(got, want[index])
    again = made.keep([9, 2, 2, 7]).keep([3, 0])
    index = torch.tensor([7, 9], device=device)
    assert torch.equal(again.draw(logits[index], steps[index], history[index]), want[index])
    assert made.needs_history and not made.keep([0, 1]).needs_history


def test_equal_logits_keep_exactly_k(device):
    tokens = draws({"top_k": 3}, range(200), torch.zeros(10, device=device), count=5)
    assert set(tokens.flatten().tolist()) == {0, 1, 2}
    # two above the ties
    logits = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0], device=device)
    assert set(draws({"top_k": 3}, range(200), logits, 5).flatten().tolist()) == {0, 1, 4}
    # two of four are half, and not less
    for size, want in ((4, {0, 1}), (5, {0, 1, 2})):
        tokens = draws({"top_p": 0.5}, range(200), torch.zeros(size, device=device), count=5)
        assert set(tokens.flatten().tolist()) == want


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_what_is_drawn_is_among_those_kept(data):
    size = data.draw(st.integers(1, 24))
    values = st.sampled_from([-math.inf, -30.0, -2.0, -0.5, 0.0, 0.25, 1.0, 3.0, 40.0])
    rows = data.draw(st.lists(st.lists(values, min_size=size, max_size=size), min_size=1))
    rules = [
        {
            "temperature": data.draw(st.sampled_from([0.0, 0.3, 1.0, 2.0])),
            "top_k": data.draw(st.sampled_from([None, 1, 2, 5, 99])),
            "top_p": data.draw(st.sampled_from([None, 0.1, 0.77, 0.99, 1.0])),
            "min_p": data.draw(st.sampled_from([None, 0.03, 0.4, 1.0])),
        }
        for _ in rows
    ]
    logits = torch.tensor(rows, dtype=torch.float64)
    seeds = [data.draw(st.integers(-(2**63), 2**63 - 1)) for _ in rows]
    tokens = draws(rules, seeds, logits, count=2)
    for row, rule, drawn in zip(logits, rules, tokens.tolist(), strict=True):
        if not row.amax().isfinite():
            assert drawn == [NO_TOKEN] * 2
        else:
            assert set(drawn) <= kept_by_definition(row, **rule)


def kept_by_definition(logits: Tensor, temperature, top_k, top_p, min_p) -> set[int]:
    """Tokens in order of likelihood, one after the other, as the rules read."""
    order = sorted(range(len(logits)), key=lambda token: (-float(logits[token]), token))
    if temperature == 0:
        return set(order[:1])
    probs = (logits / temperature).softmax(-1).tolist()
    order = [token for token in order[: top_k or None] if probs[token] > 0]
    total, kept, reached = sum(probs[token] for token in order), [], 0.0
    for token in order:
        # a sum of 24 float64 numbers, and weights rounded to 2^-48 of the largest
        if reached >= ((top_p or 1.0) + 24 * 2.0**-47) * total:
            break
        kept.append(token)
        reached += probs[token]
    least = (min_p or 0.0) * (1 - 2.0**-50) * probs[order[0]]
    return {token for token in kept if probs[token] >= least}


def test_a_large_vocabulary_biases_nothing(device):
    torch.manual_seed(7)
    logits = torch.randn(151_936, device=device)
    tokens = draws({"temperature": 1.0}, [0], logits, count=300)[0]
    sums = logits.cpu().double().softmax(-1).cumsum(-1)
    assert torch.equal(tokens.cpu(), torch.searchsorted(sums, uniforms(0, 300), right=True))


@pytest.mark.parametrize("size", [1, 2, 3, 1003, 2**17, 2**17 + 1])
def test_sums_of_weights_are_exact_in_any_order(size, device):
    logits = 8 * torch.randn(size, device=device)
    made = sampler({}, [0], logits=logits)
    assert made._weights(torch.zeros_like(logits)).sum() <= 2**53
    weights = made._weights(logits - logits.amax())
    total = math.fsum(weights.tolist())
    for order in (weights, weights.flip(0), weights[torch.randperm(size, device=device)]):
        assert order.cumsum(0)[-1].item() == total


def test_no_token_of_probability_zero_at_either_end(device):
    # the first and last tokens are impossible, and the numbers are the smallest and the largest
    logits = torch.full((2, 151_936), -torch.inf, device=device)
    logits[:, 5:70_000] = 0.0
    logits[:, 40_000:50_000] = -torch.inf
    made = sampler({"temperature": 1.0}, [0, 0], logits=logits, max_draws=1)
    ends = torch.tensor([[0.0, 1.0], [1 - 2.0**-53, 1.0]], dtype=torch.float64, device=device)
    made._uniforms.copy_(ends)
    assert made.draw(logits, torch.zeros(2, dtype=torch.int64, device=device)).tolist() == [
        5,
        69_999,
    ]


# the last two are 0 in float32, and the smallest number there is in float64
@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-46, 1e-320, 5e-324])
def test_a_tiny_temperature_is_greedy_and_finite(temperature, device):
    rules = {"temperature": temperature}
    logits = torch.tensor([1e4, 3e4, -1e4, -torch.inf], device=device)
    assert (draws(rules, range(50), logits, 2) == 1).all()
    close = torch.tensor([1.0, 1.0 + 2**-23, 1.0 + 2**-23], device=device)
    check_frequencies(draws(rules, range(500), close, 4), torch.tensor([0, 0.5, 0.5]))


@pytest.mark.parametrize("temperature", [1e30, 1e39, 1.7e308])
def test_a_huge_temperature_draws_all_tokens_alike(temperature, device):
    logits = torch.tensor([1e4, 3e4, -1e4, 0.0, -torch.inf], device=device)
    tokens = draws({"temperature": temperature}, range(500), logits, 4)
    check_frequencies(tokens, torch.tensor([0.25, 0.25, 0.25, 0.25, 0]))


def test_seeds_repeat_and_leave_the_global_generator_alone(device):
    torch.manual_seed(6)
    logits = torch.randn(500, device=device)
    state = torch.get_rng_state()
    first, again, other = draws({"temperature": 1.0}, [1, 1, 2], logits, count=50)
    assert torch.equal(first, again) and not torch.equal(first, other)
    unseeded = draws({"temperature": 1.0}, [None, None], logits, count=50)
    assert not torch.equal(*unseeded)
    assert torch.equal(torch.get_rng_state(), state)


def test_room_for_more_draws_does_not_change_the_first():
    logits = torch.zeros(1, 1000)
    few = draws({"temperature": 1.0}, [7], logits, count=3)
    assert torch.equal(few, draws({"temperature": 1.0}, [7], logits, count=100)[:, :3])


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 0.5])
def test_a_seed_that_is_no_seed_is_named(seed):
    with pytest.raises(ValueError, match=f"seed must be a whole number of 64 bits, got {seed}"):
        sampler({}, [seed], logits=LOGITS)


@pytest.mark.parametrize("rules", [{}, {"temperature": 0}, {"temperature": 0.0, "top_k": 3}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_most_likely(rules, dtype, device):
    assert Sampling(**rules).is_greedy
    assert draws(rules, [0], LOGITS.to(device, dtype)).item() == 1


def test_greedy_alone_is_one_argmax(device):
    logits = torch.randn(3, 1000, device=device)
    made = sampler({}, range(3), logits=logits)
    steps = torch.zeros(3, dtype=torch.int64, device=device)
    with torch.profiler.profile() as profile:
        made.draw(logits, steps)
    names = {event.name for event in profile.events()}
    assert "aten::argmax" in names
    assert not names & {"aten::sub", "aten::exp", "aten::cumsum", "aten::sort", "aten::topk"}


@pytest.mark.parametrize(
    ("rules", "sorts"),
    [
        ([{"temperature": 1.0}, {"min_p": 0.1}, {"top_p": 1.0}, {"top_k": 0}, {}], set()),
        ([{"temperature": 0.0, "top_k": 3, "top_p": 0.5}, {"temperature": 1.0}], set()),
        ([{"temperature": 1.0}, {"top_k": 7}], {"aten::topk"}),
        ([{"top_k": 3}, {"top_k": 7, "top_p": 0.5}], {"aten::topk"}),
        ([{"top_k": 3}, {"top_p": 0.5}], {"aten::sort"}),
    ],
)
def test_nothing_is_sorted_for_rows_that_filter_nothing(rules, sorts):
    logits = torch.randn(len(rules), 1000)
    made = sampler(rules, range(len(rules)), logits=logits)
    with torch.profiler.profile() as profile:
        made.draw(logits, torch.zeros(len(rules), dtype=torch.int64))
    assert {event.name for event in profile.events()} & {"aten::topk", "aten::sort"} == sorts


@pytest.mark.parametrize(
    "rules", [{"temperature": 0.1}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}]
)
def test_any_filter_alone_means_sampling(rules):
    assert not Sampling(**rules).is_greedy


def test_penalty_and_bias_alone_are_greedy():
    assert Sampling(repetition_penalty=1.2, logit_bias={0: 1.0}).is_greedy


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rules", ALL_RULES, ids=str)
def test_rows_that_are_not_finite_draw_no_token(rules, bad, device):
    logits = torch.randn(3, 1003, device=device)
    fine = draws(rules, range(3), logits, history=logits.argmax(-1)[:, None])
    logits[1, slice(None) if bad == -torch.inf else 500] = bad
    tokens = draws(rules, range(3), logits, history=logits.argmax(-1)[:, None])
    assert tokens[1] == NO_TOKEN
    assert torch.equal(tokens[::2], fine[::2])


def test_a_row_all_of_whose_tokens_are_banned_draws_none():
    rules = {"temperature": 1.0, "logit_bias": dict.fromkeys(range(5), -math.inf)}
    assert draws([rules, {}], [0, 0], LOGITS).flatten().tolist() == [NO_TOKEN, 1]


def test_after_its_last_draw_a_row_draws_no_token(device):
    logits = torch.randn(2, 50, device=device)
    made = sampler([{"temperature": 1.0}, {}], [0, 0], logits=logits, max_draws=2)
    for step, ended in ((1, False), (2, True), (900, True)):
        tokens = made.draw(logits, torch.full((2,), step, device=device)).tolist()
        assert (tokens[0] == NO_TOKEN) == ended and tokens[1] == logits[1].argmax()


def test_leaves_logits_unchanged(device):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        logits = torch.randn(len(ALL_RULES), 1003, device=device).to(dtype)
        before = logits.clone()
        draws(ALL_RULES, range(len(ALL_RULES)), logits, 2, history=torch.zeros_like(logits).long())
        assert torch.equal(logits, before)


@pytest.mark.parametrize("rules", [[{}], ALL_RULES], ids=["greedy", "all"])
def test_does_not_wait_for_the_device_and_can_be_captured(rules, device):
    logits = torch.randn(len(rules), 1003, device=device)
    history = torch.randint(1003, (len(rules), 6), device=device)
    lengths = torch.full((len(rules),), 5, device=device)
    steps = torch.zeros(len(rules), dtype=torch.int64, device=device)
    made = sampler(rules, range(len(rules)), logits=logits, max_draws=4)
    got = torch.empty_like(steps)

    def step():
        got.copy_(made.draw(logits, steps, history, lengths))
        steps.add_(1)

    replay = captured(step, device)
    steps.zero_()
    for number in range(4):
        logits.normal_()
        replay()
        want = made.draw(logits, torch.full_like(steps, number), history, lengths)
        assert torch.equal(got, want)


def test_waiting_for_the_device_would_be_noticed():
    with pytest.raises(AssertionError, match="waits for the device"), no_host_sync():
        sampler({}, [0], logits=LOGITS).keep(torch.tensor([0]))


def test_shapes_that_do_not_match_are_named():
    made = sampler({"repetition_penalty": 2.0}, [0, 1], logits=LOGITS)
    steps = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"logits must be \(2, 5\), got \(3, 5\)"):
        made.draw(LOGITS.expand(3, 5), steps)
    with pytest.raises(ValueError, match="history must be given for a repetition penalty"):
        made.draw(LOGITS.expand(2, 5), steps)
    with pytest.raises(ValueError, match="seeds must be one per request, 2, got 1"):
        sampler([{}, {}], [0], logits=LOGITS)


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
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a finite number above 0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty must be a finite number above 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty must be a finite number above 0"),
        ({"repetition_penalty": math.nan}, "repetition_penalty must be a finite number above 0"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias must have token ids for keys, got -1"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias must have token ids for keys, got 'a'"),
        ({"logit_bias": {1: "x"}}, "logit_bias must have finite numbers or -inf .*, got 'x'"),
        ({"logit_bias": {1: 10**400}}, "logit_bias must have finite numbers or -inf for values"),
        ({"logit_bias": 3}, "logit_bias must map token ids to numbers, got 3"),
        ({"temperature": "hot"}, "temperature must be a number of at least 0, got 'hot'"),
        ({"temperature": True}, "temperature must be a number of at least 0, got True"),
        ({"temperature": 10**400}, "temperature must be finite in float64, got 1000"),
        ({"top_k": "5"}, "top_k must be a whole number of at least 0, got '5'"),
        ({"top_k": True}, "top_k must be a whole number of at least 0, got True"),
        ({"top_p": "x"}, "top_p must be above 0 and at most 1, got 'x'"),
        ({"min_p": [1]}, r"min_p must be from 0 to 1, got \[1\]"),
        ({"repetition_penalty": "1"}, "repetition_penalty must be a finite number .*, got '1'"),
        ({"logit_bias": {1: math.inf}}, "logit_bias must have finite numbers or -inf for values"),
        ({"logit_bias": {1: math.nan}}, "logit_bias must have finite numbers or -inf for values"),
    ],
)
def test_values_out_of_range_are_named(rules, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**rules)


def test_a_bias_beyond_the_vocabulary_is_named():
    with pytest.raises(ValueError, match="logit_bias must name tokens below 5, got 5"):
        sampler({"logit_bias": {4: 1.0, 5: 1.0}}, [0], logits=LOGITS)
