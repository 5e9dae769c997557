"""The dtype that autocast asks of an op that computes in a low precision."""

from __future__ import annotations

import torch
from torch import Tensor


def dtype_under_autocast(tensor: Tensor) -> torch.dtype:
    """What ``F.linear`` would cast ``tensor`` to: autocast leaves float64 alone."""
    device_type = tensor.device.type
    if tensor.dtype == torch.float64 or tensor.is_meta:
        return tensor.dtype
    if not torch.is_autocast_enabled(device_type):
        return tensor.dtype
    return torch.get_autocast_dtype(device_type)
