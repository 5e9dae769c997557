"""Pages of keys and values: who has them, who shares them, what they hold."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.models import tiny_model
from support.poison import poisoned

from fastlm.model.prefill import prefill
from fastlm.testing import assert_as_accurate


@pytest.mark.parametrize("page_size", [1, 3, 16])
@torch.inference_mode()
def test_pages_give_the_logits_of_the_whole(page_size, device):
    model = tiny_model(num_key_value_heads=1).to(device)
    double = copy.deepcopy(model).double()
    prompts = [torch.randint(320, (length,)).tolist() for length in (5, 12, 1)]
    more = torch.randint(320, (3, 9), device=device)
    with poisoned():
        cache = model.new_paged_cache(64, page_size)
    rows = cache.rows([cache.add() for _ in prompts])
    first = prefill(model, prompts, rows)
    got = [first[:, None], *(model(i, cache=rows).logits for i in more.split((1, 1, 5, 2), 1))]
    assert rows.lengths == [14, 21, 10]
    for row, prompt in enumerate(prompts):
        ids = torch.cat((torch.tensor([prompt], device=device), more[row : row + 1]), 1)
        plain, truth = (m(ids, logits_to_keep=10).logits for m in (model, double))
        actual = torch.cat(got, 1)[row : row + 1]
        assert_as_accurate("logits", actual, plain=plain, truth=truth)


@torch.inference_mode()
def test_a_fork_shares_pages_and_writing_to_it_leaves_the_other_as_it_was(device):
    model = tiny_model().to(device)
    ids = torch.randint(320, (1, 10), device=device)
    cache = model.new_paged_cache(8, 4)
    first = cache.add()
    model(ids, cache=cache.rows([first]))
    second = cache.fork(first)
    assert cache.pages(second) == cache.pages(first) and cache.free_pages == 5
    before = cache.keys[:, list(cache.pages(first))].clone()
    token = torch.randint(320, (1, 1), device=device)
    got = model(token, cache=cache.rows([second])).logits
    # the last page was half full: the second sequence has one of its own now
    assert cache.pages(second)[:2] == cache.pages(first)[:2]
    assert cache.pages(second)[2] != cache.pages(first)[2]
    after = cache.keys[:, list(cache.pages(first))]
    assert torch.equal(after.flatten(1, 2)[:, :10], before.flatten(1, 2)[:, :10])
    want = model(torch.cat((ids, token), 1)).logits[:, -1:]
    torch.testing.assert_close(got, want)
    # the first goes on in the page that is its own again, without a copy
    pages = cache.pages(first)
    other = (token + 1) % 320
    got = model(other, cache=cache.rows([first])).logits
    assert cache.pages(first) == pages
    torch.testing.assert_close(got, model(torch.cat((ids, other), 1)).logits[:, -1:])
    cache.free(first)
    cache.free(second)
    assert cache.free_pages == 8 and cache.sequences == ()


@torch.inference_mode()
def test_forks_that_write_in_one_call_do_not_see_each_other(device):
    model = tiny_model().to(device)
    ids = torch.randint(320, (1, 6), device=device)
    cache = model.new_paged_cache(8, 4)
    first = cache.add()
    model(ids, cache=cache.rows([first]))
    rows = cache.rows([first, cache.fork(first), cache.fork(first, 5)])
    more = torch.randint(320, (3, 3), device=device)
    got = model(more, cache=rows).logits
    assert rows.lengths == [9, 9, 8]
    last = {cache.pages(sequence)[1] for sequence in rows.sequences}
    assert len(last) == 3
    for row, length in enumerate((6, 6, 5)):
        whole = torch.cat((ids[:, :length], more[row : row + 1]), 1)
        torch.testing.assert_close(got[row], model(whole).logits[0, -3:])


@torch.inference_mode()
def test_what_does_not_fit_is_refused_and_changes_nothing(device):
    model = tiny_model().to(device)
    cache = model.new_paged_cache(3, 4)
    sequence = cache.add()
    ids = torch.randint(320, (1, 13), device=device)
    with pytest.raises(ValueError, match=r"in the 3 of 3 pages of 4 tokens .* got tokens for 4"):
        model(ids, cache=cache.rows([sequence]))
    assert cache.free_pages == 3 and cache.length(sequence) == 0
    model(ids[:, :10], cache=cache.rows([sequence]))
    fork = cache.fork(sequence)
    with pytest.raises(ValueError, match=r"in the 0 of 3 pages of 4 tokens .* got tokens for 1"):
        model(ids[:, :1], cache=cache.rows([fork]))
    assert cache.pages(fork) == cache.pages(sequence) and cache.length(fork) == 10
    with pytest.raises(ValueError, match="input must have batch 1, got 2"):
        model(ids.expand(2, -1)[:, :1], cache=cache.rows([fork]))
    long = model.new_paged_cache(40, 4)
    rows = long.rows([long.add()])
    model(torch.zeros(1, 64, dtype=torch.int64, device=device), cache=rows)
    with pytest.raises(ValueError, match=r"fit in the 0 of 64 tokens that a sequence may .* got 1"):
        model(ids[:, :1], cache=rows)


def test_wrong_sequences_are_named():
    cache = tiny_model().new_paged_cache(3, 4)
    sequence = cache.add()
    for call in (cache.length, cache.pages, cache.free, cache.fork, lambda n: cache.rows([n])):
        with pytest.raises(ValueError, match=r"sequence must be one of \[0\], got 7"):
            call(7)
    with pytest.raises(ValueError, match="sequences must differ"):
        cache.rows([sequence, sequence])
    with pytest.raises(ValueError, match=r"length must be in \[0, 0\], got 1"):
        cache.fork(sequence, 1)
    with pytest.raises(ValueError, match=r"length must be in \[0, 0\], got 5"):
        cache.truncate(sequence, 5)
    with pytest.raises(ValueError, match=r"sequence must be one of \[0\], got 7"):
        cache.reserve({sequence: 1, 7: 1})
    with pytest.raises(ValueError, match="tokens must be at least 0, got -3"):
        cache.reserve({sequence: -3})
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 0\], got 1"):
        cache.advance({sequence: 1})
    assert cache.pages(sequence) == () and cache.length(sequence) == 0
    for sizes in ({"num_pages": 0}, {"num_pages": 1, "page_size": 0}):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            tiny_model().new_paged_cache(**sizes)


@torch.inference_mode()
def test_reserved_pages_stay_until_they_are_used(device):
    model = tiny_model().to(device)
    cache = model.new_paged_cache(8, 4)
    sequence = cache.add()
    cache.reserve({sequence: 20})
    pages = cache.pages(sequence)
    assert len(pages) == 5
    model(torch.zeros(1, 6, dtype=torch.int64, device=device), cache=cache.rows([sequence]))
    assert cache.pages(sequence) == pages and cache.length(sequence) == 6
    cache.truncate(sequence, 5)
    assert cache.pages(sequence) == pages[:2]


class Pages(RuleBasedStateMachine):
    """Sequences come, grow, fork, shrink and go; what they hold is what was written to them."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = tiny_model(num_hidden_layers=1).new_paged_cache(12, 3)
        self.cache.keys.zero_()
        self.held: dict[int, list[int]] = {}
        self.count = 0

    @rule()
    def add(self) -> None:
        self.held[self.cache.add()] = []

    @precondition(lambda self: self.held)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 5), min_size=1, max_size=3))
    def write(self, data: st.DataObject, tokens: list[int]) -> None:
        sequences = data.draw(st.permutations(list(self.held)))[: len(tokens)]
        rows = self.cache.rows(sequences)
        before = {s: self.cache.pages(s) for s in self.held}
        try:
            rows.check_room(len(sequences), tokens[: len(sequences)])
        except ValueError:
            assert before == {s: self.cache.pages(s) for s in self.held}
            return
        lengths = rows.lengths
        for row, (sequence, count) in enumerate(zip(sequences, tokens, strict=False)):
            for at in range(lengths[row], lengths[row] + count):
                self.count += 1
                place = torch.tensor([row]), torch.tensor([at])
                mark = torch.full((1, 2, 16), float(self.count))
                rows.store(0, *place, mark, mark)
                self.held[sequence].append(self.count)
        rows.advance(tokens[: len(sequences)])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.held)))
        length = data.draw(st.integers(0, len(self.held[sequence])))
        self.held[self.cache.fork(sequence, length)] = self.held[sequence][:length]

    @precondition(lambda self: self.held)
    @rule(data=st.data(), tokens=st.integers(0, 7))
    def reserve(self, data: st.DataObject, tokens: int) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.held)))
        before = self.cache.pages(sequence)
        try:
            self.cache.reserve({sequence: tokens})
        except ValueError:
            assert self.cache.pages(sequence) == before
            return
        # what is reserved stays until it is used, truncated or freed
        assert 3 * len(self.cache.pages(sequence)) >= len(self.held[sequence]) + tokens

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def shrink(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.held)))
        length = data.draw(st.integers(0, len(self.held[sequence])))
        self.cache.truncate(sequence, length)
        del self.held[sequence][length:]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.held)))
        self.cache.free(sequence)
        del self.held[sequence]

    @invariant()
    def everyone_holds_what_was_written(self) -> None:
        for sequence, marks in self.held.items():
            pages = list(self.cache.pages(sequence))
            assert len(pages) >= -(-len(marks) // 3)
            stored = self.cache.keys[0, pages, :, 0, 0].flatten()[: len(marks)]
            assert stored.tolist() == marks
        used = {page for sequence in self.held for page in self.cache.pages(sequence)}
        assert len(used) + self.cache.free_pages == 12


TestPages = Pages.TestCase
