"""cu_seqlens of packed documents, from position ids and from document ids."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from support.attention import assert_same_bits, backends, blocks, run
from support.captured import captured
from support.host_sync import no_host_sync
from torch import Tensor

import fastlm
from fastlm.testing import attention_inputs

BY_POSITION = fastlm.cu_seqlens_from_position_ids
BY_DOCUMENT = fastlm.cu_seqlens_from_document_ids


def position_ids(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([t for length in lengths for t in range(length)], device=device)


def document_ids(lengths: list[int], device: str) -> Tensor:
    ids = [7 - 3 * d for d, length in enumerate(lengths) for _ in range(length)]
    return torch.tensor(ids, device=device)


BOTH = pytest.mark.parametrize(
    ("function", "ids"),
    [(BY_POSITION, position_ids), (BY_DOCUMENT, document_ids)],
    ids=["positions", "documents"],
)


@BOTH
@pytest.mark.parametrize("lengths", [[3, 1, 1, 4], [9], [1] * 9], ids=str)
def test_is_where_documents_begin_and_the_end_repeated(function, ids, lengths, device):
    tokens = ids(lengths, device)
    ends = [sum(lengths[:d]) for d in range(len(lengths) + 1)]
    for most in (None, len(lengths), len(lengths) + 5):
        size = 9 if most is None else most
        expected = torch.tensor((ends + 9 * [9])[: size + 1], dtype=torch.int32, device=device)
        for given in (tokens, tokens[None], tokens.short(), torch.stack([tokens, tokens])[0]):
            result = function(given, most)
            assert result.dtype == torch.int32
            assert torch.equal(result, expected)


@BOTH
def test_of_no_tokens(function, ids, device):
    nothing = ids([], device).long()
    assert function(nothing).tolist() == [0]
    assert function(nothing.view(1, 0), 3).tolist() == [0, 0, 0, 0]
    assert function(nothing.view(0, 4)).tolist() == [0]


def test_positions_may_go_on_from_an_earlier_row(device):
    # the second row begins in the middle of a document, which its first row does not
    ids = torch.tensor([[5, 6, 0, 1], [2, 3, 9, 10]], device=device)
    assert BY_POSITION(ids).tolist() == [0, 2, 4, 6, 8, 8, 8, 8, 8]


def test_a_row_begins_a_document_whatever_its_id(device):
    ids = torch.tensor([[1, 1, 2], [2, 1, 1]], device=device)
    assert BY_DOCUMENT(ids).tolist() == [0, 2, 3, 4, 6, 6, 6]


def test_narrow_integers_do_not_overflow(device):
    ids = torch.tensor([254, 255, 0], dtype=torch.uint8, device=device)
    assert BY_POSITION(ids).tolist() == [0, 2, 3, 3]


@BOTH
def test_nothing_waits_for_the_device(function, ids, device):
    tokens = ids([3, 1, 4], device)
    with no_host_sync():
        function(tokens)
        if device == "cuda":
            function(tokens, 2)


@BOTH
def test_compiled_for_any_lengths(function, ids, device):
    def rows(tokens: Tensor, most: int) -> Tensor:
        return function(tokens, most)

    compiled = torch.compile(rows, fullgraph=True, dynamic=True, backend="aot_eager")
    for at, lengths in enumerate([[3, 1, 4], [2, 2], [5, 5, 5, 5]]):
        tokens = ids(lengths, device)
        with torch.compiler.set_stance("fail_on_recompile" if at else "default"):
            assert torch.equal(compiled(tokens, at + 4), function(tokens, at + 4))


def test_too_many_documents_raise_where_the_host_may_look(device):
    ids = position_ids([3, 1, 4], device)
    if device == "cpu":
        with pytest.raises(ValueError, match=r"must be at least the 3 documents, got 2"):
            BY_POSITION(ids, 2)
        compiled = torch.compile(BY_POSITION, fullgraph=True, backend="aot_eager")
    else:
        compiled = BY_POSITION
    assert compiled(ids, 2).tolist() == [0, 3, 4]


@pytest.mark.parametrize(
    ("ids", "most", "error", "message"),
    [
        ([0, 1], None, TypeError, "position_ids must be a tensor, got list"),
        (torch.zeros(3), None, TypeError, "position_ids must be one of int64"),
        (torch.zeros(1, 2, 3).long(), None, ValueError, r"have shape \(T,\) or \(B, T\), got \(1"),
        (torch.tensor(0), None, ValueError, r"have shape \(T,\) or \(B, T\), got \(\)"),
        (torch.zeros(3).long(), -1, ValueError, "max_documents must be at least 0, got -1"),
        (torch.zeros(3).long(), 2.0, TypeError, "max_documents must be an integer, got float"),
    ],
)
def test_wrong_arguments_are_named(ids, most, error, message):
    with pytest.raises(error, match=f"cu_seqlens_from_position_ids: .*{message}"):
        BY_POSITION(ids, most)


@pytest.mark.parametrize("backend", backends("triton", "torch", "reference"))
def test_attention_over_them_is_that_over_exact_boundaries(backend, device):
    lengths = [3, 1, 5, 2]
    inputs = attention_inputs(1, 11, 11, 1, 1, 8, device=device)
    exact = torch.tensor([0, 3, 4, 9, 11], dtype=torch.int32, device=device)
    with blocks(16, 16):
        expected = run(*inputs, backend=backend, cu_seqlens_q=exact)
        for padded in (BY_POSITION(position_ids(lengths, device)), BY_DOCUMENT(
            document_ids(lengths, device), 6
        )):  # fmt: skip
            assert_same_bits(run(*inputs, backend=backend, cu_seqlens_q=padded), expected)


def test_a_captured_graph_is_right_for_other_documents(device):
    def example(seed: int) -> list[Tensor]:
        lengths, choose = [], random.Random(seed)
        while sum(lengths) < 8:
            lengths.append(min(choose.randint(1, 4), 8 - sum(lengths)))
        inputs = attention_inputs(1, 8, 8, 1, 1, 16, torch.bfloat16, device, seed=seed)
        return [*inputs, position_ids(lengths, device)]

    def step(query: Tensor, key: Tensor, value: Tensor, ids: Tensor) -> list[Tensor]:
        bounds = BY_POSITION(ids)
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        out = fastlm.causal_attention(
            *leaves, cu_seqlens_q=bounds, window_size=3, softcap=3.0, backend="triton"
        )
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    places, results = example(0), []

    def fixed_step() -> None:
        results[:] = step(*places)

    with blocks(16, 16):
        replay = captured(fixed_step, device)
        for place, values in zip(places, example(1), strict=True):
            place.copy_(values)
        replay()
        for got, want in zip(results, step(*example(1)), strict=True):
            assert torch.equal(got, want)


def test_boundaries_and_attention_compile_together(device):
    def function(inputs: list[Tensor], ids: Tensor) -> Tensor:
        out = fastlm.causal_attention(*inputs, cu_seqlens_q=BY_POSITION(ids), backend="torch")
        return out.square()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for at, lengths in enumerate([[9, 1, 17], [30, 5], [4] * 5]):
        shape = functools.partial(attention_inputs, 1, sum(lengths), sum(lengths), 2, 1, 8)
        results = []
        for call in (function, compiled):
            leaves = [x.requires_grad_() for x in shape(device=device, dtype=torch.bfloat16)]
            with torch.compiler.set_stance("fail_on_recompile" if at else "default"):
                out = call(leaves, position_ids(lengths, device))
            results.append((out, *torch.autograd.grad(out.sum(), leaves)))
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want)
