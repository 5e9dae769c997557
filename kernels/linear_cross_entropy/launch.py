"""Allocate, multiply and launch, a chunk of rows at a time.  Arguments are already checked.

Per chunk: logits by a matrix product in float32 (a logit rounded to bfloat16 moves the loss by
1e-3), one kernel that turns them into their gradient in place, and two products that use it, the
gradient rounded to the dtype of the inputs because tensor cores need both operands alike.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from .._chunks import (
    LinearGradients,
    Upstream,
    matmul,
    rows_per_chunk,
    tensor_core_operand,
    wide_dtype,
)
from .._runtime import refuses_device
from .._shards import CLASSES_OF_CHUNKS, Shard
from .chunk import Loss, Rows, launch_bias_gradient, launch_gradient, launch_loss


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


def forward(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    need_stats: bool,
    group: str,
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    known = Rows.empty(input, target.numel(), wide_dtype(input), need_stats=need_stats)
    options = (ignore_index, label_smoothing, softcap, logit_scale)
    shard = Shard.of(group, num_classes, linear_weight.shape[0])
    loss = Loss.of(known.lse, linear_bias, weight, *options, shard)
    targets = _flat(target)
    for rows, logits in _chunks(input.reshape(-1, input.shape[-1]), linear_weight, shard):
        launch_loss(logits, targets[rows], loss, known[rows])
    return _shaped(known, target, need_stats)


def gradients(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    z_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    need_stats: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    group: str,
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    known = Rows.empty(input, target.numel(), wide_dtype(input), need_stats=need_stats)
    options = (ignore_index, label_smoothing, softcap, logit_scale)
    shard = Shard.of(group, num_classes, linear_weight.shape[0])
    loss = Loss.of(known.lse, linear_bias, weight, *options, shard)
    gradients = _sweep(
        Upstream(z_weight=z_weight), input, linear_weight, target, loss, known,
        need_input, need_weight, need_bias, lse_is_known=False,
    )  # fmt: skip
    losses, lse, *stats = _shaped(known, target, need_stats)
    logprobs, entropy, predictions = stats
    if z_weight is None and not need_stats:
        lse = lse.new_empty(0)
    return losses, lse, logprobs, entropy, predictions, *gradients


def backward(
    dlosses: Tensor,
    dlogprobs: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    group: str,
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    options = (ignore_index, label_smoothing, softcap, logit_scale)
    shard = Shard.of(group, num_classes, linear_weight.shape[0])
    loss = Loss.of(lse, linear_bias, weight, *options, shard)
    upstream = Upstream(dlosses, dlogprobs, dlse, dentropy).each_row(_flat)
    known = Rows.known(_flat(lse), _flat(entropy))
    return _sweep(
        upstream, input, linear_weight, target, loss, known,
        need_input, need_weight, need_bias, lse_is_known=True,
    )  # fmt: skip


def _sweep(
    upstream: Upstream,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    loss: Loss,
    known: Rows,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    *,
    lse_is_known: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of what comes in; writes ``known``, or reads its lse and entropy."""
    inputs, targets = input.reshape(-1, input.shape[-1]), _flat(target)
    vocab_size, shard = linear_weight.shape[0], loss.shard
    _, num_classes = loss.classes(vocab_size)
    operand = tensor_core_operand(input, num_classes)
    upstream, factor = upstream.within_float16(
        operand, targets == loss.ignore_index, loss.weight, loss.logit_scale, num_classes
    )
    linear = LinearGradients(inputs, linear_weight, operand, need_input, need_weight)
    dbias = known.lse.new_zeros(vocab_size if need_bias else 0)
    # both are asked of the logits before the gradient replaces them
    loss_comes_first = not lse_is_known and (need_bias or shard is not None)
    for rows, logits in _chunks(inputs, linear_weight, shard):
        y, chunk, dchunk = targets[rows], known[rows], upstream[rows]
        if loss_comes_first:
            launch_loss(logits, y, loss, chunk)
        if vocab_size == 0:
            continue
        if need_bias:
            launch_bias_gradient(logits, y, loss, dchunk, chunk, dbias)
        dlogits, lost = launch_gradient(
            logits, operand, y, loss, dchunk, chunk, lse_is_known=lse_is_known or loss_comes_first
        )
        linear.add(rows, dlogits, lost)
    if shard is not None and need_input:
        if vocab_size == 0:
            linear.dinput.zero_()
        shard.add_up(linear.dinput)
    gradients = (linear.dinput.view(input.shape if need_input else 0), linear.dweight, dbias)
    if factor is not None:
        for gradient in gradients:
            gradient.mul_(factor)
    return gradients


def _flat(x: Tensor) -> Tensor:
    return x.flatten().contiguous()


def _shaped(
    known: Rows, target: Tensor, need_stats: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    losses, lse, *stats = vars(known).values()
    logprobs, entropy, predictions = (x.view(target.shape) if need_stats else x for x in stats)
    return losses.view(target.shape), lse.view(target.shape), logprobs, entropy, predictions


def _chunks(
    inputs: Tensor, linear_weight: Tensor, shard: Shard | None
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows, and their logits without bias, in memory that the next step reuses."""
    num_rows, vocab_size = inputs.shape[0], linear_weight.shape[0]
    classes = vocab_size if shard is None else CLASSES_OF_CHUNKS
    step = rows_per_chunk(num_rows, classes, inputs.device.type)
    workspace = inputs.new_empty(step, vocab_size, dtype=wide_dtype(inputs))
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        logits = workspace[: rows.stop - start]
        if vocab_size:
            matmul(logits, inputs[rows], linear_weight.t())
        yield rows, logits
