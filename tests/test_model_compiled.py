"""A training step of CausalLM through torch.compile's own backend."""

from __future__ import annotations

import pytest
import torch
from support.models import tiny_model

from fastlm import testing


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_inductor_gives_the_step_of_eager(device):
    model = tiny_model(tie_word_embeddings=True).to(device)
    exact = tiny_model(tie_word_embeddings=True).to(device).double()
    exact.load_state_dict(model.state_dict())

    def step(ids, call):
        loss = call(ids)
        owner = exact if call is loss_of_exact else model
        return [loss.detach(), *torch.autograd.grad(loss, list(owner.parameters()))]

    def loss_of(ids):
        return model(ids, labels=ids).loss

    def loss_of_exact(ids):
        return exact(ids, labels=ids).loss

    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True)
    for batch, length in ((2, 12), (3, 17)):
        ids = torch.randint(320, (batch, length), device=device)
        actual, plain, truth = (step(ids, call) for call in (compiled, loss_of, loss_of_exact))
        # inductor sums in another order
        testing.assert_all_as_accurate("compiled", actual, plain=plain, truth=truth)
