"""attention_with_kv_cache of rows with a count of queries each, side by side."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.host_sync import no_host_sync
from support.interpreter import interpreted_only, permuted_grid
from support.kv_cache import assert_equal, call, judge, placed, same, small_splits
from support.memory import guarded, in_child
from support.poison import poisoned
from torch._dynamo.testing import CompileCounterWithBackend

import fastlm
from fastlm.kernels._launch import recorded
from fastlm.ops.eager import attention_with_kv_cache as eager

BACKENDS = ("triton", "cuda", "torch", "reference")
ALL = {
    "window_size": 20, "softcap": 1.5, "sinks": torch.tensor([0.7, -1.2, 0.0, 0.3]), "rotary": 12,
    "page_size": 7, "value_dim": 11,
}  # fmt: skip
OPTIONS = {
    "none": {},
    "rotary": {"rotary": 16},
    "reading": {"appends": False},
    "all": ALL,
    "int8": {"int8": True, "page_size": 16},
}
LENGTHS, COUNTS = (37, 5, 0, 50, 63), (1, 0, 17, 5, 4)


@pytest.fixture
def real_plans():
    """Instead of small ones."""


@pytest.fixture(autouse=True)
def _small_splits(request):
    if "real_plans" in request.fixturenames:
        yield
    else:
        with small_splits():
            yield


def rows(lengths=LENGTHS, counts=COUNTS, heads=4, kv_heads=1, device="cpu", **options):
    """The same rows with as many queries each as the longest has."""
    options = placed(options, device)
    return call(lengths, max(counts), heads, kv_heads, device=device, **options)


@pytest.mark.parametrize("backend", ["triton", "cuda", "torch"])
@pytest.mark.parametrize(
    "option",
    [
        pytest.param(x, marks=pytest.mark.slow if x in ("rotary", "reading") else ())
        for x in OPTIONS
    ],
)
def test_every_option(device, backend, option):
    judge(rows(device=device, **OPTIONS[option]).with_counts(COUNTS), backend)


def test_the_definition(device):
    judge(rows(device=device, **ALL).with_counts(COUNTS), "reference")


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str
)
def test_other_dtypes(device, dtype):
    judge(rows(device=device, dtype=dtype, rotary=12).with_counts(COUNTS), "triton")


@pytest.mark.parametrize(
    ("heads", "counts"),
    [((4, 1), COUNTS), ((16, 1), (1, 5)), ((6, 2), (1, 7)), ((65, 1), (1, 2))],
    ids=str,
)
@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"rotary": 16, "page_size": 7}, marks=pytest.mark.slow)],
    ids=["none", "pages"],
)
def test_a_row_has_the_bits_it_has_alone(device, heads, counts, options):
    """Whichever tiles and splits its count of queries wants, and wherever they are kept."""
    lengths = LENGTHS[: len(counts)]
    base = rows(lengths, counts, *heads, device=device, **options)
    out, lse, k_cache, _ = base.with_counts(counts)("triton")
    first = 0
    for row, count in enumerate(counts):
        one = base.of_row(row)
        tokens = {name: one.options[name][:, :count] for name in ("key", "value")}
        if count:
            one = dataclasses.replace(one, query=one.query[:, :count], options=one.options | tokens)
            alone, alone_lse, alone_k, _ = one("triton")
            assert torch.equal(alone, out[:, first : first + count])
            assert torch.equal(alone_lse, lse[:, :, first : first + count])
            if not options:
                assert same(alone_k, k_cache[row : row + 1]).all()
        first += count


@pytest.mark.parametrize(
    "num_splits", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2**31))]
)
def test_a_fixed_number_of_splits_is_as_accurate_and_as_alone(device, num_splits):
    """Rows for the first and the last of three launches, all of them split."""
    counts = (1, 17)
    base = rows((37, 20), counts, device=device, rotary=16)
    packed = base.with_counts(counts)
    judge(packed, "triton", num_splits=num_splits)
    out, lse, *_ = packed("triton", num_splits=num_splits)
    for row, first in ((0, 0), (1, 1)):
        one, count = base.of_row(row), counts[row]
        tokens = {name: one.options[name][:, :count] for name in ("key", "value")}
        one = dataclasses.replace(one, query=one.query[:, :count], options=one.options | tokens)
        alone, alone_lse, *_ = one("triton", num_splits=num_splits)
        assert torch.equal(alone, out[:, first : first + count])
        assert torch.equal(alone_lse, lse[:, :, first : first + count])


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_of_no_row_give_nothing(device, backend):
    out, lse, *_ = rows(device=device).with_counts(COUNTS, spare=3)(backend)
    assert (out[:, -3:] == 0).all()
    assert (lse[:, :, -3:] == -torch.inf).all()
    none = rows((), (1,), device=device)
    nothing = dataclasses.replace(
        none,
        query=torch.randn(1, 3, 4, 16, device=device),
        options={"cu_seqlens_q": torch.zeros(1, dtype=torch.int32, device=device)},
    )
    out, lse, *_ = nothing(backend)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("int8", [False, True], ids=["as queries", "int8"])
def test_the_real_plans(real_plans, device, int8):
    counts = (1, 17, 5)
    base = rows((600, 40, 300), counts, device=device, capacity=700, rotary=16, int8=int8)
    judge(base.with_counts(counts), "triton")


@pytest.mark.slow
def test_more_rows_than_are_looked_at_together(device):
    counts = [row in (0, 3, 127, 128, 139) for row in range(140)]
    lengths = [row % 7 for row in range(140)]
    base = call(lengths, 1, 1, 1, 4, device=device, capacity=9)
    judge(base.with_counts(counts), "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_length_on_the_host_is_that_of_every_row(device, backend):
    one = rows((33, 33), (2, 5), device=device, rotary=16).with_counts((2, 5))
    assert_equal(one(backend, cache_seqlens=33), one(backend))


def test_counts_have_launches_of_their_own(device):
    """For up to 16 pairs of queries and heads, up to 64, and more, of which none is split."""
    with recorded() as log:
        rows(device=device).with_counts(COUNTS)("triton")
    names = ["append_kernel", *["decode_kernel"] * 3, "combine_kernel"]
    assert [launch.name for launch in log] == names
    with recorded() as log:
        rows((5, 5), (2, 1), device=device).with_counts((2, 1), spare=0)("triton")
    assert [launch.name for launch in log] == ["append_kernel", "decode_kernel", "combine_kernel"]


# ---- the torch backend where the host does not look


def unread(one):
    """As on a GPU."""
    written = [x.clone() for x in one.written.values()]
    (
        *_,
        key,
        value,
        lengths,
        table,
        bounds,
        cos,
        sin,
        sinks,
        _,
        interleaved,
        scale,
        window,
        cap,
        _,
    ) = one.arguments()
    caches = eager._Caches(*written, *[None] * (4 - len(written)), table)
    capacity = caches.capacity if cos is None else min(caches.capacity, len(cos))
    with no_host_sync():
        out, lse = eager._unread_packed(
            one.query, caches, key, value, bounds, lengths, capacity,
            None if cos is None else eager._Tables(cos, sin, interleaved),
            eager._Options(sinks, scale, window, cap),
        )  # fmt: skip
    return out, lse, *written


@pytest.mark.parametrize("option", OPTIONS)
def test_torch_without_looking_gives_what_it_gives_looking(device, option, monkeypatch):
    monkeypatch.setattr(eager, "_WRITTEN_SCORES", 1 << 10)
    one = rows(device=device, **OPTIONS[option]).with_counts(COUNTS)
    for got, want in zip(unread(one), one("torch"), strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("page_size", [0, 10])
@pytest.mark.parametrize("lengths", [(81, 0, 99, 5), (-1, 101, 2**31 - 1, 99)], ids=str)
def test_torch_without_looking_writes_no_row_that_does_not_fit(device, lengths, page_size):
    """Of the second lengths none fits but that of one row, which has no queries."""
    counts = (20, 9, 2, 1)
    one = rows((0, 0, 0, 5), counts, device=device, page_size=page_size, rotary=16)
    one = dataclasses.replace(one.with_counts(counts), lengths=list(lengths))
    for got, want in zip(unread(one), one("triton"), strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


def test_torch_without_looking_over_no_room_gives_nan(device):
    one = rows((0, 0), (2, 1), device=device, capacity=0).with_counts((2, 1), spare=1)
    out, *_ = unread(one)
    assert out.isnan().flatten(2).all(2).tolist() == [[True, True, True, False]]


def test_torch_without_looking_of_no_rows_gives_nothing(device):
    one = rows((), (1,), device=device)
    bounds = torch.zeros(1, dtype=torch.int32, device=device)
    query = torch.randn(1, 3, 4, 16, device=device)
    out, lse, *_ = unread(dataclasses.replace(one, query=query, options={"cu_seqlens_q": bounds}))
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


# ---- what does not fit


@pytest.mark.parametrize("page_size", [pytest.param(0, marks=pytest.mark.slow), 10])
@pytest.mark.parametrize("lengths", [(81, 0, 99, 5), (-1, 0, 2**31 - 1, 5)], ids=str)
def test_a_row_that_does_not_fit_is_nan_and_writes_nothing(device, lengths, page_size):
    counts = (20, 9, 2, 1)
    fitting = rows((0, 0, 0, 5), counts, device=device, page_size=page_size)
    one = dataclasses.replace(fitting.with_counts(counts), lengths=list(lengths))
    with fastlm.checked():
        out, lse, k_cache, _ = one("triton")
    assert out.isnan().flatten(2).all(2)[0].tolist() == [True] * 20 + [False] * 9 + [
        True, True, False, False, False,
    ]  # fmt: skip
    assert torch.equal(lse.isnan().any(1), out.isnan().flatten(2).any(2))
    assert (~same(k_cache, one.k_cache)).flatten(2).any(2).sum() == 10


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_on_a_cpu_what_does_not_fit_raises_and_writes_nothing(backend):
    one = rows().with_counts(COUNTS)
    k_cache = one.k_cache.clone()
    with pytest.raises(ValueError, match=r"from 0 to 83, so that 17 more fit in 100, got .*84"):
        dataclasses.replace(one, lengths=[37, 5, 84, 50, 63])(backend)
    for bounds in ([1, 1, 2, 3, 4, 5], [0, 1, 0, 3, 4, 5], [0, 1, 2, 3, 4, 99]):
        with pytest.raises(ValueError, match=r"cu_seqlens_q must rise from 0 to at most 29, the t"):
            one(backend, cu_seqlens_q=torch.tensor(bounds))
    assert same(k_cache, one.k_cache).all()


@interpreted_only
@pytest.mark.slow
@pytest.mark.parametrize("bounds", [[-5, 1, 2, 3, 4, 99], [3, 9, 2, 2**31 - 1, 0, 5]], ids=str)
def test_boundaries_that_are_none_touch_nothing_outside(bounds):
    one = rows(heads=2).with_counts(COUNTS)
    bounds = torch.tensor(bounds, dtype=torch.int32)

    def inside():
        tensors = {name: guarded(x) for name, x in {**one.options, **one.tensors()}.items()}
        tensors["cu_seqlens_q"] = guarded(bounds)
        fastlm.attention_with_kv_cache(
            **tensors, cache_seqlens=guarded(one.seqlens), backend="triton"
        )

    in_child(inside)


@interpreted_only
@pytest.mark.parametrize("end", ["back", pytest.param("front", marks=pytest.mark.slow)])
def test_nothing_outside_is_touched(end):
    one = rows(value_dim=11, head_dim=13, page_size=7, rotary=8, int8=True)
    one = one.with_counts(COUNTS, spare=0)

    def inside():
        tensors = {
            name: guarded(x, end) if torch.is_tensor(x) else x
            for name, x in {**one.options, **one.tensors()}.items()
        }
        fastlm.attention_with_kv_cache(
            **tensors, cache_seqlens=guarded(one.seqlens, end), backend="triton"
        )

    in_child(inside)


@interpreted_only
def test_order_of_programs_and_what_was_in_memory_change_no_bit():
    one = rows((20, 37), (5, 1)).with_counts((5, 1))
    expected = one("triton")
    with permuted_grid(1):
        assert_equal(one("triton"), expected)
    with poisoned(127):
        assert_equal(one("triton"), expected)


# ---- inside torch


def test_nothing_waits_for_the_device(device):
    one = rows(device=device, **ALL).with_counts(COUNTS)
    seqlens, written = one.seqlens, one.tensors()
    with no_host_sync(), torch.no_grad():
        fastlm.attention_with_kv_cache(
            **{**one.options, **written}, cache_seqlens=seqlens, backend="triton"
        )


def test_other_counts_compile_nothing_anew(device):
    base = rows((5, 9), (3, 3), 2, device=device, rotary=16)
    compiles = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=compiles)
    def step(query, written, seqlens, rest):
        return fastlm.attention_with_kv_cache(
            query * 1.0, cache_seqlens=seqlens, backend="triton", **rest, **written
        )

    for counts in ((2, 1), (1, 2), (0, 3)):
        one = base.with_counts(counts, spare=0)
        expected = one("triton")
        written = {name: x.clone() for name, x in one.written.items()}
        with torch.no_grad():
            out = step(one.query, written, one.seqlens, one.options)
        assert_equal([out], expected[:1])
        assert_equal(written.values(), expected[2:])
    assert compiles.frame_count == 1


def test_the_operator_is_registered_as_torch_wants_it(device):
    one = rows((5, 9), (2, 1), 2, device=device, page_size=16).with_counts((2, 1), spare=0)
    # opcheck compares tensors, and NaN is not NaN
    cleared = one.holding(*(x.nan_to_num(0) for x in one.written.values()))
    operator = torch.ops.fastlm.attention_with_kv_cache_forward.default
    torch.library.opcheck(operator, (*cleared.arguments(), "triton"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cu_seqlens_q": torch.zeros(6)}, TypeError, "cu_seqlens_q must be one of int32"),
        (
            {"cu_seqlens_q": torch.zeros(2, 3).int()},
            ValueError,
            r"have shape \(rows \+ 1,\)",
        ),
        ({"cu_seqlens_q": torch.zeros(5).int()}, ValueError, r"k_cache must have shape \(4, S_max"),
        ({"query": torch.zeros(2, 29, 4, 16)}, ValueError, "query must have B == 1 with cu_seqlen"),
        ({"key": torch.zeros(1, 9, 1, 16)}, ValueError, r"key must have shape \(1, 29, 1, 16\)"),
        ({"cache_seqlens": torch.zeros(1).int()}, ValueError, r"cache_seqlens must have shape \(5"),
        ({"cache_seqlens": 101}, ValueError, "cache_seqlens must be from 0 to 100"),
        ({"block_table": torch.zeros(1, 3).int()}, ValueError, r"block_table must have shape \(5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_named(changes, error, message):
    one = rows().with_counts(COUNTS)
    arguments = {**one.options, **one.tensors(), "cache_seqlens": 5, **changes}
    with pytest.raises(error, match=f"attention_with_kv_cache: .*{message}"):
        fastlm.attention_with_kv_cache(**arguments)
