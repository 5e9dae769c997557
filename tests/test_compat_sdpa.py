"""scaled_dot_product_attention means what torch's does, whichever of the two computes it."""

from __future__ import annotations

import contextlib
import inspect
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.host_sync import no_host_sync
from support.layouts import layouts
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import fastlm
from fastlm.compat import sdpa as module
from fastlm.ops.attention import causal_attention
from fastlm.testing import assert_all_as_accurate, run

sdpa = fastlm.scaled_dot_product_attention
OURS = "causal_attention"
TORCHS = "torch.nn.functional.scaled_dot_product_attention"


def inputs(*shapes, dtype=torch.float32, device="cpu"):
    """Query, key and value; of fewer shapes the last is repeated."""
    generator = torch.Generator().manual_seed(0)
    shapes = [*shapes, *[shapes[-1]] * (3 - len(shapes))]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def route(*args, **kwargs):
    return fastlm.explain("scaled_dot_product_attention", *args, **kwargs).route


def assert_is_ours(*args, **options):
    """The call goes to ours, and is as near to the truth as torch's."""
    assert route(*args, **options).to == OURS
    actual = run(sdpa, *args, **options)
    plain = run(F.scaled_dot_product_attention, *args, **options)
    truth = run(F.scaled_dot_product_attention, *args, **options, dtype=torch.float64)
    assert [x.shape for x in actual] == [x.shape for x in plain]
    assert [x.dtype for x in actual] == [x.dtype for x in plain]
    assert_all_as_accurate("sdpa", actual, plain=plain, truth=truth)


def assert_is_torchs(*args, why, **options):
    """The call goes to torch's, for this reason, and gives its bits."""
    found = route(*args, **options)
    assert found.to == TORCHS
    assert why in found.why
    results = []
    for function in (sdpa, F.scaled_dot_product_attention):
        torch.manual_seed(3)
        results.append(run(function, *args, **options))
    for got, want in zip(*results, strict=True):
        assert (got is None and want is None) or torch.equal(got, want)


def test_has_the_signature_of_torchs():
    documented = F.scaled_dot_product_attention.__doc__.partition(") -> Tensor")[0]
    names = [word.strip() for word in documented.partition("(")[2].split(",")]
    parameters = inspect.signature(sdpa).parameters
    ours = [
        name if p.default is p.empty else f"{name}={p.default}" for name, p in parameters.items()
    ]
    assert ours == names
    schema = torch.ops.aten.scaled_dot_product_attention.default._schema
    for argument in schema.arguments:
        is_keyword = parameters[argument.name].kind == inspect.Parameter.KEYWORD_ONLY
        assert is_keyword == argument.kwarg_only, argument.name


@pytest.mark.parametrize(
    "shapes",
    [
        [(2, 4, 33, 16)],
        [(2, 4, 33, 16), (2, 4, 50, 16)],
        [(2, 4, 33, 16), (2, 4, 33, 16), (2, 4, 33, 24)],
        [(5, 33, 16), (5, 40, 16)],
        [(70, 16), (75, 16)],
        [(2, 3, 2, 33, 16)],
        [(2, 1, 3, 2, 33, 16), (2, 1, 3, 2, 34, 16)],
        [(2, 4, 1, 16), (2, 4, 33, 16)],
        [(3, 40, 1, 16), (3, 40, 1, 16)],
    ],
    ids=str,
)
def test_causal_attention_of_any_rank_is_ours(device, shapes):
    assert_is_ours(*inputs(*shapes, device=device), is_causal=True)
    assert_is_ours(*inputs(*shapes, device=device), is_causal=True, scale=0.4)


@pytest.mark.parametrize(
    "shapes",
    [
        [(2, 6, 33, 16), (2, 2, 40, 16)],
        [(2, 6, 33, 16), (2, 6, 40, 16)],
        [(6, 33, 16), (2, 33, 16)],
        [(2, 3, 8, 33, 16), (2, 3, 4, 33, 16)],
    ],
    ids=str,
)
def test_shared_heads_are_ours(device, shapes):
    assert_is_ours(*inputs(*shapes, device=device), is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes(device, dtype):
    shapes = (2, 8, 130, 32), (2, 4, 150, 32)
    assert_is_ours(*inputs(*shapes, dtype=dtype, device=device), is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("scale", [0.4, 0.0, -0.4])
def test_float64_and_any_scale(device, scale):
    tensors = inputs((2, 4, 33, 16), (2, 4, 40, 16), dtype=torch.float64, device=device)
    # of a negative scale torch's fused kernel makes NaN, of a mask it does not
    mask = torch.ones(33, 40, dtype=torch.bool, device=device).tril()
    want = run(F.scaled_dot_product_attention, *tensors, mask, scale=scale)
    for got, expected in zip(run(sdpa, *tensors, is_causal=True, scale=scale), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_a_single_query_without_a_mask_sees_all_keys(device):
    query, key, value = inputs((2, 8, 1, 16), (2, 8, 33, 16), device=device)
    assert_is_ours(query, key, value)
    assert_is_ours(query, key[:, :2], value[:, :2], enable_gqa=True, scale=0.5)
    # is_causal aligns the beginnings: then it sees the first key alone
    assert torch.equal(sdpa(query, key, value, is_causal=True), value[:, :, :1])


def test_biases_of_torch_are_ours_without_their_values(device):
    query, key, value = inputs((2, 4, 33, 16), (2, 4, 50, 16), device=device)
    for bias in (causal_upper_left(33, 50), causal_lower_right(33, 50)):
        assert_is_ours(query, key, value, attn_mask=bias)
    latest = inputs((2, 4, 1, 16), device=device)[0]
    assert_is_ours(latest, key, value, attn_mask=causal_lower_right(1, 50))
    # sizes that are not those of the tensors: torch takes them as they come
    why = "for other lengths"
    assert_is_torchs(query, key, value, attn_mask=causal_lower_right(50, 50), why=why)


def test_keys_past_the_last_query_have_no_gradient(device):
    query, key, value = inputs((1, 2, 5, 8), (1, 2, 9, 8), device=device)
    _, _, dkey, dvalue = run(sdpa, query, key, value, is_causal=True)
    assert dkey.shape == key.shape
    assert not dkey[:, :, 5:].any()
    assert not dvalue[:, :, 5:].any()


MASKS = {
    "bool": torch.rand(2, 4, 9, 12, generator=torch.Generator().manual_seed(1)) < 0.7,
    "bool of a matrix": torch.ones(9, 12, dtype=torch.bool).tril(3),
    "bool of keys": torch.arange(12)[None] < 7,
    "float": torch.randn(1, 4, 9, 12, generator=torch.Generator().manual_seed(2)),
    "float broadcast": torch.randn(9, 1, generator=torch.Generator().manual_seed(2)),
    "all masked rows": torch.ones(9, 12, dtype=torch.bool).tril(-2),
    "all masked": torch.full((9, 12), -torch.inf),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_torchs(device, name):
    tensors = inputs((2, 4, 9, 16), (2, 4, 12, 16), device=device)
    assert_is_torchs(*tensors, MASKS[name].to(device), why="attn_mask is a tensor")


def test_no_value_of_a_mask_is_looked_at(device, monkeypatch):
    query, key, value = inputs((2, 4, 9, 16), (2, 4, 12, 16), device=device)
    reached = []
    monkeypatch.setattr(module, "_torchs_function", lambda *x, **_: reached.append(x[3]))
    mask = torch.ones(9, 12, dtype=torch.bool, device=device).tril()
    with no_host_sync():
        sdpa(query, key, value, mask)
        sdpa(query, key, value, is_causal=True)
    assert reached == [mask]


@pytest.mark.parametrize("is_causal", [False, True])
def test_dropout_is_torchs_and_draws_the_same_numbers(device, is_causal):
    tensors = inputs((2, 4, 9, 16), (2, 4, 9, 16), device=device)
    assert_is_torchs(*tensors, dropout_p=0.5, is_causal=is_causal, why="no dropout")
    torch.manual_seed(0)
    dropped = sdpa(*tensors, dropout_p=0.5, is_causal=is_causal)
    assert not torch.equal(dropped, sdpa(*tensors, is_causal=is_causal))


@pytest.mark.parametrize(
    ("shapes", "options", "why"),
    [
        ([(2, 4, 9, 16)], {}, "not causal"),
        ([(2, 4, 9, 16), (2, 4, 5, 16)], {"is_causal": True}, "more queries than keys"),
        ([(2, 4, 9, 16), (1, 4, 9, 16)], {"is_causal": True}, "leading dimensions differ"),
        ([(2, 4, 9, 16), (2, 1, 9, 16)], {"is_causal": True}, "numbers of heads"),
        ([(2, 4, 9, 16), (4, 9, 16)], {"is_causal": True}, "numbers of dimensions"),
        ([(2, 4, 9, 16), (2, 2, 9, 16), (2, 4, 9, 16)],
         {"is_causal": True, "enable_gqa": True}, "numbers of heads"),
        ([(1, 2, 9, 16)], {"is_causal": True, "attn_mask": torch.eye(9)}, "both"),
        ([(1, 2, 9, 700)], {"is_causal": True}, "head_dim of 1 to"),
        ([(2, 4, 9, 16), (2, 4, 0, 16)], {"is_causal": True}, "more queries than keys"),
        ([(2, 0, 9, 16)], {"is_causal": True}, "no heads"),
    ],
    ids=str,
)  # fmt: skip
def test_what_ours_has_not_is_torchs(device, shapes, options, why):
    assert_is_torchs(*inputs(*shapes, device=device), **options, why=why)


@pytest.mark.parametrize("shape", [(0, 4, 9, 16), (2, 4, 0, 16)], ids=str)
def test_empty_tensors(device, shape):
    tensors = inputs(shape, device=device)
    assert route(*tensors, is_causal=True).to == OURS
    assert sdpa(*tensors, is_causal=True).shape == shape


def test_inputs_reach_ours_as_views(device, monkeypatch):
    reached = []

    def attention(*tensors, scale):
        reached.extend(tensors)
        return causal_attention(*tensors, scale=scale)

    monkeypatch.setattr(module, "causal_attention", attention)
    tensors = inputs((2, 4, 9, 16), (2, 4, 12, 16), device=device)
    fewer = [[x[(0,) * count] for x in tensors] for count in (2, 1, 0)]
    for few in (*fewer, [x.unflatten(0, (2, 1)) for x in tensors]):
        out = sdpa(*few, is_causal=True)
        assert out.shape == few[0].shape
        storages = [x.untyped_storage().data_ptr() for x in few]
        assert [x.untyped_storage().data_ptr() for x in reached[-3:]] == storages
    # heads inside, as a projection leaves them: the result is one block of memory for what follows
    assert sdpa(*tensors, is_causal=True).transpose(1, 2).is_contiguous()


def test_any_layout_gives_the_same_result(device):
    query, key, value = inputs((2, 4, 9, 16), device=device)
    want = sdpa(query, key, value, is_causal=True)
    for name, view in layouts(query):
        torch.testing.assert_close(sdpa(view, key, value, is_causal=True), want, msg=name)


BAD = {
    "no tensor": lambda q: (q, q, [1.0]),
    "vectors": lambda q: (q[0, 0, 0],) * 3,
    "widths": lambda q: (q, q[..., :8], q),
    "heads": lambda q: (q, q[:, :3], q[:, :3]),
    "dtypes": lambda q: (q, q.double(), q),
    "integers": lambda q: (q.int(),) * 3,
    "bias and is_causal": lambda q: (q, q, q, causal_upper_left(9, 9), 0.0, True),
    "mask of another size": lambda q: (q, q, q, torch.ones(7, 9, dtype=torch.bool)),
    "probability": lambda q: (q, q, q, None, 2.0, True),
    "probability of no number": lambda q: (q, q, q, None, None, True),
    "flag": lambda q: (q, q, q, None, 0.0, 1),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses_what_torch_refuses_in_torchs_words(name):
    arguments = BAD[name](inputs((2, 4, 9, 16))[0])
    with pytest.raises((RuntimeError, TypeError, ValueError)) as torchs:
        F.scaled_dot_product_attention(*arguments)
    with pytest.raises(type(torchs.value)) as ours:
        sdpa(*arguments)
    assert str(ours.value) == str(torchs.value)


@pytest.mark.parametrize("options", [{"enable_gqa": True}, {"enable_gqa": 1}, {"scale": "1"}])
def test_refuses_options_that_torch_refuses(options):
    query, key, _ = inputs((2, 4, 9, 16), (2, 3, 9, 16))
    for function in (sdpa, F.scaled_dot_product_attention):
        with pytest.raises((RuntimeError, TypeError)):
            function(query, key, key, is_causal=True, **options)
    with pytest.raises(TypeError, match="positional"):
        sdpa(query, query, query, None, 0.0, True, 0.5)


def test_compiled_calls_give_the_same(device):
    def function(query, key, value, mask):
        latest = sdpa(query[:, :, :1], key, value, enable_gqa=True)
        masked = sdpa(query, key, value, mask, enable_gqa=True)
        return sdpa(query, key, value, is_causal=True, enable_gqa=True, scale=0.2) + latest, masked

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="eager")
    for length, keys in ((9, 12), (13, 30)):
        tensors = inputs((2, 4, length, 16), (2, 2, keys, 16), device=device)
        mask = torch.ones(length, keys, dtype=torch.bool, device=device).tril(2)
        results = run(compiled, *tensors, mask), run(function, *tensors, mask)
        for position, (got, want) in enumerate(zip(*results, strict=True)):
            # gradients of the three calls may be added in another order
            exact = {"rtol": 0, "atol": 0} if position < 2 else {}
            torch.testing.assert_close(got, want, **exact)


def test_autocast_casts_as_for_torchs(device):
    tensors = inputs((2, 4, 40, 16), device=device)
    truth = F.scaled_dot_product_attention(*(x.bfloat16().double() for x in tensors), None, 0, True)
    mixed = (tensors[0], tensors[1].bfloat16(), tensors[2].half())
    with torch.autocast(device, torch.bfloat16):
        assert route(*tensors, is_causal=True).to == OURS
        got = sdpa(*tensors, is_causal=True)
        plain = F.scaled_dot_product_attention(*tensors, is_causal=True)
        assert sdpa(*mixed, is_causal=True).dtype == torch.bfloat16
        wide = [x.double() for x in tensors]
        assert sdpa(*wide, is_causal=True).dtype == torch.float64
    assert got.dtype == plain.dtype == torch.bfloat16
    assert_all_as_accurate("autocast", [got], plain=[plain], truth=[truth])
    with pytest.raises(RuntimeError, match="same dtype"):
        sdpa(*mixed, is_causal=True)


def test_transforms_of_torch_are_torchs(device):
    tensors = inputs((3, 2, 4, 9, 16), device=device)

    def causal(function):
        return lambda *x: function(*x, is_causal=True)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        got, want = (
            torch.func.vmap(causal(f))(*tensors) for f in (sdpa, F.scaled_dot_product_attention)
        )
    assert torch.equal(got, want)
    one = [x[0] for x in tensors]
    loss = [
        torch.func.grad(lambda *x, f=f: f(*x, is_causal=True).square().sum())(*one)
        for f in (sdpa, F.scaled_dot_product_attention)
    ]
    assert torch.equal(*loss)


def test_subclasses_are_torchs():
    asked = []

    class Telling(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            asked.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    query, key, value = inputs((2, 4, 9, 16))
    sdpa(query, key.as_subclass(Telling), value, is_causal=True)
    assert F.scaled_dot_product_attention in asked


def test_nested_tensors_are_torchs():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
        query = torch.nested.nested_tensor([torch.randn(4, n, 16) for n in (3, 5)])
    got, want = (f(query, query, query) for f in (sdpa, F.scaled_dot_product_attention))
    for x, y in zip(got.unbind(), want.unbind(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("shape", [(9, 16), (4, 9, 16), (2, 4, 9, 16), (2, 3, 4, 9, 16)], ids=str)
def test_changing_the_result_in_place_is_never_a_wrong_gradient(device, shape):
    query = inputs(shape, device=device)[0].requires_grad_()
    torchs = F.scaled_dot_product_attention(query, query, query, is_causal=True)
    (want,) = torch.autograd.grad(2 * torchs.square().sum(), query)
    doubled = sdpa(query, query, query, is_causal=True).square_().mul_(2)
    try:
        (got,) = torch.autograd.grad(doubled.sum(), query)
    except RuntimeError as error:
        assert "inplace" in str(error)
    else:
        torch.testing.assert_close(got, want)
    out = sdpa(*[query.detach()] * 3, is_causal=True)
    assert torch.equal(out * 2, out.mul_(2))


def test_a_mode_of_torch_changes_no_route(device):
    tensors = inputs((2, 4, 9, 16), (2, 4, 12, 16), device=device)
    with torch.device(device):
        assert route(*tensors, is_causal=True).to == OURS
        assert route(*tensors).to == TORCHS


def test_other_devices_are_torchs():
    query = torch.empty(2, 4, 9, 16, device="meta")
    assert route(query, query, query, is_causal=True).to == TORCHS
    assert sdpa(query, query, query, is_causal=True).is_meta


def test_explain_says_where_a_call_goes_in_a_sentence():
    query, key, value = inputs((2, 4, 9, 16))
    explained = fastlm.explain(
        "scaled_dot_product_attention", query.requires_grad_(), key, value, is_causal=True
    )
    assert list(explained.steps) == ["forward", "backward"]
    assert str(explained).splitlines()[:2] == [
        "scaled_dot_product_attention runs causal_attention: it is causal",
        "causal_attention forward: torch",
    ]
    explained = fastlm.explain("scaled_dot_product_attention", query, key, value, dropout_p=0.1)
    assert str(explained) == (
        f"scaled_dot_product_attention runs {TORCHS}: "
        "causal_attention has no dropout, and dropout_p is not 0"
    )
    assert fastlm.explain("causal_attention", query, key, value).route is None
    with pytest.raises(RuntimeError, match="same dtype"):
        fastlm.explain("scaled_dot_product_attention", query, key.double(), value)


@pytest.mark.parametrize("checking", [False, True])
def test_can_take_the_place_of_torchs(device, monkeypatch, checking):
    tensors = inputs((2, 4, 9, 16), device=device)
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True, device=device)
    x = torch.randn(2, 9, 32, device=device)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(9, device=device)
    calls = (
        lambda: F.scaled_dot_product_attention(*tensors),
        lambda: F.scaled_dot_product_attention(*tensors, is_causal=True),
        lambda: layer(x),
        lambda: layer(x, mask, is_causal=True),
    )
    want = [call() for call in calls]
    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    with fastlm.checked() if checking else contextlib.nullcontext():
        for call, wanted in zip(calls, want, strict=True):
            torch.testing.assert_close(call(), wanted)


class Named(torch.Tensor):
    pass


def of_tensors_that_have_their_own_functions():
    query = torch.randn(2, 4, 9, 16)
    yield query.as_subclass(Named)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
        yield torch.nested.nested_tensor([torch.randn(4, n, 16) for n in (3, 5)])
    parts = [torch.randn(n, 4, 16) for n in (3, 5)]
    yield torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)


def test_explain_says_where_tensors_go_that_have_their_own_functions(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("explain ran torch's function")

    monkeypatch.setattr(module, "_torchs_function", fail)
    for query in of_tensors_that_have_their_own_functions():
        for options in ({}, {"is_causal": True}):
            explained = fastlm.explain(
                "scaled_dot_product_attention", query, query, query, **options
            )
            assert explained.route.to == TORCHS
            assert explained.route.why == "a tensor is no plain strided one"
            assert not explained.steps
    plain = torch.randn(2, 4, 9, 16)
    assert route(plain, plain, plain, torch.ones(9, 9).as_subclass(Named)).to == TORCHS


def test_checked_compares_what_is_ours(device, monkeypatch):
    tensors = [x.requires_grad_() for x in inputs((2, 4, 9, 16), device=device)]
    with fastlm.checked():
        sdpa(*tensors, is_causal=True).sum().backward()
        monkeypatch.setattr("fastlm.ops.reference.attention.truth_forward", lambda *x: x[:2])
        with pytest.raises(fastlm.KernelMismatch):
            sdpa(*(x.detach() for x in tensors), is_causal=True)


def test_importing_changes_nothing_of_torch():
    program = textwrap.dedent("""
        import sys, torch, torch.nn.attention as registry, torch.nn.functional as F
        def state():
            order = torch._C._get_sdp_priority_order()
            names = registry.list_flash_attention_impls(), registry.current_flash_attention_impl()
            return F.scaled_dot_product_attention, order, names
        before = state()
        import fastlm.functional, fastlm.compat.flash_attn, fastlm.compat.provider
        print(state() == before, "torch._dynamo" in sys.modules)
    """)
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"], done.stderr
