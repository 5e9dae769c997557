"""The CUDA C++ kernels of attention_with_kv_cache, run on a CPU: addresses, bits, launches.

What they compute is tested with the other backends, in test_attention_with_kv_cache*.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from support.cuda_host import HOST, host_module, in_place_of_the_extension, ordered, program, run
from support.interpreter import interpreted_only
from support.kv_cache import Call, assert_equal, call, judge, same, small_splits
from support.layouts import layouts
from support.memory import guarded, in_child, sparse
from support.poison import poisoned

import fastlm
from fastlm.ops.cuda import attention_with_kv_cache as door

pytestmark = interpreted_only  # on a GPU the kernels run there

DRIVER = HOST / "check_attention_with_kv_cache.cpp"
LENGTHS = (37, 0, 63)
ALL = {
    "window_size": 20, "softcap": 1.5, "sinks": torch.tensor([0.7, -1.2]), "rotary": 12,
    "page_size": 7, "value_dim": 11,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def extension() -> Iterator[ModuleType]:
    with in_place_of_the_extension(host_module()) as module:
        yield module


@pytest.fixture(autouse=True)
def _small_splits() -> Iterator[None]:
    with small_splits():
        yield


# Sanitizers


@pytest.mark.parametrize("variant", ["plain", pytest.param("asan", marks=pytest.mark.slow)])
@pytest.mark.parametrize("order", ["forward", "random"])
def test_stays_inside_its_blocks_of_memory(order, variant):
    done = run(program(DRIVER, variant), order)
    assert (done.returncode, done.stderr) == (0, "")
    assert "64 launches" in done.stdout


@pytest.mark.slow
def test_has_no_races():
    done = run(program(DRIVER, "tsan"), "small")
    assert (done.returncode, done.stderr) == (0, "")
    assert "4 launches" in done.stdout


# Numbers


@pytest.mark.parametrize("head_dim", [1, 8, 13, 64, 80, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_any_head_dim(head_dim, dtype):
    """A row that is no multiple of 16 bytes is read one byte at a time; wide ones in few keys."""
    for value_dim in (head_dim, max(1, 272 - head_dim) % 256):
        judge(call((33,), 2, head_dim=head_dim, value_dim=value_dim, dtype=dtype), "cuda")


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (9, 1), (17, 1), (32, 2)], ids=str)
def test_any_group_of_heads(heads):
    judge(call((20, 3), 2, *heads), "cuda")


def test_a_fixed_number_of_splits_is_as_accurate():
    one = call(LENGTHS, 2, sinks=torch.randn(2))
    for num_splits in (1, 3, 20, 2**31 - 1):
        judge(one, "cuda", num_splits=num_splits)


# Bit for bit


@pytest.mark.parametrize("options", [{}, ALL, ALL | {"int8": True}], ids=["-", "all", "int8"])
def test_a_row_has_the_bits_it_has_alone(options):
    one = call(LENGTHS, 2, **options)
    out, lse, *_ = one("cuda")
    for row in range(len(LENGTHS)):
        alone, alone_lse, *_ = one.of_row(row)("cuda")
        assert torch.equal(alone, out[row : row + 1])
        assert torch.equal(alone_lse, lse[row : row + 1])


@pytest.mark.parametrize("num_splits", [None, 3])
@pytest.mark.parametrize(
    "heads", [(4, 1), (16, 1), pytest.param((65, 1), marks=pytest.mark.slow)], ids=str
)
def test_a_row_of_a_count_of_its_own_has_the_bits_it_has_alone(heads, num_splits):
    counts = (1, 0, 17, 5)
    base = call((37, 5, 20, 50), max(counts), *heads, rotary=16, page_size=7)
    packed = base.with_counts(counts)
    judge(packed, "cuda", num_splits=num_splits)
    out, lse, *_ = packed("cuda", num_splits=num_splits)
    first = 0
    for row, count in enumerate(counts):
        one = base.of_row(row)
        tokens = {name: one.options[name][:, :count] for name in ("key", "value")}
        if count:
            one = dataclasses.replace(one, query=one.query[:, :count], options=one.options | tokens)
            alone, alone_lse, *_ = one("cuda", num_splits=num_splits)
            assert torch.equal(alone, out[:, first : first + count])
            assert torch.equal(alone_lse, lse[:, :, first : first + count])
        first += count


def test_pages_and_the_size_of_the_cache_change_no_bit():
    one = call(LENGTHS, 2, page_size=7, rotary=16)
    whole = one.whole()
    assert_equal(whole("cuda")[:2], one("cuda")[:2])
    more = {
        name: torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 5000), value=torch.nan)
        for name, x in (("k_cache", whole.k_cache), ("v_cache", whole.v_cache))
    }
    assert_equal(dataclasses.replace(whole, **more)("cuda")[:2], whole("cuda")[:2])
    zeros = {name: getattr(one, name).nan_to_num(0.0) for name in ("k_cache", "v_cache")}
    assert_equal(dataclasses.replace(one, **zeros)("cuda")[:2], one("cuda")[:2])


def test_the_order_of_blocks_and_what_memory_held_change_no_bit(extension):
    one = call(LENGTHS, 5, **ALL)
    expected = one("cuda")
    for order, seed in (("reverse", 0), ("random", 0), ("random", 1)):
        with ordered(extension, order, seed):
            assert_equal(one("cuda"), expected)
    for byte in (0, 255, 127):
        with poisoned(byte):
            assert_equal(one("cuda"), expected)


def called(one: Call, **tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """out, lse, and what was written, with ``tensors`` in the place of the call's own."""
    arguments = {"cache_seqlens": one.seqlens, **one.options, **one.tensors(), **tensors}
    out, lse = fastlm.attention_with_kv_cache(**arguments, return_lse=True, backend="cuda")
    return (out, lse, *(arguments[name] for name in one.written))


@pytest.mark.parametrize("name", ["query", "k_cache", "v_cache", "key", "value"])
def test_layout_changes_no_bit(name):
    for dtype in (torch.float32, torch.bfloat16):
        one = call((7, 12), 2, dtype=dtype, capacity=20, rotary=16)
        expected = one("cuda")
        tensor = one.options[name] if name in one.options else getattr(one, name)
        for layout, view in layouts(tensor, last_contiguous=True):
            got = called(one, **{name: view})
            assert all(same(a, b).all() for a, b in zip(got, expected, strict=True)), layout


# Addresses


@pytest.mark.parametrize("end", ["back", "front"])
@pytest.mark.parametrize("options", [{}, {"int8": True}, {"head_dim": 8, "value_dim": 16}], ids=str)
@pytest.mark.parametrize("page_size", [0, 7])
def test_nothing_outside_is_touched(end, page_size, options):
    sizes = {"value_dim": 11, "head_dim": 13} | options
    one = call((33, 0, 17), 3, capacity=36, page_size=page_size, rotary=8, **sizes)

    def inside() -> None:
        tensors = {**one.options, **one.tensors(), "cache_seqlens": one.seqlens}
        guards = {n: guarded(x, end) if torch.is_tensor(x) else x for n, x in tensors.items()}
        fastlm.attention_with_kv_cache(**guards, backend="cuda")

    in_child(inside)


@pytest.mark.parametrize("name", ["k_cache", "v_cache", "query", "key", "value"])
def test_strides_beyond_32_bits(name):
    one = call((3, 5), 2, heads=2, kv_heads=2, head_dim=4, capacity=8)
    expected = one("cuda")
    tensor = one.options[name] if name in one.options else getattr(one, name)
    for dim in range(3):
        strides = [*tensor.stride()]
        strides[dim] = 2**31 + 64
        far = sparse(tensor.shape, strides, tensor.dtype).copy_(tensor)
        assert torch.equal(called(one, **{name: far})[0], expected[0])


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_strides_of_scales_beyond_32_bits(name):
    one = call((3,), heads=2, kv_heads=2, head_dim=4, capacity=8, int8=True)
    expected = one("cuda")
    scales = one.options[name]
    for dim in range(3):
        strides = [*scales.stride()]
        strides[dim] = 2**31 + 64
        far = sparse(scales.shape, strides, torch.float32).copy_(scales)
        got = called(one, **{name: far})
        assert all(same(a, b).all() for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("page_size", [0, 10])
@pytest.mark.parametrize("length", [98, -1, 2**31 - 1])
def test_a_row_that_does_not_fit_is_nan_and_writes_nothing(length, page_size):
    fitting = call((0, 5), 3, page_size=page_size, rotary=16)
    one = dataclasses.replace(fitting, lengths=[length, 5])
    out, lse, k_cache, _ = one("cuda")
    assert out[0].isnan().all() and lse[0].isnan().all()
    assert torch.equal(out[1], fitting("cuda")[0][1])
    assert (~same(k_cache, one.k_cache)).flatten(2).any(2).sum() == 3


@pytest.mark.parametrize("bad", [-1, 99])
@pytest.mark.parametrize("page", [0, 3])
def test_a_page_that_is_none_makes_its_row_nan(bad, page):
    """One that is read, and one that new tokens need."""
    one = call((30, 25), 2, page_size=10, capacity=40)
    one.options["block_table"][0, page] = bad
    out, lse, k_cache, _ = one("cuda")
    assert out[0].isnan().all() and lse[0].isnan().all() and out[1].isfinite().all()
    assert (~same(k_cache, one.k_cache)).flatten(2).any(2).sum() == 2


@pytest.mark.parametrize("bounds", [[-5, 1, 2, 3, 99], [3, 9, 2, 2**31 - 1, 5]], ids=str)
def test_boundaries_that_are_none_touch_nothing_outside(bounds):
    one = call((37, 5, 0, 50), 17, 4, rotary=16).with_counts((1, 0, 17, 5), spare=0)

    def inside() -> None:
        tensors = {**one.options, **one.tensors(), "cache_seqlens": one.seqlens}
        tensors["cu_seqlens_q"] = torch.tensor(bounds, dtype=torch.int32)
        guards = {n: guarded(x) if torch.is_tensor(x) else x for n, x in tensors.items()}
        fastlm.attention_with_kv_cache(**guards, backend="cuda")

    in_child(inside)


# Launches


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("head_dim", [1, 64, 128, 256])
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_plan_is_within_the_limits(head_dim, itemsize, is_packed):
    for stored in (1, itemsize):
        for num_queries, group_size in ((1, 1), (1, 8), (4096, 8)):
            plan = door.plan(
                num_queries, group_size, head_dim, head_dim, itemsize, stored, longest=131_072,
                rows=4, is_packed=is_packed, num_splits=None,
            )  # fmt: skip
            assert 1 <= plan["tile"] <= 32
            assert plan["tile"] & (plan["tile"] - 1) == 0
            assert plan["teams"] in (1, 2)
            assert plan["splits"] * plan["split_keys"] >= min(131_072, plan["split_keys"])


def test_what_it_cannot_do_is_refused():
    one = call((5,), 2, head_dim=16)
    with pytest.raises(NotImplementedError, match="head_dim must be at most 256, got 264"):
        call((5,), head_dim=264)("cuda")
    apart = torch.empty(*one.query.shape, 2)[..., 0].copy_(one.query)
    with pytest.raises(NotImplementedError, match="dimension of query has stride 2: it must be c"):
        dataclasses.replace(one, query=apart)("cuda")


def test_a_launch_that_fails_says_what_and_why(monkeypatch):
    monkeypatch.setattr(door, "MOST_TEAMS", 9)
    message = r"attend_to_kv_cache did not start: invalid configuration .* \(grid \(2, 1\), 1152 t"
    with pytest.raises(RuntimeError, match=message):
        call((5,), 1, 80, capacity=9)("cuda")
