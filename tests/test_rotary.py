"""Rotary position embedding against complex multiplication."""

from __future__ import annotations

import pytest
import torch
from support.layouts import layouts
from support.pointwise import KERNELS, assert_agrees, assert_same_for_every_subset, judged

import fastlm

BACKENDS = ["triton", "cuda", "torch", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# B, T, H, G, D, R
SHAPES = [(1, 1, 1, 1, 2, 2), (2, 5, 4, 2, 8, 8), (3, 7, 3, 1, 10, 6), (1, 33, 2, 2, 64, 64)]


def inputs(shape, dtype=torch.float32, device="cpu", per_sequence=False):
    batch, length, heads, kv_heads, head_dim, channels = shape
    query = torch.randn(batch, length, heads, head_dim, dtype=torch.float64).to(device, dtype)
    key = torch.randn(batch, length, kv_heads, head_dim, dtype=torch.float64).to(device, dtype)
    leading = (batch, length) if per_sequence else (length,)
    angles = 3 * torch.randn(*leading, channels // 2, dtype=torch.float64)
    return query, key, angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def definition(x, cos, sin, interleaved):
    """Multiply the pairs, as complex numbers, by cos + i sin."""
    pairs = cos.shape[-1]
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if interleaved:
        complex_x = torch.complex(turned[..., 0::2], turned[..., 1::2])
    else:
        complex_x = torch.complex(turned[..., :pairs], turned[..., pairs:])
    y = complex_x * torch.complex(cos, sin).to(complex_x.dtype)[..., None, :]
    parts = (y.real, y.imag)
    turned = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat((turned, rest), -1)


@pytest.mark.parametrize(("shape", "dtype", "backend"), judged(SHAPES, DTYPES, BACKENDS))
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("per_sequence", [False, True])
def test_agrees_with_complex_multiplication(
    shape, dtype, per_sequence, interleaved, backend, device
):
    query, key, cos, sin = inputs(shape, dtype, device, per_sequence)

    def op(q, k):
        return fastlm.apply_rotary(q, k, cos, sin, interleaved=interleaved, backend=backend)

    def plain(q, k):
        c, s = cos.to(q.dtype), sin.to(q.dtype)
        return definition(q, c, s, interleaved), definition(k, c, s, interleaved)

    assert_agrees("apply_rotary", op, plain, (query, key))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_are_those_of_the_function(interleaved, backend, device):
    query, key, cos, sin = inputs((2, 3, 2, 1, 6, 4), torch.float64, device)
    assert torch.autograd.gradcheck(
        lambda q, k: fastlm.apply_rotary(q, k, cos, sin, interleaved=interleaved, backend=backend),
        (query.requires_grad_(), key.requires_grad_()),
        fast_mode=backend in KERNELS,
    )


def test_every_subset_of_gradients(device):
    query, key, cos, sin = inputs(SHAPES[1], device=device)

    def op(q, k):
        return fastlm.apply_rotary(q, k, cos, sin)

    leaf = query.detach().requires_grad_()
    rotated, other = op(leaf, key)
    upstream = torch.randn_like(rotated)
    (alone,) = torch.autograd.grad(rotated, leaf, upstream)
    both = [query.detach().requires_grad_(), key.detach().requires_grad_()]
    (together,) = torch.autograd.grad(op(*both)[0], both[0], upstream)
    assert torch.equal(alone, together) and torch.equal(other, op(query, key)[1])
    assert_same_for_every_subset(op, (query, key))


def test_keeps_lengths_and_turns_back(device):
    query, key, cos, sin = inputs((2, 9, 4, 2, 16, 16), torch.float64, device)
    rotated = fastlm.apply_rotary(query, key, cos, sin)
    torch.testing.assert_close(rotated[0].norm(dim=-1), query.norm(dim=-1))
    torch.testing.assert_close(fastlm.apply_rotary(*rotated, cos, -sin), (query, key))


def test_position_zero_and_channels_beyond_r_stay(device):
    query, key, cos, sin = inputs((1, 2, 2, 1, 12, 8), device=device)
    cos[0], sin[0] = 1.0, 0.0
    rotated, _ = fastlm.apply_rotary(query, key, cos, sin)
    assert torch.equal(rotated[:, 0], query[:, 0])
    assert torch.equal(rotated[..., 8:], query[..., 8:])
    assert not torch.equal(rotated[:, 1, :, :8], query[:, 1, :, :8])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_any_layout_gives_the_same(interleaved, backend, device):
    query, key, cos, sin = inputs((2, 3, 2, 2, 8, 6), device=device)

    def op(*arguments):
        return fastlm.apply_rotary(*arguments, interleaved=interleaved, backend=backend)

    want = op(query, key, cos, sin)
    for position, tensor in enumerate((query, key, cos, sin)):
        for name, view in layouts(tensor):
            arguments = [query, key, cos, sin]
            arguments[position] = view
            got = op(*arguments)
            assert all(map(torch.equal, got, want)), (position, name)
            assert all(out.is_contiguous() for out in got), (position, name)


@pytest.mark.parametrize(
    "shape", [(0, 3, 2, 1, 4, 4), (2, 0, 2, 1, 4, 4), (2, 3, 0, 1, 4, 4), (2, 3, 2, 1, 4, 0)]
)
def test_empty(shape, device):
    query, key, cos, sin = inputs(shape, device=device)
    q, k = fastlm.apply_rotary(query.requires_grad_(), key.requires_grad_(), cos, sin)
    (q.sum() + k.sum()).backward()
    assert q.shape == query.grad.shape and k.shape == key.grad.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_is_well_formed(backend, device):
    arguments = inputs((2, 3, 2, 1, 8, 6), device=device)
    for interleaved in (False, True):
        for step in ("forward", "backward"):
            op = getattr(torch.ops.fastlm, f"apply_rotary_{step}").default
            torch.library.opcheck(op, (*arguments, interleaved, backend))


def test_compiles_whole_for_any_size(device):
    def function(query, key, cos, sin):
        q, k = fastlm.apply_rotary(query, key, cos, sin)
        return fastlm.apply_rotary(q, k, cos, sin, interleaved=True)[0].square().sum() + k.sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in SHAPES[1:3]:
        query, key, cos, sin = inputs(shape, device=device)
        leaves = (query.requires_grad_(), key.requires_grad_())
        want = torch.autograd.grad(function(query, key, cos, sin), leaves)
        got = torch.autograd.grad(compiled(query, key, cos, sin), leaves)
        torch.testing.assert_close(got, want)


def test_checked_passes(device):
    for per_sequence in (False, True):
        query, key, cos, sin = inputs(
            (2, 33, 4, 2, 16, 12), device=device, per_sequence=per_sequence
        )
        with fastlm.checked():
            q, k = fastlm.apply_rotary(query.requires_grad_(), key.bfloat16().float(), cos, sin)
            (q.sum() + k.sum()).backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.ones(2, 3, 8)}, ValueError, r"query must have shape \(B, T, H, D\)"),
        ({"key": torch.ones(2, 4, 1, 8)}, ValueError, r"key must have shape \(2, 3, G, 8\)"),
        ({"key": torch.ones(2, 3, 1, 8).double()}, TypeError, "key must have the dtype of query"),
        ({"cos": torch.ones(4, 3)}, ValueError, r"cos must have shape \(3, R/2\)"),
        ({"cos": torch.ones(3, 3, 3)}, ValueError, r"cos must have shape \(2, 3, R/2\)"),
        ({"sin": torch.ones(3, 2)}, ValueError, r"sin must have shape \(3, 3\)"),
        ({"sin": torch.ones(3, 3).double()}, TypeError, "sin must have the dtype of cos"),
        (
            {"cos": torch.ones(3, 5), "sin": torch.ones(3, 5)},
            ValueError,
            "cos must rotate at most 8",
        ),
        ({"cos": torch.ones(3, 3, requires_grad=True)}, ValueError, "must be constants"),
        ({"query": torch.ones(2, 3, 2, 8).int()}, TypeError, "query must be one of"),
        ({"sin": None}, TypeError, "sin must be a tensor"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {
        "query": torch.ones(2, 3, 2, 8),
        "key": torch.ones(2, 3, 1, 8),
        "cos": torch.ones(3, 3),
        "sin": torch.ones(3, 3),
    }
    with pytest.raises(error, match=f"apply_rotary: .*{message}"):
        fastlm.apply_rotary(**{**arguments, **change})


def test_any_layout_gives_what_the_operator_promises():
    query = torch.randn(2, 3, 4, 8).to(memory_format=torch.channels_last)
    key = torch.randn(2, 3, 2, 8)
    cos, sin = torch.randn(3, 4).cos(), torch.randn(3, 4).sin()
    for interleaved in (False, True):
        args = (query, key, cos, sin, interleaved, "torch")
        torch.library.opcheck(torch.ops.fastlm.apply_rotary_forward.default, args)
