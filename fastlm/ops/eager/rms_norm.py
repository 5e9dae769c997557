"""RMSNorm in as few passes over memory as torch's operators allow."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    input: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if residual is None:
        total, sums = input, input.new_empty(0)
    else:
        dtype = torch.promote_types(input.dtype, residual.dtype)
        total = sums = torch.add(input, residual, out=input.new_empty(input.shape, dtype=dtype))
    x = total.to(torch.promote_types(total.dtype, torch.float32))
    # one read: the mean of squares would first write the squares
    rstd = torch.linalg.vector_norm(x, dim=-1).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    out = torch.mul(x, rstd[..., None], out=x.new_empty(x.shape))
    if weight is not None:
        out.mul_(_scale(weight, weight_offset, x.dtype))
    return out.to(total.dtype), sums, rstd


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
    size = vectors.shape[-1]
    grad = dout.to(rstd.dtype).reshape(-1, size)
    x, r = vectors.to(rstd.dtype).reshape(-1, size), rstd.reshape(-1)
    dvectors, dweight = vectors.new_empty(0), vectors.new_empty(0)
    products = (grad * x).mul_(r[:, None])
    if needs_weight and weight is not None:
        # not a matrix-vector product, which adds up thousands of rows one after the other
        dweight = products.sum(dim=0).to(weight.dtype)
    if needs_vectors:
        scale = None if weight is None else _scale(weight, weight_offset, x.dtype)
        dots = products.sum(dim=-1) if scale is None else torch.mv(products, scale)
        dots.mul_(r).mul_(r).div_(-size)
        factor = r[:, None] if scale is None else torch.mul(r[:, None], scale, out=products)
        dx = torch.mul(x, dots[:, None], out=x.new_empty(x.shape)).addcmul_(grad, factor)
        if dtotal is not None:
            dx.add_(dtotal.reshape(-1, size))
        dvectors = dx.to(vectors.dtype).view(vectors.shape)
    return dvectors, dweight


def _scale(weight: Tensor, weight_offset: float, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) + weight_offset if weight_offset else weight.to(dtype)


def forward_refuses(*args: object) -> None:
    return None


backward_refuses = forward_refuses
