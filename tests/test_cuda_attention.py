"""The CUDA C++ kernels of causal_attention, run on a CPU: tiles, addresses, races, bits.

What they compute is tested with the other backends, in test_attention*.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from unittest import mock

import pytest
import torch
from support.attention import assert_same_bits, judge, judge_pooled, run, upstream
from support.cuda_host import (
    HOST,
    host_module,
    in_place_of_the_extension,
    ordered,
    program,
)
from support.cuda_host import run as run_program
from support.interpreter import interpreted_only
from support.layouts import layouts
from support.memory import guarded, in_child, sparse
from support.poison import poisoned
from torch import Tensor

import fastlm
from fastlm.kernels._runtime import Device, pretend
from fastlm.ops.cuda import attention as door
from fastlm.testing import attention_inputs

pytestmark = interpreted_only  # on a GPU the kernels run there

DRIVER = HOST / "check_attention.cpp"
NARROW = [torch.bfloat16, torch.float16]
DTYPES = [*NARROW, torch.float32, torch.float64]
# bytes that a block may have: sm_75; 86, 89 and 120; 80; 90 and 100
LIMITS = {75: 64 * 1024, 86: 99 * 1024, 80: 163 * 1024, 90: 227 * 1024}


@pytest.fixture(scope="module", autouse=True)
def extension() -> Iterator[ModuleType]:
    with in_place_of_the_extension(host_module()) as module:
        yield module


@contextlib.contextmanager
def warps(most: int) -> Iterator[None]:
    with mock.patch.object(door, "MOST_WARPS", dict.fromkeys((2, 4, 8), most)):
        yield


@contextlib.contextmanager
def shared_memory(limit: int, arch: int = 80) -> Iterator[None]:
    with pretend(Device(arch, 1, limit)):
        yield


def everything(num_queries: int, num_keys: int, last: str) -> dict[str, object]:
    """Every option at once, with documents or with padding."""
    options: dict[str, object] = {"scale": -0.3, "window_size": 45, "softcap": 2.0}
    options["sinks"] = torch.tensor([0.5, -1.0])
    if last == "documents":
        ends = [0, num_queries // 2 + 1, num_queries // 2 + 1, num_queries - 3]
        options["cu_seqlens_q"] = torch.tensor(ends, dtype=torch.int32)
        ends = [0, num_keys // 2 + 3, num_keys // 2 + 9, num_keys - 2]
        options["cu_seqlens_k"] = torch.tensor(ends, dtype=torch.int32)
    else:
        options["key_start"] = torch.tensor([7], dtype=torch.int32)
        options["key_end"] = torch.tensor([num_keys - 4], dtype=torch.int32)
    return options


# Sanitizers


@pytest.mark.slow
@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_stays_inside_its_blocks_of_memory(order):
    done = run_program(program(DRIVER, "asan"), order)
    assert (done.returncode, done.stderr) == (0, "")
    assert "384 launches" in done.stdout


@pytest.mark.slow
def test_has_no_races():
    done = run_program(program(DRIVER, "tsan"), "small")
    assert (done.returncode, done.stderr) == (0, "")
    assert "8 launches" in done.stdout


# Numbers


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_holds_at_every_edge_of_a_tile(dtype):
    cases = [
        attention_inputs(1, num_queries, num_keys, 1, 1, 16, dtype)
        for num_queries in (1, 31, 32, 33)
        for num_keys in (63, 64, 65)
    ]
    with warps(1):
        judge_pooled(cases, backend="cuda")


@pytest.mark.parametrize("head_dims", [(64, 72), (128, 136), (200, 48), (8, 256)], ids=str)
def test_every_width_of_sums(head_dims):
    head_dim, value_dim = head_dims
    inputs = attention_inputs(1, 70, 80, 2, 1, head_dim, torch.bfloat16, value_dim=value_dim)
    judge(*inputs, backend="cuda")


@pytest.mark.parametrize("last", ["documents", "padding"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_takes_all_options_at_once(dtype, last):
    inputs = attention_inputs(1, 100, 110, 2, 1, 24, dtype, value_dim=20)
    with warps(1):
        judge(*inputs, backend="cuda", **everything(100, 110, last))


@pytest.mark.parametrize("softcap", [50.0, 64.0, 1000.0])
def test_a_large_softcap_loses_nothing(softcap):
    inputs = attention_inputs(1, 40, 70, 1, 1, 16, torch.bfloat16)
    judge(*inputs, backend="cuda", softcap=softcap, scale=1.0)


def test_gradients_of_several_tiles_are_those_of_the_function():
    inputs = attention_inputs(1, 70, 72, 2, 1, 2, torch.float64, value_dim=3)
    options = everything(70, 72, "documents")
    sinks = options.pop("sinks").double()
    leaves = [x.requires_grad_() for x in (*inputs, sinks)]

    def function(query, key, value, sinks):
        return fastlm.causal_attention(
            query, key, value, sinks=sinks, return_lse=True, backend="cuda", **options
        )

    with warps(2):
        assert torch.autograd.gradcheck(
            function, leaves, eps=1e-6, atol=1e-7, rtol=1e-5, nondet_tol=0.0, fast_mode=True
        )


# Bit for bit


def inputs_and_dout(*sizes: int, dtype: torch.dtype, **options: int) -> list[Tensor]:
    query, key, value = attention_inputs(*sizes, dtype, **options)
    return [query, key, value, upstream(query, value)[0]]


def results(query: Tensor, key: Tensor, value: Tensor, dout: Tensor, **options) -> tuple:
    return run(query, key, value, dout=dout, backend="cuda", **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("position", range(4), ids=["query", "key", "value", "dout"])
def test_any_layout_gives_the_bits_of_the_contiguous_one(position, dtype):
    tensors = inputs_and_dout(1, 20, 40, 2, 1, 16, dtype=dtype)
    expected = results(*tensors)
    for name, view in layouts(tensors[position], last_contiguous=True):
        changed = [*tensors[:position], view, *tensors[position + 1 :]]
        try:
            assert_same_bits(results(*changed), expected)
        except AssertionError as failure:
            raise AssertionError(f"{name}: {failure}") from failure


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_how_a_launch_is_cut_changes_no_bit(dtype):
    tensors = inputs_and_dout(1, 100, 110, 2, 1, 16, dtype=dtype)
    options = everything(100, 110, "padding")
    expected = results(*tensors, **options)
    with warps(1):
        assert_same_bits(results(*tensors, **options), expected)
    # one stage of streamed rows, and fewer warps
    with shared_memory(18 * 1024 if dtype.itemsize < 8 else 24 * 1024):
        assert_same_bits(results(*tensors, **options), expected)
    with mock.patch.object(door, "SECTION_BYTES", 1):
        assert_same_bits(results(*tensors, **options), expected)


def test_the_order_of_blocks_and_threads_changes_no_bit(extension):
    tensors = inputs_and_dout(1, 70, 75, 4, 2, 16, dtype=torch.bfloat16)
    with warps(2):
        expected = results(*tensors)
        for order, seed in (("reverse", 0), ("random", 0), ("random", 1)):
            with ordered(extension, order, seed):
                assert_same_bits(results(*tensors), expected)


def test_a_document_has_the_bits_that_it_has_alone():
    tensors = inputs_and_dout(1, 150, 150, 2, 1, 16, dtype=torch.bfloat16)
    bounds = torch.tensor([0, 40, 41, 120], dtype=torch.int32)
    out, lse, *grads = results(*tensors, cu_seqlens_q=bounds, window_size=33)
    for start, end in ((0, 40), (40, 41), (41, 120)):
        alone = results(*(x[:, start:end] for x in tensors), window_size=33)
        packed = (out[:, start:end], lse[..., start:end], *(x[:, start:end] for x in grads))
        assert_same_bits(packed, alone)


def test_padding_changes_no_bit():
    tensors = inputs_and_dout(1, 80, 80, 2, 1, 16, dtype=torch.bfloat16)
    expected = results(*tensors)

    def padded(x: Tensor) -> Tensor:
        return torch.cat([x[:, :21], x, x[:, :5]], 1)

    bounds = {name: torch.tensor([at], dtype=torch.int32) for name, at in
              (("key_start", 21), ("key_end", 101))}  # fmt: skip
    out, lse, *grads = results(*map(padded, tensors[:3]), padded(tensors[3]), **bounds)
    inside = slice(21, 101)
    kept = (out[:, inside], lse[..., inside], grads[0][:, inside])
    assert_same_bits(kept, expected[:3])


def test_what_memory_held_before_does_not_matter():
    tensors = inputs_and_dout(1, 40, 50, 2, 1, 9, dtype=torch.bfloat16, value_dim=5)
    bounds = {"key_start": torch.tensor([3], dtype=torch.int32)}
    expected = results(*tensors, **bounds)
    for byte in (0x00, 0x7F):
        with poisoned(byte):
            assert_same_bits(results(*tensors, **bounds), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_later_keys_do_not_reach_earlier_queries(dtype):
    tensors = inputs_and_dout(1, 140, 140, 1, 1, 8, dtype=dtype)
    out, lse, dquery, *_ = results(*tensors)
    for position in (1, 2):
        changed = list(tensors)
        changed[position] = tensors[position].clone()
        changed[position][:, 128:] = torch.nan
        dirty = results(*changed)
        assert torch.equal(dirty[0][:, :128], out[:, :128])
        assert torch.equal(dirty[1][..., :128], lse[..., :128])
        assert torch.equal(dirty[2][:, :128], dquery[:, :128])


# Addresses


@contextlib.contextmanager
def guarded_outputs(end: str) -> Iterator[None]:
    """Outputs and workspaces of the door end at, or begin after, a protected page."""

    def new_empty(self: Tensor, size, dtype=None) -> Tensor:
        size = (size,) if isinstance(size, int) else size
        return guarded(torch.zeros(size, dtype=dtype or self.dtype), end)

    with (
        mock.patch.object(Tensor, "new_empty", new_empty),
        mock.patch.object(torch, "empty_like", lambda x: guarded(torch.zeros_like(x), end)),
        mock.patch.object(torch, "empty", lambda size, dtype, device: guarded(
            torch.zeros(size, dtype=dtype), end)),
    ):  # fmt: skip
        yield


@pytest.mark.parametrize("end", ["back", "front"])
@pytest.mark.parametrize(
    "sizes", [(1, 35, 35, 2, 1, 9), (1, 17, 70, 1, 1, 16), (2, 40, 5, 2, 2, 3)]
)
def test_stays_inside_its_tensors(sizes, end):
    def check() -> None:
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            tensors = inputs_and_dout(*sizes, dtype=dtype)
            expected = results(*tensors)
            placed = [guarded(x, end) for x in tensors]
            with guarded_outputs(end):
                assert_same_bits(results(*placed), expected)

    in_child(check)


def check_huge_strides(position: int, dimension: int) -> None:
    batch, tokens, heads = (3 if at == dimension else 1 for at in range(3))
    tensors = inputs_and_dout(batch, tokens, tokens, heads, heads, 8, dtype=torch.float16)
    expected = results(*tensors)
    strides = list(tensors[position].stride())
    strides[dimension] = 2**30 + 64  # the third step passes 2**31
    wide = sparse(tensors[position].shape, strides, torch.float16).copy_(tensors[position])
    changed = [*tensors[:position], wide, *tensors[position + 1 :]]
    assert_same_bits(results(*changed), expected)


@pytest.mark.parametrize("dimension", range(3), ids=["batch", "token", "head"])
@pytest.mark.parametrize("position", range(4), ids=["query", "key", "value", "dout"])
def test_offsets_beyond_two_to_the_31_are_right(position, dimension):
    in_child(lambda: check_huge_strides(position, dimension))


@pytest.mark.parametrize(
    "bounds",
    [(5, 9, 40), (0, 30, 20), (0, -7, 50), (-(2**31), 2**31 - 1, 0), (99,) * 3, (0, 5, -(2**31))],
    ids=str,
)  # fmt: skip
def test_wrong_boundaries_reach_no_memory_beyond_the_tensors(bounds):
    def check() -> None:
        ends = guarded(torch.tensor(bounds, dtype=torch.int32))
        start, end = guarded(ends[1:2]), guarded(ends[2:])
        for length in (50, 10):
            tensors = [guarded(x) for x in inputs_and_dout(
                1, length, length, 1, 1, 16, dtype=torch.bfloat16)]  # fmt: skip
            results(*tensors, cu_seqlens_q=ends, window_size=7)
            results(*tensors, key_start=start, key_end=end, window_size=7)

    in_child(check)


# Launches


@pytest.mark.parametrize("arch", LIMITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_fits_which_gpu(dtype, arch):
    refused = {}
    with shared_memory(LIMITS[arch], arch):
        for head_dim in (64, 128, 256):
            query = torch.zeros(1, 2, 1, head_dim, dtype=dtype)
            refused[head_dim] = (
                door.forward_refuses(query, query, query),
                door.backward_refuses(query, None, query, query, query),
            )
    kinds = [bool(reason) for reasons in refused.values() for reason in reasons]
    # forward and backward at 64, at 128, at 256
    want = [False] * 6
    if dtype == torch.float32 and arch == 75:
        want[5] = True
    if dtype == torch.float64:
        want = {
            75: [False, False, True, True, True, True],
            86: [False, False, False, False, True, True],
        }.get(arch, want)
    assert kinds == want, refused
    if kinds[5]:
        name = str(dtype).removeprefix("torch.")
        assert refused[256][1] == (
            f"tiles of head_dim 256 and 256 in {name} do not fit the {LIMITS[arch] // 1024} KiB "
            f"of shared memory of sm_{arch}"
        )


def test_a_head_dim_above_256_is_refused():
    query = torch.zeros(1, 2, 1, 257)
    with pytest.raises(NotImplementedError, match="query has a head_dim of 257, the kernels end"):
        fastlm.causal_attention(query, query, query, backend="cuda")
    with pytest.raises(NotImplementedError, match="value has a head_dim of 257, the kernels end"):
        fastlm.causal_attention(query[..., :8], query[..., :8], query, backend="cuda")


def test_a_strided_last_dimension_is_refused():
    query, key, value = attention_inputs(1, 5, 5, 1, 1, 8)
    strided = key.transpose(1, 3).contiguous().transpose(1, 3)
    with pytest.raises(NotImplementedError, match=r"key has stride \d+: it must be contiguous"):
        fastlm.causal_attention(query, strided, value, backend="cuda")


def test_a_launch_that_fails_says_what_and_why():
    inputs = attention_inputs(1, 3, 3, 1, 1, 8)
    message = (
        r"attention_forward did not start: invalid configuration argument \(grid \(1, 1\), "
        r"1280 threads and \d+ bytes of shared memory a block, device 0\)"
    )
    with warps(40), pytest.raises(RuntimeError, match=message):
        fastlm.causal_attention(*inputs, backend="cuda")
    with (
        shared_memory(1024),
        mock.patch.object(door, "forward_refuses", lambda *_: None),
        pytest.raises(RuntimeError, match="attention_forward does not fit 1024 bytes"),
    ):
        fastlm.causal_attention(*inputs, backend="cuda")
