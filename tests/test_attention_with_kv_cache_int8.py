"""attention_with_kv_cache over 8-bit caches: what is stored, what that costs, and where it goes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from support.attention import DTYPES
from support.interpreter import interpreted_only
from support.kv_cache import (
    SCALES,
    assert_equal,
    call,
    judge,
    judge_pooled,
    placed,
    same,
    small_splits,
)
from support.layouts import layouts
from support.memory import guarded, in_child, sparse

import fastlm
from fastlm.kernels import attention_with_kv_cache as kernels

BACKENDS = ("triton", "cuda", "torch", "reference")
OPTIONS = {
    "none": {},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": -0.4},
    "rotary": {"rotary": 12},
    "reading": {"appends": False},
}
ALL = {
    "window_size": 20, "softcap": 1.5, "sinks": torch.tensor([0.7, -1.2]), "rotary": 12,
    "page_size": 7, "value_dim": 11, "int8": True,
}  # fmt: skip
LENGTHS = (37, 0, 63)


@pytest.fixture(autouse=True)
def _small_splits():
    with small_splits():
        yield


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    "option",
    [pytest.param(x, marks=pytest.mark.slow if OPTIONS[x] else ()) for x in OPTIONS],
)
def test_every_option(device, backend, option):
    options = placed(OPTIONS.get(option, {}), device)
    judge(call(LENGTHS, 3, int8=True, device=device, **options), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype",
    [pytest.param(x, marks=pytest.mark.slow if x == torch.float64 else ()) for x in DTYPES],
    ids=str,
)
def test_all_options_in_any_dtype(device, backend, dtype):
    judge(call(LENGTHS, 3, dtype=dtype, device=device, **placed(ALL, device)), backend)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_small_and_large_values_in_any_dtype(device, backend, dtype):
    """Weights times a scale would be nothing in float16."""
    for size in (1e-3, 1e3):
        one = call((37,), dtype=dtype, device=device, int8=True, scale=0.25 / size)
        tokens = {name: one.options[name] * size for name in ("key", "value")}
        scales = {name: one.options[name] * size for name in SCALES}
        judge(dataclasses.replace(one, options=one.options | tokens | scales), backend)


# ---- what is stored


def stored(x, backend):
    """The integers and scales of rows ``(T, D)``, as keys or values of an empty cache."""
    x = x[None, :, None]
    shape = (1, x.shape[1], 1, x.shape[3])
    caches = [torch.full(shape, 99, dtype=torch.int8, device=x.device) for _ in range(2)]
    scales = [torch.full(shape[:3], torch.nan, device=x.device) for _ in range(2)]
    fastlm.attention_with_kv_cache(
        x, *caches, key=x, value=x, cache_seqlens=0, k_scale=scales[0], v_scale=scales[1],
        backend=backend,
    )  # fmt: skip
    assert torch.equal(*caches)
    assert_equal(scales[:1], scales[1:])
    return caches[0][0, :, 0], scales[0][0, :, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_nearest_integer_is_stored_and_of_two_the_even_one(device, backend):
    halves = [127, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -126.5, 126.5, 0.25, -0.75]
    x = torch.tensor([halves, [-2 * value for value in halves], [0.0] * len(halves)])
    integers, scales = stored(x.to(device), backend)
    rounded = [127, 0, 2, 2, 4, 0, -2, -126, 126, 0, -1]
    assert integers.tolist() == [rounded, [-value for value in rounded], [0] * len(halves)]
    assert scales.tolist() == [1, 2, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_is_not_finite_is_stored_as_nan(device, backend):
    x = torch.ones(4, 8, device=device)
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        x[row, 3] = value
    integers, scales = stored(x, backend)
    assert integers.tolist() == [[0] * 8] * 3 + [[127] * 8]
    assert scales.isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_every_backend_stores_the_same(device, backend, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 16, generator=generator) * torch.logspace(-46, 38, 60)[:, None]
    x = x.to(device, dtype)
    (integers, scales), (other_integers, other_scales) = stored(x, BACKENDS[0]), stored(x, backend)
    assert torch.equal(other_integers, integers)
    assert_equal([other_scales], [scales])
    numbers = scales.isfinite()
    assert numbers.sum() > 20
    error = (integers.double() * scales.double()[:, None] - x.double())[numbers].abs()
    # a scale below 2^-126 has fewer bits than others, and 1 / 254 more of it is what a ratio is off
    allowed = scales[numbers].double() * (0.5 + 127 * 2.0**-22) + 64 * 2.0**-149
    assert (error <= allowed[:, None]).all()


@pytest.mark.parametrize(
    ("stored_as", "least", "most"),
    [(torch.int8, 0.006, 0.010), (torch.bfloat16, 0.0018, 0.0030), (torch.float16, 0, 0.0004)],
    ids=str,
)
def test_error_of_storage(stored_as, least, most, device):
    """What docs/attention.md says that 8 bits cost on normal numbers, and what 16 do."""
    errors = []
    for head_dim in (64, 128):
        one = call((1000,), 1, 8, 2, head_dim, appends=False, capacity=1000, device=device)
        exact, *_ = one("torch")
        if stored_as == torch.int8:
            kept = call(
                (1000,), 1, 8, 2, head_dim, appends=False, capacity=1000, device=device, int8=True
            )
        else:
            kept = one.holding(*(x.to(stored_as).float() for x in one.written.values()))
        out, *_ = kept("torch")
        errors.append(float((out - exact).norm() / exact.norm()))
    assert all(least <= error <= most for error in errors), errors


# ---- rows depend on nothing else


@pytest.mark.parametrize("page_size", [pytest.param(0, marks=pytest.mark.slow), 7])
def test_a_row_has_the_bits_it_has_alone(device, page_size):
    one = call(LENGTHS, 2, device=device, **placed(ALL, device) | {"page_size": page_size})
    out, lse, *_ = one("triton")
    for row in range(len(LENGTHS)):
        alone, alone_lse, *_ = one.of_row(row)("triton")
        assert torch.equal(alone, out[row : row + 1])
        assert torch.equal(alone_lse, lse[row : row + 1])


def test_pages_change_no_bit(device):
    one = call(LENGTHS, 2, device=device, page_size=7, rotary=16, int8=True)
    assert_equal(one.whole()("triton")[:2], one("triton")[:2])


@pytest.mark.slow
def test_token_by_token_stores_what_a_chunk_stores(device):
    whole = call((0,), 4, device=device, rotary=16, capacity=4, int8=True)
    expected = whole("triton")
    written = {name: x.clone() for name, x in whole.written.items()}
    outs = []
    for t in range(4):
        tokens = {name: whole.options[name][:, t : t + 1] for name in ("key", "value")}
        outs.append(
            fastlm.attention_with_kv_cache(
                whole.query[:, t : t + 1], cache_seqlens=t, backend="triton",
                **{**whole.options, **tokens, **written},
            )
        )  # fmt: skip
    assert_equal(written.values(), expected[2:])
    torch.testing.assert_close(torch.cat(outs, 1), expected[0])


# ---- which bytes are touched


@pytest.mark.parametrize("name", [pytest.param("k_scale", marks=pytest.mark.slow), "v_scale"])
def test_layout_changes_no_bit(device, name):
    one = call((7, 12), device=device, capacity=20, int8=True)
    expected = one("triton")
    for layout, view in layouts(one.written[name]):
        written = one.tensors() | {name: view}
        out, lse = fastlm.attention_with_kv_cache(
            **{**one.options, **written}, cache_seqlens=one.seqlens, return_lse=True,
            backend="triton",
        )  # fmt: skip
        got = (out, lse, *(written[name] for name in one.written))
        assert all(same(a, b).all() for a, b in zip(got, expected, strict=True)), layout


@interpreted_only
@pytest.mark.parametrize("end", ["back", pytest.param("front", marks=pytest.mark.slow)])
@pytest.mark.parametrize("page_size", [pytest.param(0, marks=pytest.mark.slow), 7])
def test_nothing_outside_is_touched(end, page_size):
    one = call(
        (33, 0, 17), 3, value_dim=11, head_dim=13, capacity=36, page_size=page_size, rotary=8,
        int8=True,
    )  # fmt: skip

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
@pytest.mark.parametrize("name", SCALES)
def test_strides_beyond_32_bits(name):
    one = call((3,), heads=2, kv_heads=2, head_dim=4, capacity=8, int8=True)
    expected = one("triton")
    for dim in range(3):
        written = one.tensors()
        strides = [*written[name].stride()]
        strides[dim] = 2**31 + 64
        far = sparse(written[name].shape, strides, torch.float32).copy_(written[name])
        written[name] = far
        out = fastlm.attention_with_kv_cache(
            **{**one.options, **written}, cache_seqlens=one.seqlens, backend="triton"
        )
        assert torch.equal(out, expected[0])
        assert_equal((written[name] for name in one.written), expected[2:])


@pytest.mark.parametrize("page_size", [0, 10])
def test_a_row_that_does_not_fit_writes_nothing(device, page_size):
    fitting = call((0, 5), 3, device=device, page_size=page_size, int8=True)
    one = dataclasses.replace(fitting, lengths=[98, 5])
    out, lse, *written = one("triton")
    assert out[0].isnan().all()
    assert lse[0].isnan().all()
    expected = call((0, 5), 3, device=device, page_size=page_size, int8=True)("triton")
    assert torch.equal(out[1], expected[0][1])
    for got, before in zip(written, one.written.values(), strict=True):
        # what is left but three tokens of the other row
        assert (~same(got, before)).flatten(3 if got.dim() == 4 else 2).any(-1).sum() == 3


# ---- inside torch


def test_compiles_whole_and_writes_in_place(device):
    one = call((5, 5), device=device, rotary=16, int8=True)
    expected = one("triton")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(query, written, seqlens, rest):
        return fastlm.attention_with_kv_cache(
            query * 1.0, cache_seqlens=seqlens, backend="triton", **rest, **written
        )

    written = {name: x.clone() for name, x in one.written.items()}
    rest = {name: x for name, x in one.options.items() if name not in SCALES}
    with torch.no_grad():
        out = step(one.query, written, one.seqlens, rest)
    assert torch.equal(out, expected[0])
    assert_equal(written.values(), expected[2:])


def test_the_operator_is_registered_as_torch_wants_it(device):
    one = call((5, 9), device=device, page_size=16, int8=True)
    # opcheck compares tensors, and NaN is not NaN
    cleared = one.holding(*(x.nan_to_num(0) for x in one.written.values()))
    operator = torch.ops.fastlm.attention_with_kv_cache_forward.default
    torch.library.opcheck(operator, (*cleared.arguments(), "triton"))


def test_autocast_decides_where_integers_cannot(device):
    one = call((5,), dtype=torch.bfloat16, device=device, int8=True)
    wide = {name: one.options[name].float() for name in ("key", "value")}
    with torch.autocast(device, torch.bfloat16), torch.no_grad():
        out = fastlm.attention_with_kv_cache(
            one.query.float(), cache_seqlens=5, **{**one.options, **one.written, **wide}
        )
    assert torch.equal(out, one("auto")[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_checked_runs_beside_it(device, backend, dtype):
    one = call(LENGTHS, 2, dtype=dtype, device=device, rotary=16, int8=True)
    expected = one(backend)
    with fastlm.checked():
        assert_equal(one(backend), expected)


@pytest.mark.parametrize(
    ("harm", "name"),
    [
        (lambda k, v, ks, vs: k[0, 37, 0, 2].sub_(2), "k_cache"),
        (lambda k, v, ks, vs: v[2, 63:65].bitwise_not_(), "v_cache"),
        (lambda k, v, ks, vs: ks[1, 0].mul_(1.0001), "k_scale"),
        (lambda k, v, ks, vs: vs[0, 36].mul_(1.0001), "v_scale"),
        (lambda k, v, ks, vs: v[0, 40].zero_(), "v_cache"),
        (lambda k, v, ks, vs: ks[0, 40].zero_(), "k_scale"),
    ],
    ids=["an integer", "integers", "a scale", "an old scale", "a token more", "a scale more"],
)
def test_checked_catches_what_is_stored_wrong(harm, name, device, monkeypatch):
    right = kernels.forward

    def wrong(query, *args):
        results = right(query, *args)
        harm(*args[:4])
        return results

    one = call(LENGTHS, 2, device=device, int8=True)
    monkeypatch.setattr(kernels, "forward", wrong)
    with fastlm.checked(), pytest.raises(fastlm.KernelMismatch, match=f"argument {name}"):
        one("triton")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k_scale": None}, ValueError, "k_scale must come with int8 caches, got None"),
        ({"v_scale": None}, ValueError, "v_scale must come with int8 caches, got None"),
        ({"k_scale": torch.zeros(2, 100, 1)}, ValueError, r"k_scale must have shape \(2, 100, 2\)"),
        ({"v_scale": torch.zeros(2, 100, 2).half()}, TypeError, "v_scale must be one of float32"),
        ({"v_cache": torch.zeros(2, 100, 2, 16)}, TypeError, "v_cache must have the dtype of k_c"),
        ({"k_scale": torch.zeros(2, 1, 2).expand(2, 100, 2)}, ValueError, "k_scale must have memo"),
        ({"v_scale": torch._neg_view(torch.zeros(2, 100, 2))}, ValueError, "v_scale must be no vi"),
        ({"v_scale": "k_scale"}, ValueError, "v_scale must be another tensor than k_scale"),
        ({"key": torch.zeros(2, 2, 2, 16).half()}, TypeError, "key must have the dtype of query"),
        (
            {name: torch.zeros(2, 100, 2, 16) for name in ("k_cache", "v_cache")},
            ValueError, "k_scale must come with int8 caches, got float32 caches",
        ),
        ({"k_scale": torch.zeros(2, 100, 2).requires_grad_()}, ValueError, "k_scale must not"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)  # fmt: skip
def test_wrong_arguments_are_named(changes, error, message):
    one = call((5, 9), 2, heads=4, kv_heads=2, int8=True)
    arguments = {**one.options, **one.tensors()}
    for name, value in changes.items():
        arguments[name] = arguments[value] if isinstance(value, str) else value
    with pytest.raises(error, match=f"attention_with_kv_cache: {message}"):
        fastlm.attention_with_kv_cache(**arguments, cache_seqlens=5)


@pytest.mark.parametrize("seeds", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_random_calls(device, seeds):
    generator = torch.Generator().manual_seed(5)

    def pick(*options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    calls = []
    for seed in range(seeds):
        head_dim = pick(4, 8, 13, 16)
        calls.append(
            call(
                [pick(0, 3, 16, 33), pick(1, 29)], pick(1, 2, 5), 2 * pick(1, 2, 9), 2, head_dim,
                pick(torch.float32, torch.bfloat16), device, capacity=40, seed=seed, int8=True,
                page_size=pick(0, 1, 7, 16), rotary=pick(0, 4), window_size=pick(None, 1, 5, 100),
                softcap=pick(None, 0.5), scale=pick(None, -math.pi),
            )
        )  # fmt: skip
    judge_pooled(calls, "triton")
