"""Cross-entropy of a linear layer's logits by the kernels of ``csrc/linear_cross_entropy.cuh``."""

from __future__ import annotations

from torch import Tensor

from fastlm.kernels._linear_loss import LinearLoss
from fastlm.ops.cuda import _loss_chunk
from fastlm.ops.cuda._extension import refuses_device

_loss = LinearLoss(_loss_chunk)
forward, gradients, backward = _loss.forward, _loss.gradients, _loss.backward


def forward_refuses(input: Tensor, *args: object) -> str | None:
    return refuses_device(input, "input")


gradients_refuses = forward_refuses


def backward_refuses(
    dlosses: Tensor,
    dlogprobs: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    input: Tensor,
    *args: object,
) -> str | None:
    return refuses_device(input, "input")
