"""Cross-entropy of a linear layer's logits by torch's own operators, a chunk of rows at a time.

One buffer holds the logits of a chunk; they become their gradient in place and feed two matrix
products.  On CPU narrow inputs are widened before every product (without AMX or AVX-512 a bfloat16
product is over a hundred times slower than a float32 one), and rows with an ignored target are left
out of them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastlm.kernels._chunks import (
    LinearGradients,
    Operand,
    Upstream,
    matmul,
    rows_per_chunk,
    tensor_core_operand,
    wide_dtype,
)
from fastlm.kernels._shards import CLASSES_OF_CHUNKS, Shard, combine
from fastlm.kernels._shards import Known as KnownOfAll
from fastlm.ops.eager._losses import (
    LossOptions,
    RowFactors,
    RowLosses,
    all_are_classes,
    probability_gradient_,
    row_factors,
    row_losses,
    shard_sums,
    write_gradient,
)
from fastlm.ops.reference.cross_entropy import check_targets

_OP = "linear_cross_entropy"

# A narrow weight up to this many elements is widened once, 1 GB of float32; a larger one again for
# every product, a block at a time.
_WIDENED_ONCE = 1 << 28

Known = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


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
) -> Known:
    options = LossOptions(weight, label_smoothing, softcap, logit_scale)
    known, _ = _run(
        Upstream(), input, linear_weight, linear_bias, target, None, None, ignore_index, options,
        need_stats, False, False, False, Shard.of(group, num_classes, linear_weight.shape[0]),
    )  # fmt: skip
    assert known is not None, "no lse was given"
    return known


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
    options = LossOptions(weight, label_smoothing, softcap, logit_scale)
    known, gradients = _run(
        Upstream(z_weight=z_weight), input, linear_weight, linear_bias, target, None, None,
        ignore_index, options, need_stats, need_input, need_weight, need_bias,
        Shard.of(group, num_classes, linear_weight.shape[0]),
    )  # fmt: skip
    assert known is not None, "no lse was given"
    losses, lse, *stats = known
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
) -> Gradients:
    options = LossOptions(weight, label_smoothing, softcap, logit_scale)
    _, gradients = _run(
        Upstream(dlosses, dlogprobs, dlse, dentropy), input, linear_weight, linear_bias, target,
        lse, entropy if dentropy is not None else None, ignore_index, options,
        False, need_input, need_weight, need_bias,
        Shard.of(group, num_classes, linear_weight.shape[0]),
    )  # fmt: skip
    return gradients


def _run(
    upstream: Upstream,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    lse: Tensor | None,
    entropy: Tensor | None,
    ignore_index: int,
    options: LossOptions,
    need_stats: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    shard: Shard | None,
) -> tuple[Known | None, Gradients]:
    """What is known of each position, unless ``lse`` is given, and gradients of what comes in."""
    vocab_size = linear_weight.shape[0] if shard is None else shard.num_classes
    inputs, targets = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    upstream = upstream.each_row(Tensor.flatten)
    lse, entropy = (None if x is None else x.flatten() for x in (lse, entropy))
    kept = None
    # on a GPU a look at the targets would wait for it
    if input.is_cpu and not all_are_classes(targets, vocab_size, ignore_index):
        check_targets(_OP, target, vocab_size, ignore_index)
        kept = (targets != ignore_index).nonzero()[:, 0]
        inputs, targets, upstream = inputs[kept], targets[kept], upstream[kept]
        lse, entropy = (None if x is None else x[kept] for x in (lse, entropy))
    known, (dinput, dweight, dbias) = _sweep(
        upstream, inputs, linear_weight, linear_bias, targets, lse, entropy, ignore_index, options,
        need_stats, need_input, need_weight, need_bias, shard,
    )  # fmt: skip
    if kept is not None and need_input:
        dinput = _spread(dinput, kept, target.numel())
    gradients = (dinput.view(input.shape if need_input else 0), dweight, dbias)
    if known is None:
        return None, gradients
    losses, lse, *stats = known
    has_lse = lse.shape == losses.shape
    if kept is not None:
        losses = _spread(losses, kept, target.numel())
        lse = _spread(lse, kept, target.numel()) if has_lse else lse
        if need_stats:
            stats = [_spread(x, kept, target.numel()) for x in stats]
            stats[2].masked_fill_((target == ignore_index).flatten(), -1)
    if need_stats:
        stats = [x.view(target.shape) for x in stats]
    logprobs, entropy, predictions = stats
    lse = lse.view(target.shape) if has_lse else lse
    return (losses.view(target.shape), lse, logprobs, entropy, predictions), gradients


def _spread(x: Tensor, kept: Tensor, num_rows: int) -> Tensor:
    """Zeros in the rows that were left out."""
    return x.new_zeros((num_rows, *x.shape[1:])).index_copy_(0, kept, x)


def _sweep(
    upstream: Upstream,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    targets: Tensor,
    known_lse: Tensor | None,
    known_entropy: Tensor | None,
    ignore_index: int,
    options: LossOptions,
    need_stats: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    shard: Shard | None,
) -> tuple[Known | None, Gradients]:
    """The same for ``(N, C)`` rows; on CPU none of them is ignored or out of range."""
    (num_rows, _), vocab_size, wide = input.shape, linear_weight.shape[0], wide_dtype(input)
    num_classes = vocab_size if shard is None else shard.num_classes
    on_cpu = input.is_cpu
    operand = Operand(wide) if on_cpu else tensor_core_operand(input, num_classes)
    if on_cpu and linear_weight.numel() <= _WIDENED_ONCE:
        linear_weight = linear_weight.to(wide)
    bias = None if linear_bias is None else linear_bias.to(wide)
    need_gradient = need_input or need_weight or need_bias
    linear = LinearGradients(input, linear_weight, operand, need_input, need_weight)
    dbias = input.new_zeros(vocab_size if need_bias else 0, dtype=wide)

    y, ignored, outside, factor = targets[:, None], None, None, None
    if not on_cpu:
        ignored, outside = y == ignore_index, (y < 0) | (y >= num_classes)
        y = y.masked_fill(outside, 0)
        upstream, factor = upstream.within_float16(
            operand, ignored[:, 0], options.weight, options.logit_scale, num_classes
        )
        dlosses = upstream.dlosses
        dlosses = input.new_ones(num_rows, dtype=wide) if dlosses is None else dlosses
        upstream = replace(upstream, dlosses=dlosses.masked_fill(outside[:, 0], torch.nan))
    upstream = upstream.each_row(lambda x: x[:, None])
    lse, entropy = (None if x is None else x[:, None] for x in (known_lse, known_entropy))
    columns, here, options_here, weight_sums = y, None, options, None
    if shard is not None:
        columns, here, options_here = _here(shard, y, options)
        if options.label_smoothing > 0:
            weight_sums = shard.weight_sums(options.weight, linear.dinput)
    is_plain = options.is_plain and not need_stats and upstream.z_weight is None and shard is None

    parts: list[RowLosses] = []
    chunk_classes = vocab_size if shard is None else CLASSES_OF_CHUNKS
    step = rows_per_chunk(num_rows, chunk_classes, input.device.type)
    buffer = input.new_empty(step, vocab_size, dtype=wide)
    for start in range(0, max(1, num_rows), step):
        rows = slice(start, min(start + step, num_rows))
        z = buffer[: rows.stop - start]
        matmul(z, input[rows], linear_weight.t())
        if bias is not None:
            z.add_(bias)
        chunk, skipped = upstream[rows], None if ignored is None else ignored[rows]
        if lse is None and is_plain and need_gradient:
            parts.append(_plain_losses(z, y[rows]))
            probability_gradient_(z, y[rows], RowFactors(of_target=chunk.dlosses), None)
            if skipped is not None:
                z.masked_fill_(skipped, 0.0)
        else:
            chunk_entropy: Tensor | None
            if lse is None:
                if shard is None or here is None:
                    known = row_losses(z, y[rows], options, need_stats=need_stats)
                else:
                    smoothed = options.label_smoothing > 0
                    sums = shard.new_sums(z, len(z), smoothed=smoothed, need_stats=need_stats)
                    shard_sums(z, columns[rows], here[rows], options_here, sums, need_stats)
                    everyones = shard.gather(sums, targets[rows])
                    known = _as_columns(combine(
                        shard, everyones, y[rows, 0], options.weight, weight_sums,
                        options.label_smoothing,
                    ))  # fmt: skip
                parts.append(known)
                chunk_lse, chunk_entropy = known.maximum + known.log_sum, known.entropy
            else:
                chunk_lse, chunk_entropy = lse[rows], None if entropy is None else entropy[rows]
            if not need_gradient or vocab_size == 0:
                continue
            if chunk.dlosses is None:
                chunk = replace(chunk, dlosses=torch.ones_like(chunk_lse))
            factors = row_factors(chunk, chunk_lse, chunk_entropy, y[rows], options, num_classes)
            if here is not None:
                factors = replace(factors, is_here=here[rows])
            write_gradient(z, z, (chunk_lse,), columns[rows], factors, skipped, options_here)
        if need_bias:
            dbias += z.sum(0)
        linear.add(rows, *_rounded(z, columns[rows], operand))
    if shard is not None and need_input:
        if vocab_size == 0:
            linear.dinput.zero_()
        shard.add_up(linear.dinput)
    if factor is not None:
        for gradient in (linear.dinput, linear.dweight, dbias):
            gradient.mul_(factor)
    return _together(parts, ignored, outside), (linear.dinput, linear.dweight, dbias)


def _here(
    shard: Shard, targets: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor, LossOptions]:
    """The columns of ``(N, 1)`` targets, whether they are here, and the options of the columns."""
    columns = targets - shard.first_class
    here = (columns >= 0) & (columns < shard.size)
    if options.weight is not None:
        options = replace(options, weight=shard.of_classes(options.weight))
    return columns.masked_fill_(~here, 0), here, options


def _as_columns(known: KnownOfAll) -> RowLosses:
    return RowLosses(*(x[:, None] for x in vars(known).values()))


def _plain_losses(z: Tensor, targets: Tensor) -> RowLosses:
    """Losses of logits that nothing is done to, and log-probabilities over them.

    In one pass over each row, while it is in the cache; of its lse nothing remains.
    """
    torch.log_softmax(z, 1, out=z)
    losses = z.gather(1, targets).neg_()
    nothing = losses.new_empty(0, 1)
    predictions = torch.empty_like(nothing, dtype=torch.int64)
    return RowLosses(losses, nothing, nothing, nothing, nothing, predictions)


def _together(
    parts: list[RowLosses], ignored: Tensor | None, outside: Tensor | None
) -> Known | None:
    """What is known of each row; None where it was known before."""
    if not parts:
        return None
    known = RowLosses(*map(torch.cat, zip(*(vars(part).values() for part in parts), strict=True)))
    lse = known.maximum + known.log_sum
    if ignored is not None and outside is not None:
        known.mask(ignored, outside)
        lse = lse.masked_fill_(ignored, 0.0) if lse.numel() else lse
    columns = (known.losses, lse, known.logprobs, known.entropy, known.predictions)
    losses, lse, logprobs, entropy, predictions = (x[:, 0] for x in columns)
    return losses, lse, logprobs, entropy, predictions


def _rounded(
    dlogits: Tensor, targets: Tensor, operand: Operand
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """``dlogits`` as :class:`LinearGradients` takes them, which may use up their memory."""
    if operand.dtype == dlogits.dtype:
        return dlogits, None
    rounded = dlogits.mul_(operand.scale).to(operand.dtype)
    lost = dlogits.sub_(rounded)
    at_target = lost.gather(1, targets)
    lost.scatter_(1, targets, 0.0)
    most, least = lost.max(1, keepdim=True), lost.min(1, keepdim=True)
    others = torch.where(most.values >= -least.values, most.indices, least.indices)
    columns = torch.cat([targets, others], 1)
    return rounded, (columns, torch.cat([at_target, lost.gather(1, others)], 1))


def forward_refuses(*args: object) -> None:
    return None


gradients_refuses = forward_refuses
backward_refuses = forward_refuses
