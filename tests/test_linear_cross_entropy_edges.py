"""linear_cross_entropy where a batch counts for nothing, or a position should not."""

import pytest
import torch

import fastlm

BACKENDS = ["triton", "cuda", "torch", "reference"]


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_number_of_items_that_is_none_gives_no_number(backend, device):
    x, w, target = inputs(device)
    count = torch.tensor(torch.nan, device=device)
    loss = fastlm.linear_cross_entropy(x, w, target, num_items=count, backend=backend)
    loss.backward()
    assert loss.isnan()
    assert x.grad.isnan().all()


@pytest.mark.parametrize("ignore_index", [2**63, -(2**63) - 1, 10**30])
def test_an_ignore_index_that_no_target_can_have_is_refused(ignore_index, device):
    x, w, target = inputs(device)
    message = r"ignore_index must be in \[-2\*\*63, 2\*\*63\), got"
    with pytest.raises(ValueError, match=f"^linear_cross_entropy: {message}"):
        fastlm.linear_cross_entropy(x, w, target, ignore_index=ignore_index)
    with pytest.raises(ValueError, match=f"^cross_entropy: {message}"):
        fastlm.cross_entropy(x @ w.t(), target, ignore_index=ignore_index)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", [True, False])
def test_reads_every_other_target(needs, backend, device):
    x, w, target = inputs(device)
    x = x.detach().requires_grad_(needs)
    spread = torch.stack([target, (target + 7) % 200], 1)[:, 0]
    assert not spread.is_contiguous()
    for reduction in ("none", "mean"):
        options = {"reduction": reduction, "backend": backend}
        got = fastlm.linear_cross_entropy(x, w.detach(), spread, **options)
        assert torch.equal(got, fastlm.linear_cross_entropy(x, w.detach(), target, **options))


WRONG = [
    ({"input": [1.0]}, TypeError, "input must be a tensor"),
    ({"linear_weight": torch.ones(20, 5)}, ValueError, "linear_weight must have shape"),
    ({"linear_bias": torch.ones(3)}, ValueError, "linear_bias must have shape"),
    ({"target": torch.full((6,), 200)}, IndexError, r"target must be in \[0, 200\)"),
    ({"shift": 7}, ValueError, r"shift must be in \[0, 6\]"),
    ({"softcap": -1.0}, ValueError, "softcap must be positive"),
    ({"ignore_index": 2.5}, TypeError, "ignore_index must be an integer"),
    ({"process_group": 0}, TypeError, "process_group must be a ProcessGroup"),
    ({"backend": "numpy"}, ValueError, "backend must be one of"),
    ({"backend": "cuda"}, NotImplementedError, "no backend takes this call"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=[w[2] for w in WRONG])
def test_errors_of_the_log_probabilities_are_theirs(wrong, error, message):
    x, w, target = inputs("cpu")
    right = {"input": x, "linear_weight": w, "target": target, "backend": "torch"}
    with pytest.raises(error, match=f"^linear_logprobs.*: {message}"):
        fastlm.linear_logprobs(**{**right, **wrong})
