"""causal_attention's kernels: which bytes they touch, and that order and layout change no bit."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
from support.attention import (
    assert_same_bits,
    backward_arguments,
    blocks,
    forward_arguments,
    run,
    upstream,
)
from support.interpreter import interpreted_only, permuted_grid
from support.layouts import layouts
from support.memory import guarded, in_child, sparse
from support.poison import poisoned

import fastlm
from fastlm.kernels import attention as kernels
from fastlm.kernels._launch import MAX_GRID, recorded
from fastlm.kernels.attention import tuning
from fastlm.testing import attention_inputs

NAMES = ("query", "key", "value", "dout")
REAL_PLAN = tuning.plan


@pytest.fixture(autouse=True)
def _small_blocks():
    with blocks(16, 16):
        yield


def run_with_gradient(query, key, value, dout):
    return run(query, key, value, backend="triton", dout=dout)


def inputs_and_dout(*sizes, device="cpu", **options):
    query, key, value = attention_inputs(*sizes, device=device, **options)
    return [query, key, value, upstream(query, value)[0]]


@pytest.mark.parametrize("position", range(4), ids=NAMES)
def test_layout_changes_no_bit(device, position):
    tensors = inputs_and_dout(2, 5, 5, 2, 2, 8, device=device)
    if position != 3:
        # so that one of the layouts can expand a dimension
        tensors[position] = tensors[position][:1].expand(2, -1, -1, -1).contiguous()
    expected = run_with_gradient(*tensors)
    for name, view in layouts(tensors[position], last_contiguous=position != 3):
        changed = [*tensors[:position], view, *tensors[position + 1 :]]
        try:
            assert_same_bits(run_with_gradient(*changed), expected)
        except AssertionError as failure:
            raise AssertionError(f"{NAMES[position]} {name}: {failure}") from failure


def test_a_strided_last_dimension_goes_to_torch(device):
    query, key, value = attention_inputs(1, 18, 18, 2, 1, 8, torch.bfloat16, device)
    strided = key.transpose(1, 3).contiguous().transpose(1, 3)
    with pytest.raises(NotImplementedError, match=r"key has stride \d+: it must be contiguous"):
        fastlm.causal_attention(query, strided, value, backend="triton")
    expected = run(query, key, value, backend="torch")
    assert_same_bits(run(query, strided, value, backend="torch"), expected)
    # the stride of a single column is nobody's business
    narrow = [x[..., :1] for x in (query, key, value)]
    fastlm.causal_attention(*narrow, backend="triton")


@interpreted_only
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_order_of_programs_changes_no_bit(seed):
    tensors = inputs_and_dout(1, 20, 35, 4, 2, 8)
    expected = run_with_gradient(*tensors)
    with permuted_grid(seed):
        assert_same_bits(run_with_gradient(*tensors), expected)


def test_runs_repeat_bit_for_bit(device):
    tensors = inputs_and_dout(1, 20, 35, 2, 1, 8, device=device)
    assert_same_bits(run_with_gradient(*tensors), run_with_gradient(*tensors))


def test_sequences_do_not_see_their_neighbours(device):
    tensors = inputs_and_dout(3, 18, 18, 2, 1, 8, device=device)
    expected = run_with_gradient(*tensors)
    order = [2, 0, 1]
    permuted = run_with_gradient(*(x[order] for x in tensors))
    assert_same_bits(permuted, tuple(x[order] for x in expected))
    alone = run_with_gradient(*(x[1:2] for x in tensors))
    assert_same_bits(alone, tuple(x[1:2] for x in expected))


def test_sections_of_heads_change_no_bit(device):
    tensors = inputs_and_dout(1, 20, 20, 4, 2, 8, device=device)
    expected = run_with_gradient(*tensors)
    for bytes_per_section in (1, 20 * 16 * 4):
        with mock.patch.object(tuning, "SECTION_BYTES", bytes_per_section):
            assert_same_bits(run_with_gradient(*tensors), expected)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(18, 18), (20, 7), (3, 20)])
def test_every_output_element_is_written(device, num_queries, num_keys):
    tensors = inputs_and_dout(1, num_queries, num_keys, 2, 1, 9, device=device, value_dim=5)
    results = []
    for byte in (0xFF, 0x7F):
        with poisoned(byte):
            results.append(run_with_gradient(*tensors))
    assert_same_bits(results[0], results[1])


@contextlib.contextmanager
def guarded_outputs(end):
    """Outputs and workspaces of the kernels end at, or begin after, a protected page."""

    new_empty_like_before = torch.Tensor.new_empty

    def new_empty(self, size, **options):
        if "device" in options:  # the interpreter's own
            return new_empty_like_before(self, size, **options)
        size = (size,) if isinstance(size, int) else size
        return guarded(torch.zeros(size, dtype=options.get("dtype", self.dtype)), end)

    with (
        mock.patch.object(torch.Tensor, "new_empty", new_empty),
        mock.patch.object(torch, "empty_like", lambda x: guarded(torch.zeros_like(x), end)),
    ):
        yield


@interpreted_only
@pytest.mark.parametrize("end", ["back", "front"])
@pytest.mark.parametrize(
    "sizes", [(1, 18, 18, 2, 1, 9), (1, 17, 33, 1, 1, 16), (2, 33, 5, 2, 2, 3)]
)
def test_nothing_outside_the_tensors_is_touched(end, sizes):
    tensors = inputs_and_dout(*sizes)
    expected = run_with_gradient(*tensors)

    def check():
        placed = [guarded(x, end) for x in tensors]
        with guarded_outputs(end):
            assert_same_bits(run_with_gradient(*placed), expected)

    in_child(check)


@interpreted_only
@pytest.mark.parametrize("dimension", range(3), ids=["batch", "token", "head"])
@pytest.mark.parametrize("position", range(4), ids=NAMES)
def test_offsets_beyond_two_to_the_31_are_right(position, dimension):
    batch, tokens, heads = (3 if at == dimension else 1 for at in range(3))
    tensors = inputs_and_dout(batch, tokens, tokens, heads, heads, 4, dtype=torch.float16)
    expected = run_with_gradient(*tensors)
    strides = list(tensors[position].stride())
    strides[dimension] = 2**30 + 64  # the third step passes 2**31

    def check():
        wide = sparse(tensors[position].shape, strides, torch.float16).copy_(tensors[position])
        changed = [*tensors[:position], wide, *tensors[position + 1 :]]
        assert_same_bits(run_with_gradient(*changed), expected)

    in_child(check)


def test_one_grid_dimension_takes_any_number_of_heads():
    def empty(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    query, key = empty(65_537, 1_000, 4, 64), empty(65_537, 1_000, 2, 64)
    with mock.patch.object(tuning, "plan", REAL_PLAN), recorded(run=False) as log:
        out, lse = kernels.forward(*forward_arguments(query, key, key))
        kernels.backward(*backward_arguments(out, None, out, lse, query, key, key))
    assert [launch.name for launch in log] == [
        "forward_kernel", "delta_kernel", "dkdv_kernel", "dq_kernel"
    ]  # fmt: skip
    for launch in log:
        assert len(launch.grid) == 1
        assert launch.grid[0] <= MAX_GRID[0]


@pytest.mark.parametrize("heads", [0, 1, 12, 4096])
@pytest.mark.parametrize("group_size", [1, 4])
def test_sections_hold_whole_groups_or_everything(heads, group_size):
    for bytes_per_group in (0, 1, 2**20, 2**40):
        section = tuning.heads_per_section(heads, group_size, bytes_per_group)
        assert section >= 1
        assert section == max(1, heads) or section % group_size == 0
