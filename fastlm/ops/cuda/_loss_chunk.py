"""Launch kernels on the logits of one chunk of rows: ``Kernels`` of ``kernels/_linear_loss.py``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastlm.kernels._chunks import Operand, Upstream
from fastlm.kernels._linear_loss import Loss, Lost, Rows
from fastlm.kernels._shards import Shard
from fastlm.ops.cuda._extension import address, dtype_of, kernels, place
from fastlm.ops.cuda.cross_entropy import plan_of


def launch_loss(logits: Tensor, targets: Tensor, loss: Loss, rows: Rows) -> None:
    kernels().linear_cross_entropy_loss(
        rows=_rows(logits, targets, loss, loss.weight_sum),
        results=_results(rows, need_stats=rows.entropy.numel() > 0),
        **_launch(logits),
    )


def launch_shard(
    logits: Tensor, targets: Tensor, loss: Loss, shard: Shard, sums: Tensor, *, need_stats: bool
) -> None:
    weight_sum = None if loss.weight_sums is None else loss.weight_sums[shard.group.rank()]
    kernels().linear_cross_entropy_loss(
        rows=_rows(logits, targets, loss, weight_sum),
        results=_results(None, need_stats=need_stats, sums=sums),
        **_launch(logits),
    )


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
    lost = None
    if operand.dtype != logits.dtype:
        lost = (targets.new_empty(num_rows, 2), logits.new_empty(num_rows, 2))
    columns, residuals = (None, None) if lost is None else lost
    need_stats = not lse_is_known and rows.entropy.numel() > 0
    kernels().linear_cross_entropy_gradient(
        narrow=dtype_of(dlogits),
        rows=_rows(logits, targets, loss, loss.weight_sum),
        results=_results(rows, need_stats=need_stats),
        upstream=_upstream(upstream),
        gradient=kernels().ChunkGradient(
            dlogits=address(dlogits),
            scale=operand.scale,
            lse_is_known=lse_is_known,
            columns=address(columns),
            residuals=address(residuals),
        ),
        **_launch(logits),
    )
    return dlogits, lost


def launch_bias_gradient(
    logits: Tensor,
    targets: Tensor,
    loss: Loss,
    upstream: Upstream,
    rows: Rows,
    dbias: Tensor,
) -> None:
    kernels().linear_cross_entropy_bias(
        rows=_rows(logits, targets, loss, loss.weight_sum),
        results=_results(rows, need_stats=False),
        upstream=_upstream(upstream),
        dbias=address(dbias),
        **_launch(logits),
    )


def _rows(logits: Tensor, targets: Tensor, loss: Loss, weight_sum: Tensor | None) -> Any:
    num_rows, vocab_size = logits.shape
    first_class, num_classes = loss.classes(vocab_size)
    ignore_index, label_smoothing, softcap, logit_scale = loss.numbers
    return kernels().ChunkRows(
        logits=address(logits),
        bias=address(loss.bias),
        weight=address(loss.weight),
        weight_sum=address(weight_sum),
        targets=address(targets),
        rows=num_rows,
        vocab_size=vocab_size,
        first_class=first_class,
        num_classes=num_classes,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        softcap=softcap,
        logit_scale=logit_scale,
    )


def _results(rows: Rows | None, *, need_stats: bool, sums: Tensor | None = None) -> Any:
    names = ("losses", "lse", "logprobs", "entropy", "predictions")
    known = {name: address(None if rows is None else getattr(rows, name)) for name in names}
    return kernels().ChunkResults(**known, need_stats=need_stats, sums=address(sums))


def _upstream(upstream: Upstream) -> Any:
    return kernels().ChunkUpstream(**{name: address(x) for name, x in vars(upstream).items()})


def _launch(logits: Tensor) -> dict[str, Any]:
    return {"dtype": dtype_of(logits), "plan": plan_of(logits), **place(logits)}
