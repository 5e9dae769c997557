"""The k largest log-probabilities of a linear layer's logits, and their classes.

Every rank of a ``group`` gathers the layer from all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops.reference._shards import whole
from fastlm.ops.reference.cross_entropy import transform

_ROWS_AT_ONCE = 64


def forward(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    k: int,
    softcap: float | None,
    logit_scale: float,
    group: str,
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    """``(..., C)`` and ``(V, C)`` to ``(..., k)`` log-probabilities, wide, and classes, int64."""
    linear_weight, linear_bias = whole(group, num_classes, linear_weight, linear_bias)
    dtype = torch.promote_types(input.dtype, torch.float32)
    bias = None if linear_bias is None else linear_bias.to(dtype)
    x = transform(F.linear(input.to(dtype), linear_weight.to(dtype), bias), softcap, logit_scale)
    logprobs, indices = x.log_softmax(-1).topk(k, dim=-1)
    return logprobs, indices


def truth_forward(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    k: int,
    softcap: float | None,
    logit_scale: float,
    group: str,
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    """:func:`forward` in float64."""
    linear_weight, linear_bias = whole(group, num_classes, linear_weight, linear_bias)
    matrix, bias = linear_weight.double(), None if linear_bias is None else linear_bias.double()
    parts = [
        forward(rows.double(), matrix, bias, k, softcap, logit_scale, "", num_classes)
        for rows in input.reshape(-1, input.shape[-1]).split(_ROWS_AT_ONCE)
    ]
    shape = (*input.shape[:-1], k)
    logprobs, indices = (torch.cat(x).view(shape) for x in zip(*parts, strict=True))
    return logprobs, indices


plain_forward = forward


def forward_refuses(*args: object) -> None:
    return None
