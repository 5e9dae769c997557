"""Cross-entropy by torch's own operators, on CPU a block of rows at a time.

A block stays in the cache from its first pass to its last, so that memory is read, and in the
backward written, once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops.reference.cross_entropy import check_targets, classify

# Logits worked on at once on CPU: 1 MB of float32, what one core's L2 holds.
_CPU_BLOCK = 1 << 18


def forward(input: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    vocab_size = input.shape[-1]
    usual = all_are_classes(target, vocab_size, ignore_index)
    safe = target
    if not usual:
        check_targets("cross_entropy", target, vocab_size, ignore_index)
        ignored, invalid, safe = classify(target, vocab_size, ignore_index)
    logits, targets = input.reshape(-1, vocab_size), safe.reshape(-1, 1)
    dtype = torch.promote_types(input.dtype, torch.float32)
    maximum, log_sum, losses = (input.new_empty(targets.shape, dtype=dtype) for _ in range(3))
    step = _rows_at_once(logits)
    shifted = input.new_empty((min(step, logits.shape[0]), vocab_size), dtype=dtype)
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        x = logits[rows].to(dtype)
        torch.amax(x, 1, keepdim=True, out=maximum[rows])
        z = torch.sub(x, maximum[rows], out=shifted[: x.shape[0]])
        at_target = z.gather(1, targets[rows])
        torch.sum(z.exp_(), 1, keepdim=True, out=log_sum[rows]).log_()
        torch.sub(log_sum[rows], at_target, out=losses[rows])
    maximum.masked_fill_(log_sum.isnan(), torch.nan)
    losses, maximum, log_sum = (x.view(target.shape) for x in (losses, maximum, log_sum))
    if not usual:
        losses.masked_fill_(ignored, 0.0).masked_fill_(invalid, torch.nan)
    return losses, maximum, log_sum


def backward(
    dlosses: Tensor,
    input: Tensor,
    target: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    ignore_index: int,
) -> Tensor:
    vocab_size = input.shape[-1]
    usual = all_are_classes(target, vocab_size, ignore_index)
    weights, safe = dlosses, target
    if not usual:
        ignored, invalid, safe = classify(target, vocab_size, ignore_index)
        weights = dlosses.masked_fill(ignored, 0.0).masked_fill_(invalid, torch.nan)
        ignored = ignored.reshape(-1, 1)
    logits = input.reshape(-1, vocab_size)
    columns = (x.reshape(-1, 1) for x in (weights, safe, maximum, log_sum))
    weights, targets, maximum, log_sum = columns
    dinput = input.new_empty(logits.shape)
    step = _rows_at_once(logits)
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        wide = dinput[rows] if dinput.dtype == maximum.dtype else None
        z = torch.sub(logits[rows].to(maximum.dtype), maximum[rows], out=wide)
        z.sub_(log_sum[rows]).exp_()
        # (p - 1) before the weight: the other order loses p when the target is nearly certain
        z.scatter_(1, targets[rows], -1.0, reduce="add").mul_(weights[rows])
        if not usual:
            # 0 * NaN: an ignored row has gradient zero whatever its logits
            z.masked_fill_(ignored[rows], 0.0)
        if wide is None:
            dinput[rows] = z
    return dinput.view(input.shape)


def all_are_classes(targets: Tensor, vocab_size: int, ignore_index: int) -> bool:
    """Whether no target is ignored or out of range: the usual batch.  Only looks at CPU tensors."""
    if not targets.is_cpu or 0 <= ignore_index < vocab_size or targets.numel() == 0:
        return False
    least, most = targets.aminmax()
    return int(least) >= 0 and int(most) < vocab_size


def _rows_at_once(logits: Tensor) -> int:
    num_rows, vocab_size = logits.shape
    return max(1, _CPU_BLOCK // vocab_size) if logits.is_cpu else max(1, num_rows)


def forward_refuses(*args: object) -> None:
    return None


backward_refuses = forward_refuses
