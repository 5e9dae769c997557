"""The steps of backend ``"triton"``.  Arguments are already checked by the caller."""

from __future__ import annotations

from torch import Tensor

from .._linear_loss import LinearLoss
from .._runtime import refuses_device
from . import chunk

_loss = LinearLoss(chunk)
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
