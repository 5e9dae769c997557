"""Launch the kernels on the logits of one chunk of rows: ``Kernels`` of ``_linear_loss.py``."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .._chunks import Operand, Upstream
from .._launch import accumulator, launch
from .._linear_loss import Loss, Lost, Rows
from .._shards import Shard
from . import tuning
from .kernel import bias_gradient_kernel, gradient_kernel, loss_kernel
from .shard import shard_kernel

# What a gradient kernel needs registers for.
_HEAVY = ("HAS_SOFTCAP", "SMOOTHED", "HAS_DENTROPY")


def launch_loss(logits: Tensor, targets: Tensor, loss: Loss, rows: Rows) -> None:
    num_rows, vocab_size = logits.shape
    plan = tuning.plan("loss", vocab_size)
    launch(
        loss_kernel, (num_rows,),
        logits, *_vectors(loss, logits), targets,
        rows.losses, rows.lse, rows.logprobs, rows.entropy, rows.predictions,
        vocab_size, *loss.numbers,
        HAS_BIAS=loss.bias is not None, **_loss_flags(loss), NEED_STATS=rows.entropy.numel() > 0,
        **_shared(plan, logits),
    )  # fmt: skip


def launch_shard(
    logits: Tensor, targets: Tensor, loss: Loss, shard: Shard, sums: Tensor, *, need_stats: bool
) -> None:
    num_rows, vocab_size = logits.shape
    plan = tuning.plan("shard", vocab_size)
    bias, weight, _ = _vectors(loss, logits)
    launch(
        shard_kernel, (num_rows,),
        logits, bias, weight, targets, sums,
        num_rows, vocab_size, shard.first_class, loss.ignore_index, loss.softcap or 0.0,
        loss.logit_scale,
        HAS_BIAS=loss.bias is not None, **_loss_flags(loss), NEED_STATS=need_stats,
        **_shared(plan, logits),
    )  # fmt: skip


def launch_gradient(
    logits: Tensor,
    operand: Operand,
    targets: Tensor,
    loss: Loss,
    upstream: Upstream,
    rows: Rows,
    *,
    lse_is_known: bool,
) -> tuple[Tensor, Lost | None]:
    num_rows, vocab_size = logits.shape
    dlogits = logits.view(operand.dtype)[:, :vocab_size]
    is_rounded = operand.dtype != logits.dtype
    lost_shape = (num_rows, 2 if is_rounded else 0)
    columns, residuals = targets.new_zeros(lost_shape), logits.new_empty(lost_shape)
    need_stats = not lse_is_known and rows.entropy.numel() > 0
    flags = {**_loss_flags(loss), **_flags(upstream)}
    has_options = need_stats or any(flags[name] for name in _HEAVY)
    plan = tuning.plan("gradient with options" if has_options else "gradient", vocab_size)
    launch(
        gradient_kernel, (num_rows,),
        logits, dlogits, *_vectors(loss, logits), targets, *_tensors(upstream, rows.lse),
        rows.losses, rows.lse, rows.logprobs, rows.entropy, rows.predictions, columns, residuals,
        dlogits.stride(0), vocab_size, *loss.classes(vocab_size), *loss.numbers,
        SCALE=operand.scale, HAS_BIAS=loss.bias is not None, **flags,
        LSE_IS_KNOWN=lse_is_known, NEED_STATS=need_stats, IS_SHARD=loss.shard is not None,
        ONE_BLOCK=vocab_size <= plan.block_v, **_shared(plan, logits),
    )  # fmt: skip
    return dlogits, (columns, residuals) if is_rounded else None


def launch_bias_gradient(
    logits: Tensor,
    targets: Tensor,
    loss: Loss,
    upstream: Upstream,
    rows: Rows,
    dbias: Tensor,
) -> None:
    num_rows, vocab_size = logits.shape
    plan = tuning.BIAS
    launch(
        bias_gradient_kernel, (triton.cdiv(vocab_size, plan.block_v),),
        logits, *_vectors(loss, logits), targets, *_tensors(upstream, rows.lse),
        rows.lse, rows.entropy, dbias, num_rows, vocab_size, *loss.classes(vocab_size),
        *loss.numbers,
        **_loss_flags(loss), **_flags(upstream), BLOCK_R=plan.block_r, **_shared(plan, logits),
    )  # fmt: skip


def _tensors(upstream: Upstream, like: Tensor) -> list[Tensor]:
    """As the kernels take them; ``like``, one per row, in place of what is not read."""
    dlogprobs, dlse = upstream.dlogprobs, upstream.dlse
    if dlogprobs is None and dlse is not None:
        dlogprobs = torch.zeros_like(dlse)
    if dlse is None and dlogprobs is not None:
        dlse = torch.zeros_like(dlogprobs)
    given = (upstream.dlosses, dlogprobs, dlse, upstream.dentropy, upstream.z_weight)
    return [like if x is None else x for x in given]


def _loss_flags(loss: Loss) -> dict[str, bool]:
    return {
        "HAS_WEIGHT": loss.weight is not None,
        "HAS_SOFTCAP": loss.softcap is not None,
        "SMOOTHED": loss.label_smoothing > 0,
    }


def _flags(upstream: Upstream) -> dict[str, bool]:
    return {
        "HAS_DLOSSES": upstream.dlosses is not None,
        "HAS_DSTATS": upstream.dlogprobs is not None or upstream.dlse is not None,
        "HAS_DENTROPY": upstream.dentropy is not None,
        "HAS_Z": upstream.z_weight is not None,
    }


def _vectors(loss: Loss, like: Tensor) -> list[Tensor]:
    """Bias, class weights and their sum; ``like`` in place of what is not read."""
    return [like if x is None else x for x in (loss.bias, loss.weight, loss.weight_sum)]


def _shared(plan: tuning.Plan | tuning.BiasPlan, logits: Tensor) -> dict[str, Any]:
    return {
        "BLOCK_V": plan.block_v,
        "ACC": accumulator(logits.dtype),
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
    }
