"""fastlm.optimize under FSDP2: parameters that are whole only inside their module's forward."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from support import hf_zoo
from torch import nn
from torch.distributed.fsdp import fully_shard

import fastlm
from fastlm.hf.verify import agree

pytestmark = pytest.mark.filterwarnings("ignore")


def model_of(tied: bool) -> nn.Module:
    model = hf_zoo.build("llama").train()
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model


def train_sharded(tied: bool, first: str) -> tuple[bool, float, str | None]:
    """On a rank: its row's loss and the mean of gradients, beside those of one process."""
    rank = dist.get_rank()
    theirs = model_of(tied)
    ours = copy.deepcopy(theirs)
    if first == "optimize":
        fastlm.optimize(ours)
    for layer in ours.model.layers:
        fully_shard(layer)
    if not tied:
        fully_shard(ours.lm_head)
    fully_shard(ours)
    if first == "shard":
        assert fastlm.optimize(ours).replaced["loss"] == 1
    rows = [{name: x[at : at + 1] for name, x in hf_zoo.batch().items()} for at in range(2)]

    def mean(model: nn.Module) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        found = [hf_zoo.loss_and_gradients(model, **row) for row in rows]
        losses = [each.pop("loss") for each in found]
        return {name: (found[0][name] + found[1][name]) / 2 for name in found[0]}, losses

    truth, true_losses = mean(hf_zoo.in_double(theirs))
    plain, losses = mean(theirs)
    out = ours(**rows[rank])
    out.loss.backward()
    got = {name: p.grad.full_tensor() for name, p in ours.named_parameters()}
    names = list(truth)
    verdict = agree(
        [out.loss, *(got[name] for name in names)],
        [losses[rank], *(plain[name] for name in names)],
        [true_losses[rank].double(), *(truth[name] for name in names)],
    )
    assert got.keys() == truth.keys()
    fastlm.restore(ours)
    return out.logits is None, float(out.loss), verdict.why


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("first", ["optimize", "shard"])
def test_sharded_models_train_as_whole_ones(two, tied, first):
    for is_fused, _, why in two.run(train_sharded, tied, first):
        assert is_fused
        assert why is None
