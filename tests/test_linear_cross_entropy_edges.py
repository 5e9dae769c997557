"""linear_cross_entropy where a batch counts for nothing, or a position should not."""

import pytest
import torch

import fastlm

BACKENDS = ["triton", "torch", "reference"]


def inputs(device, dtype=torch.float32, rows=6, width=8, vocab_size=200):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, width, generator=generator).to(device, dtype).requires_grad_()
    w = torch.randn(vocab_size, width, generator=generator).to(device, dtype).requires_grad_()
    return x, w, torch.randint(vocab_size, (rows,), generator=generator).to(device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_no_items_has_loss_zero_and_gradient_zero(backend, device):
    x, w, target = inputs(device)
    nothing = torch.full_like(target, -100)
    count = (nothing != -100).sum()
    loss = fastlm.linear_cross_entropy(x, w, nothing, num_items=count, backend=backend)
    loss.backward()
    assert loss.item() == 0.0
    assert not x.grad.any()
    assert not w.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_num_items_of_any_dtype_leaves_the_loss_float32(backend, device):
    x, w, target = inputs(device)
    for dtype in (torch.int32, torch.float32, torch.float64):
        count = torch.tensor(4, dtype=dtype, device=device)
        loss = fastlm.linear_cross_entropy(x, w, target, num_items=count, backend=backend)
        whole = fastlm.linear_cross_entropy(x, w, target, reduction="sum", backend=backend)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(whole.item() / 4, rel=1e-6)


@pytest.mark.parametrize("upstream", [1e9, torch.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_comes_in_at_an_ignored_position_changes_nothing(backend, upstream, device):
    x, w, target = inputs(device, torch.float16)
    target[1] = -100
    gradients = []
    for value in (0.0, upstream):
        dlosses = torch.full(target.shape, 1e-3, device=device)
        dlosses[1] = value
        losses = fastlm.linear_cross_entropy(x, w, target, reduction="none", backend=backend)
        gradients.append(torch.autograd.grad(losses, (x, w), dlosses))
    for without, with_it in zip(*gradients, strict=True):
        assert with_it.abs().max() > 0
        assert torch.equal(without, with_it)


def test_checked_names_the_position_of_a_bad_target(device):
    x, w, target = inputs(device, rows=300)
    target[299] = 200
    with fastlm.checked(), pytest.raises(IndexError, match=r"got 200 at position \[299\]"):
        fastlm.linear_cross_entropy(x, w, target, backend="triton")


def test_meta_tensors_give_shapes():
    x, w, target = (x.detach().to("meta") for x in inputs("cpu"))
    assert fastlm.linear_cross_entropy(x, w, target).is_meta
