"""RMSNorm of x: out = x rstd (offset + weight), rstd = (mean(x^2) + eps)^(-1/2)."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS_AT_ONCE = 4096


def forward(
    input: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(..., C)`` to the normalised vectors, the residual sum, and rstd ``(...)``.

    Without ``residual`` the sum is empty.  The norm is that of the rounded sum, so that it belongs
    to the numbers the caller gets.
    """
    total = input if residual is None else input + residual
    x = total.to(torch.promote_types(total.dtype, torch.float32))
    rstd = (x.square().mean(dim=-1) + eps).rsqrt()
    out = x * rstd[..., None]
    if weight is not None:
        out = out * (weight_offset + weight.to(x.dtype))
    sums = total.new_empty(0) if residual is None else total.contiguous()
    return out.to(total.dtype).contiguous(), sums, rstd.contiguous()


def backward(
    dout: Tensor,
    dtotal: Tensor | None,
    vectors: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    weight_offset: float,
    needs_vectors: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """With n = x rstd and g = dout (offset + weight): dx = rstd (g - n mean(g n)) [+ dtotal].

    ``vectors`` are the x that were normalised.  dweight = sum over vectors of dout n.  A gradient
    that is not needed comes back empty.
    """
    dvectors, dweight = vectors.new_empty(0), vectors.new_empty(0)
    normal = vectors.to(rstd.dtype) * rstd[..., None]
    grad = dout.to(rstd.dtype)
    if needs_weight and weight is not None:
        dweight = (grad * normal).reshape(-1, normal.shape[-1]).sum(dim=0).to(weight.dtype)
    if needs_vectors:
        if weight is not None:
            grad = grad * (weight_offset + weight.to(rstd.dtype))
        dx = (grad - normal * (grad * normal).mean(dim=-1, keepdim=True)) * rstd[..., None]
        if dtotal is not None:
            dx = dx + dtotal
        dvectors = dx.to(vectors.dtype).contiguous()
    return dvectors, dweight


def truth_forward(
    input: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    total = input if residual is None else input + residual
    outs, rstds = [], []
    for x in total.reshape(-1, total.shape[-1]).split(_ROWS_AT_ONCE):
        out, _, rstd = forward(x.double(), weight, None, eps, weight_offset)
        outs.append(out)
        rstds.append(rstd)
    sums = total.new_empty(0) if residual is None else input.double() + residual.double()
    out, rstd = torch.cat(outs).view(input.shape), torch.cat(rstds).view(input.shape[:-1])
    return out, sums.double(), rstd


def truth_backward(
    dout: Tensor,
    dtotal: Tensor | None,
    vectors: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    weight_offset: float,
    needs_vectors: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    rows = (dout, vectors, *(() if dtotal is None else (dtotal,)))
    slices = [x.reshape(-1, x.shape[-1]).split(_ROWS_AT_ONCE) for x in rows]
    scale = None if weight is None else weight.double()
    dvectors, dweights = [], []
    for d, x, *more, r in zip(*slices, rstd.reshape(-1).split(_ROWS_AT_ONCE), strict=True):
        dx, dw = backward(
            d.double(),
            more[0].double() if more else None,
            x.double(),
            scale,
            r.double(),
            weight_offset,
            needs_vectors,
            needs_weight,
        )
        dvectors.append(dx)
        dweights.append(dw)
    dx = torch.cat(dvectors)
    return dx.view(vectors.shape) if needs_vectors else dx, torch.stack(dweights).sum(dim=0)


plain_forward = forward
plain_backward = backward


def forward_refuses(*args: object) -> None:
    return None


backward_refuses = forward_refuses
