"""use_as_sdpa: torch's registry, torch's flash-attention operators, and back again exactly."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.attention import blocks
from torch.nn import attention
from torch.nn.attention import SDPBackend, _registry

import fastlm
from fastlm.compat import provider
from fastlm.kernels import attention as kernels
from fastlm.testing import assert_all_as_accurate, run

ON_GPU = torch.cuda.is_available()
KEY = "CUDA" if ON_GPU else "CPU"
FLASH = int(SDPBackend.FLASH_ATTENTION)
operator = torch.ops.aten._scaled_dot_product_flash_attention.default
gradient = torch.ops.aten._scaled_dot_product_flash_attention_backward.default


def state():
    return (
        attention.current_flash_attention_impl(),
        torch._C._get_sdp_priority_order(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch._C._dispatch_dump(provider._FORWARD),
        torch._C._dispatch_dump(provider._BACKWARD),
    )


# ---- the registry


@pytest.fixture
def registry(monkeypatch):
    """torch's registry, whose activations only say that they happened."""
    monkeypatch.setattr(_registry, "_FLASH_ATTENTION_IMPLS", dict(_registry._FLASH_ATTENTION_IMPLS))
    monkeypatch.setattr(_registry, "_FLASH_ATTENTION_ACTIVE", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    log = []

    def activation(name):
        def activate():
            log.append(f"+{name}")
            return SimpleNamespace(remove=lambda: log.append(f"-{name}"))

        return activate

    monkeypatch.setattr(provider, "override", activation("fastlm"))
    attention.register_flash_attention_impl("other", register_fn=activation("other"))
    return log


def test_activates_and_undoes(registry):
    before = state()
    with fastlm.use_as_sdpa():
        assert attention.current_flash_attention_impl() == "fastlm"
        assert "fastlm" in attention.list_flash_attention_impls()
        assert torch._C._get_sdp_priority_order()[0] == FLASH
    assert registry == ["+fastlm", "-fastlm"]
    assert state() == before


def test_takes_effect_without_a_with_block_and_closes_once(registry):
    before = state()
    use = fastlm.use_as_sdpa()
    assert attention.current_flash_attention_impl() == "fastlm"
    use.close()
    use.close()
    assert registry == ["+fastlm", "-fastlm"]
    assert state() == before


def test_puts_back_what_was_active_and_chosen(registry):
    attention.activate_flash_attention_impl("other")
    order = torch._C._get_sdp_priority_order()
    torch._C._set_sdp_priority_order(order[::-1])
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        before = state()
        with fastlm.use_as_sdpa():
            assert torch.backends.cuda.flash_sdp_enabled()
            with fastlm.use_as_sdpa():
                assert torch._C._get_sdp_priority_order()[0] == FLASH
            assert attention.current_flash_attention_impl() == "fastlm"
        assert state() == before
        assert registry == ["+other", "-other", "+fastlm", "-fastlm", "+other"]
    finally:
        torch._C._set_sdp_priority_order(order)
        torch.backends.cuda.enable_flash_sdp(True)


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (1, 2, 0), (0, 2, 1)], ids=str)
def test_uses_end_in_any_order(registry, order):
    attention.activate_flash_attention_impl("other")
    before = state()
    uses = [fastlm.use_as_sdpa() for _ in order]
    inside = state()
    for position in order[:-1]:
        uses[position].close()
        uses[position].close()
        assert attention.current_flash_attention_impl() == "fastlm"
        assert state() == inside
    uses[order[-1]].close()
    assert state() == before


def test_a_later_use_takes_its_place_again(registry):
    before = state()
    with fastlm.use_as_sdpa():
        attention.activate_flash_attention_impl("other")
        with fastlm.use_as_sdpa():
            assert attention.current_flash_attention_impl() == "fastlm"
    assert state() == before


def test_leaves_what_somebody_else_activated(registry):
    with fastlm.use_as_sdpa():
        attention.activate_flash_attention_impl("other")
    assert attention.current_flash_attention_impl() == "other"
    assert registry == ["+fastlm", "-fastlm", "+other"]


def test_a_failure_changes_nothing(registry, monkeypatch):
    attention.activate_flash_attention_impl("other")
    before = state()

    def fail():
        raise OSError("no kernel")

    monkeypatch.setattr(provider, "override", fail)
    with pytest.raises(OSError, match="no kernel"):
        fastlm.use_as_sdpa()
    assert state() == before


def test_says_what_is_missing(monkeypatch):
    before = state()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="use_as_sdpa: torch must see a CUDA device, got "):
        fastlm.use_as_sdpa()
    monkeypatch.delattr(attention, "restore_flash_attention_impl")
    with pytest.raises(RuntimeError, match="registry of flash-attention implementations"):
        fastlm.use_as_sdpa()
    assert state() == before


# ---- the operators


@pytest.fixture
def torchs(monkeypatch):
    """Calls of torch's own kernels; on a CPU, which has none, of others by torch's operators."""
    calls = []
    if ON_GPU:
        kernel = torch.library.get_kernel

        def get_kernel(name, key):
            found = kernel(name, key)

            def call_boxed(*args, **kwargs):
                calls.append(name)
                return found.call_boxed(*args, **kwargs)

            return SimpleNamespace(call_boxed=call_boxed)

        monkeypatch.setattr(torch.library, "get_kernel", get_kernel)
        yield calls
        return

    def forward(q, k, v, dropout_p=0.0, is_causal=False, debug_mask=False, *, scale=None):
        calls.append(provider._FORWARD)
        if q.shape[1] % k.shape[1]:
            raise RuntimeError("key has more heads")
        out, lse = torch._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, scale=scale
        )
        seed = torch.zeros(2, dtype=torch.uint64)
        return out, lse, None, None, q.shape[2], k.shape[2], seed, seed[0], q.new_empty(0)

    def backward(
        dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, seed, offset,
        *, scale=None,
    ):  # fmt: skip
        calls.append(provider._BACKWARD)
        assert cum_q is cum_k is None
        assert (max_q, max_k) == (q.shape[2], k.shape[2])
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, is_causal, scale=scale
        )

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl(provider._FORWARD, forward, KEY)
        library.impl(provider._BACKWARD, backward, KEY)
        yield calls


@pytest.fixture
def ours(torchs):
    """The operators overridden; blocks of 16 as in the other tests of kernels."""
    active = provider.override(KEY)
    with blocks(16, 16):
        yield active
    active.remove()


def inputs(device, length=20, keys=None, heads=2, kv_heads=2, dtype=torch.bfloat16, inside=True):
    """``(B, H, T, D)``, heads inside the length in memory or before it."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(length, heads), (keys or length, kv_heads), (keys or length, kv_heads)]
    tensors = []
    for size, count in shapes:
        x = torch.randn(1, size, count, 16, generator=generator).to(device, dtype).transpose(1, 2)
        tensors.append(x if inside else x.contiguous())
    return tensors


def attend(query, key, value, *rest, **options):
    return operator(query, key, value, *rest, **options)[0]


def lower_right(query, key, value, scale=None):
    """What the operator means by causal."""
    shape = query.shape[2], key.shape[2]
    mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(shape[1] - shape[0])
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)


@pytest.mark.parametrize(
    ("sizes", "scale"),
    [
        ({"inside": False}, None),
        ({"keys": 27, "kv_heads": 1}, 0.4),
        ({"length": 1, "keys": 20, "dtype": torch.half}, None),
    ],
    ids=str,
)
def test_operators_compute_causal_attention_by_ours(device, torchs, ours, sizes, scale):
    tensors = inputs(device, **sizes)
    # the last case shows that a single query needs no is_causal
    is_causal = sizes.get("length") != 1
    actual = run(lambda *x: attend(*x, 0.0, is_causal, scale=scale), *tensors)
    assert torchs == []
    plain = run(lower_right, *tensors, scale=scale)
    truth = run(lower_right, *tensors, scale=scale, dtype=torch.float64)
    assert_all_as_accurate("operator", actual, plain=plain, truth=truth)


@pytest.mark.parametrize("inside", [True, False])
def test_outputs_are_what_torchs_operators_promise(device, ours, inside):
    tensors = inputs(device, 18, 20, inside=inside)
    outputs = operator(*tensors, 0.0, True)
    promised = operator(*(x.to("meta") for x in tensors), 0.0, True)
    assert len(outputs) == len(promised) == 9
    for got, want in zip(outputs, promised, strict=True):
        if not isinstance(want, torch.Tensor):
            assert got == want
            continue
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
        assert got.device == tensors[0].device
    out, lse = outputs[:2]
    scores = (tensors[0].double() @ tensors[1].double().mT) * 16**-0.5
    mask = torch.ones(18, 20, dtype=torch.bool, device=device).tril(2)
    want = scores.masked_fill(~mask, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse.double(), want, rtol=1e-5, atol=1e-5)
    arguments = (*tensors, out, lse, None, None, 18, 20, 0.0, True, *outputs[6:8])
    for got, x in zip(gradient(out, *arguments), tensors, strict=True):
        assert (got.shape, got.dtype, got.stride()) == (x.shape, x.dtype, x.stride())


CALLS = {
    "not causal": lambda x: operator(*x),
    "dropout": lambda x: operator(*x, 0.1, True),
}
if not ON_GPU:  # there torch's own kernels refuse these
    CALLS["debug mask"] = lambda x: operator(*x, 0.0, True, True)
    CALLS["float32"] = lambda x: operator(*(y.float() for y in x), 0.0, True)


@pytest.mark.parametrize("name", CALLS)
def test_the_rest_runs_on_the_kernels_that_were_there(device, torchs, ours, name):
    leaves = [x.requires_grad_() for x in inputs(device, 17)]
    outputs = CALLS[name](leaves)
    assert torchs == [provider._FORWARD]
    if name in ("not causal", "dropout"):
        outputs[0].sum().backward()
        assert torchs == [provider._FORWARD, provider._BACKWARD]
        assert all(x.grad is not None for x in leaves)


def test_what_does_not_fit_is_refused_by_the_kernels_that_were_there(device, torchs, ours):
    query, key, value = inputs(device)
    with pytest.raises(RuntimeError, match="heads"):
        operator(query[:, :1], key, value, 0.0, True)
    assert torchs == [provider._FORWARD]


@pytest.mark.parametrize("forward_is_ours", [True, False])
def test_either_backward_takes_the_forward_of_the_other(device, torchs, forward_is_ours):
    tensors = inputs(device)
    dout = torch.randn_like(tensors[0])

    def grads(function, dtype, ours_during_forward, ours_during_backward):
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        with override(ours_during_forward):
            out = function(*leaves)
        with override(ours_during_backward):
            return torch.autograd.grad(out, leaves, dout.to(dtype))

    @contextlib.contextmanager
    def override(is_on):
        active = provider.override(KEY) if is_on else None
        yield
        if active is not None:
            active.remove()

    def causal(*leaves):
        return attend(*leaves, 0.0, True)

    mixed = grads(causal, torch.bfloat16, forward_is_ours, not forward_is_ours)
    plain = grads(lower_right, torch.bfloat16, False, False)
    truth = grads(lower_right, torch.float64, False, False)
    assert_all_as_accurate("mixed", mixed, plain=plain, truth=truth)
    assert len(torchs) == (0 if ON_GPU else 1)


def test_removed_kernels_are_gone(device, torchs):
    dumps = [torch._C._dispatch_dump(name) for name in (provider._FORWARD, provider._BACKWARD)]
    active = provider.override(KEY)
    assert torch._C._dispatch_dump(provider._FORWARD) != dumps[0]
    active.remove()
    for name, dump in zip((provider._FORWARD, provider._BACKWARD), dumps, strict=True):
        assert torch._C._dispatch_dump(name) == dump


def test_ours_are_checked_against_torchs(device, torchs, ours, monkeypatch):
    """Were the oracle served by ours, it would compare them with themselves, without end."""
    tensors = inputs(device)
    with provider._ours_running():
        operator(*tensors, 0.0, True)
    assert torchs == [provider._FORWARD]
    with fastlm.checked():
        attend(*(x.requires_grad_() for x in tensors), 0.0, True).sum().backward()
        right = kernels.forward
        monkeypatch.setattr(kernels, "forward", lambda *x: [1.01 * y for y in right(*x)])
        with pytest.raises(fastlm.KernelMismatch, match="causal_attention forward on triton"):
            operator(*tensors, 0.0, True)


# A test that a CPU skips would fail its run, so these are not there without a GPU.
if ON_GPU:

    @pytest.mark.parametrize("inside", [True, False])
    def test_torchs_function_runs_ours_on_a_gpu(device, monkeypatch, inside):
        ran = []
        launch = provider._ours_running
        monkeypatch.setattr(provider, "_ours_running", lambda: ran.append(1) or launch())
        tensors = inputs(device, 300, kv_heads=2, inside=inside)

        def causal(*x):
            return F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True)

        before, plain = state(), run(causal, *tensors)
        with fastlm.use_as_sdpa():
            actual = run(causal, *tensors)
            assert len(ran) == 2
            compiled = run(torch.compile(causal, backend="inductor"), *tensors)
            assert len(ran) == 4
            with fastlm.checked():
                run(causal, *tensors)
            assert len(ran) == 6
            F.scaled_dot_product_attention(*(x.float() for x in tensors), enable_gqa=True)
            F.scaled_dot_product_attention(*tensors, enable_gqa=True)
            assert len(ran) == 6
        assert state() == before
        run(causal, *tensors)
        assert len(ran) == 6
        truth = run(causal, *tensors, dtype=torch.float64)
        assert_all_as_accurate("sdpa", actual, plain=plain, truth=truth)
        for got, want in zip(compiled, actual, strict=True):
            assert torch.equal(got, want)
