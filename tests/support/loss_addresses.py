"""Where the kernels of cross_entropy may read and write, whatever language they are written in.

``door`` is a backend module: the kernels, or what calls them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.cross_entropy import kernels_backward, kernels_forward
from support.layouts import layouts
from support.memory import guarded, sparse

from fastlm.testing import assert_as_accurate, cross_entropy_inputs

HUGE = 2**30 + 64
# shape and strides, all with elements beyond 2^31
FAR = {
    "rows": ((3, 40), (HUGE, 1)),
    "outer": ((3, 2, 40), (HUGE, 40, 1)),
    "inner": ((2, 3, 40), (40, HUGE, 1)),
    "few classes": ((2, 3), (3, HUGE)),
    "many classes": ((2, 40), (1, 2**26 + 3)),
}
# a gradient of 2^31 + 20 elements
MANY_ROWS, FEW_CLASSES = 2**27 + 2, 16


def run_guarded(door: Any, end: str, dtype: torch.dtype, sizes: Sequence[int]) -> None:
    """Both kernels, every tensor they are given and every one they make at a protected page."""
    make = torch.empty
    for vocab_size in sizes:
        logits, targets = cross_entropy_inputs(4, vocab_size, dtype)
        targets[0] = vocab_size - 1
        for _, view in layouts(logits):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "empty", lambda *a, **k: guarded(make(*a, **k), end))
                patch.setattr(torch, "empty_like", lambda x: guarded(make(x.shape), end))
                x, y = guarded(view, end), guarded(targets, end)
                losses, *saved = kernels_forward(x, y, door)
                upstream = guarded(torch.ones(4), end)
                gradient = kernels_backward(upstream, x, y, *saved, door=door)
            assert losses.isfinite().all()
            assert gradient.isfinite().all()


def check_bad_target(door: Any, bad: int, end: str, vocab_size: int) -> None:
    """A target out of range makes its row NaN and nothing else."""
    logits, _ = cross_entropy_inputs(3, vocab_size)
    good = torch.tensor([1, 2, 3])
    x, y = guarded(logits, end), guarded(torch.tensor([1, bad, 3]), end)
    losses, *saved = kernels_forward(x, y, door)
    gradient = kernels_backward(torch.ones(3), x, y, *saved, door=door)
    want, *want_saved = kernels_forward(x, good, door)
    want_gradient = kernels_backward(torch.ones(3), x, good, *want_saved, door=door)
    assert losses.isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(-1).tolist() == [False, True, False]
    for row in (0, 2):
        assert torch.equal(losses[row], want[row])
        assert torch.equal(gradient[row], want_gradient[row])


def check_far(
    door: Any, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Elements that are far apart count like those of a tensor without gaps."""
    values = torch.randn(shape).to(dtype)
    targets = torch.randint(shape[-1], shape[:-1])
    x = sparse(shape, strides, dtype).copy_(values)
    assert 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) > 2**31
    losses, *saved = kernels_forward(x, targets, door)
    gradient = kernels_backward(torch.ones_like(losses), x, targets, *saved, door=door)
    want, *want_saved = kernels_forward(values, targets, door)
    assert torch.equal(losses, want)
    want_gradient = kernels_backward(torch.ones_like(want), values, targets, *want_saved, door=door)
    assert torch.equal(gradient, want_gradient)


def check_far_gradient(door: Any, ends: Sequence[int]) -> None:
    """Rows ``ends`` of a gradient that takes no memory in between.

    The caller sees to it that these alone are computed.
    """
    logits = torch.randn(1, FEW_CLASSES).half().expand(MANY_ROWS, FEW_CLASSES)
    targets = sparse((MANY_ROWS,), (1,), torch.int64)
    upstream, maximum, log_sum = (sparse((MANY_ROWS,), (1,), torch.float32) for _ in range(3))
    for row in ends:
        upstream[row] = 1.0
        maximum[row] = logits[0].max()
        log_sum[row] = (logits[0].float() - logits[0].max()).exp().sum().log()
    made = sparse((MANY_ROWS, FEW_CLASSES), (FEW_CLASSES, 1), torch.float16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *a, **k: made)
        gradient = kernels_backward(upstream, logits, targets, maximum, log_sum, door)
    exact = torch.softmax(logits[0].double(), -1)
    exact[0] -= 1
    for row in ends:
        assert_as_accurate("row", gradient[row], plain=exact.half(), truth=exact)
