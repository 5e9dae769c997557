"""Attention of a block of queries, written out for what torch cannot fuse.

Tensors are ``(B, heads, length, dim)`` in float32 or float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out ``(B, H, T, Dv)`` and lse ``(B, H, T)``.

    Args:
        q: ``(B, H, T, D)``.
        k: ``(B, G, S, D)``.
        v: ``(B, G, S, Dv)``.
        scale: Factor of the scores.
        softcap: Of the scaled scores.
        seen: Bool, broadcasts to ``(B, 1, T, S)``; None if everything is.
    """
    scores, _ = _scores(q, k, scale, softcap, seen)
    # not by logsumexp, which would take every exponential a second time
    top = scores.amax(-1, keepdim=True)
    top.masked_fill_(top.isinf(), 0.0)
    p = scores.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    out = (_grouped(p, k) @ v).view(*q.shape[:3], v.shape[-1])
    out.div_(total.masked_fill(total == 0.0, 1.0))
    return out, total.log_().add_(top).squeeze(-1)


def attend_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
    seen: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    scores, slope = _scores(q, k, scale, softcap, seen)
    p = _probabilities_(scores, lse)
    delta = (dout * out).sum(-1, keepdim=True)
    if dlse is not None:
        delta -= dlse.masked_fill(lse == -torch.inf, 0.0)[..., None]
    do = _grouped(dout, k)
    dv = _grouped(p, k).mT @ do
    ds = (do @ v.mT).view(p.shape).sub_(delta).mul_(p)
    if slope is not None:
        ds.mul_(slope)
    ds = _grouped(ds, k)
    if seen is not None:
        # not left to p = 0: what is out of sight may be NaN
        ds.view(p.shape).masked_fill_(~seen, 0.0)
    dq, dk = (ds @ k).view(q.shape), ds.mT @ _grouped(q, k)
    return dq.mul_(scale), dk.mul_(scale), dv


def _scores(
    q: Tensor, k: Tensor, scale: float, softcap: float | None, seen: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Scores ``(B, H, T, S)``, -inf where not seen, and the slope of the softcap."""
    scores = (_grouped(q, k) @ k.mT).view(*q.shape[:3], k.shape[2]).mul_(scale)
    slope = None
    if softcap is not None:
        scores.div_(softcap).tanh_()
        slope = torch.addcmul(scores.new_ones(()), scores, scores, value=-1.0)
        scores.mul_(softcap)
    if seen is not None:
        scores.masked_fill_(~seen, -torch.inf)
    return scores, slope


def _probabilities_(scores: Tensor, lse: Tensor) -> Tensor:
    """Over the scores.  Where the lse is -inf so are all scores."""
    return scores.sub_(lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp_()


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """``(B, H, T, D)`` to ``(B, G, H / G * T, D)``: heads that share keys multiply them at once."""
    batch, heads, length, width = x.shape
    return x.reshape(batch, k.shape[1], heads // k.shape[1] * length, width)
