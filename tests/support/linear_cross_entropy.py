"""Inputs, oracle and forced sizes for the tests of linear_cross_entropy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm
from fastlm import testing
from fastlm.kernels._chunks import Operand, Upstream
from fastlm.kernels._launch import accumulator, launch
from fastlm.kernels.linear_cross_entropy import chunk, tuning

DRIVER = "fastlm.kernels._linear_loss"
EAGER = "fastlm.ops.eager.linear_cross_entropy"
# ignore_index, label_smoothing, softcap, logit_scale
NO_OPTIONS = (-100, 0.0, None, 1.0)


def inputs(
    rows: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    ignored: float = 0.25,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, weight, bias and targets; half of the targets have the largest logit of their row."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, hidden_size, generator=generator)
    weight = 2 * torch.randn(vocab_size, hidden_size, generator=generator) / hidden_size**0.5
    bias = torch.randn(vocab_size, generator=generator)
    targets = torch.randint(vocab_size, (rows,), generator=generator)
    agreeing = torch.rand(rows, generator=generator) < 0.5
    targets = torch.where(agreeing, (x @ weight.t() + bias).argmax(-1), targets)
    targets[torch.rand(rows, generator=generator) < ignored] = -100
    if rows:
        targets[0] = 0
    return (*(t.to(device, dtype) for t in (x, weight, bias)), targets.to(device))


def likely(
    dtype: torch.dtype,
    device: str,
    *,
    classes: int = 2,
    common: float = 0.0,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eight rows that leave a choice of some ``classes``; every second target is another.

    Args:
        dtype: Of all but the targets.
        device: Of all.
        classes: How many share the probability.
        common: Length of a direction that the rows of the weight share; they are about 1 long.
        seed: Other numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 16, generator=generator)
    weight = torch.randn(200, 16, generator=generator) / 4.0
    bias = torch.randn(200, generator=generator)
    some = torch.randperm(200, generator=generator)[:classes]
    bias[some] += 9.0
    targets = some[torch.randint(classes, (8,), generator=generator)]
    targets[::2] = torch.randint(200, (4,), generator=generator)
    if common:
        direction = torch.randn(16, generator=generator)
        weight += common * direction / direction.norm()
    return (*(t.to(device, dtype) for t in (x, weight, bias)), targets.to(device))


def definition(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, **options: Any
) -> Tensor:
    """Torch's own, classes in the last dimension."""
    logits = F.linear(x, weight, bias)
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), **options)
    return losses.view(targets.shape) if options.get("reduction") == "none" else losses


def ours(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, **options: Any) -> Tensor:
    return fastlm.linear_cross_entropy(x, weight, targets, linear_bias=bias, **options)


def judge(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    backend: str,
    **options: Any,
) -> None:
    """Loss and every gradient by the tolerance rule; torch is the truth and the yardstick."""
    arguments = (x, weight, bias, targets)
    actual = testing.run(ours, *arguments, backend=backend, **options)
    wide = torch.promote_types(x.dtype, torch.float32)
    plain = testing.run(definition, *arguments, dtype=wide, **options)
    truth = testing.run(definition, *arguments, dtype=torch.float64, **options)
    assert actual[0] is not None and actual[0].dtype == wide
    testing.assert_all_as_accurate(backend, actual, plain=plain, truth=truth)


def assert_same_bits(actual: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for position, (got, want) in enumerate(zip(actual, expected, strict=True)):
        assert (got is None) == (want is None), position
        if got is not None and want is not None:
            same = (got == want) | (got.isnan() & want.isnan())
            assert same.all(), f"result {position} differs"


def plain_loss(bias: Tensor | None) -> chunk.Loss:
    return chunk.Loss(bias, None, None, *NO_OPTIONS)


def gradient_of_chunk(
    logits: Tensor, operand: Operand, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, lse and the gradient of their sum, by the kernel itself; over the logits."""
    rows = chunk.Rows.empty(logits, len(logits), torch.float32, need_stats=False)
    dlogits, _ = chunk.launch_gradient(
        logits, operand, targets, plain_loss(bias), Upstream(), rows, lse_is_known=False
    )
    return rows.losses, rows.lse, dlogits


def assert_gives_back_what_is_lost(
    dtype: torch.dtype, block_v: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """That a gradient is the wide one rounded, with what that took at the target and elsewhere.

    Returns the wide gradient, the targets, and what must be given back.
    """
    x, weight, bias, targets = inputs(9, 5, 150, ignored=0)

    def run(dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        rows = chunk.Rows.empty(x, len(x), torch.float32, need_stats=False)
        logits, operand = x @ weight.t(), Operand(dtype)
        with forced(block_v=block_v):
            return chunk.launch_gradient(
                logits, operand, targets, plain_loss(bias), Upstream(), rows, lse_is_known=False
            )

    exact, nothing = run(torch.float32)
    assert nothing is None
    rounded, lost = run(dtype)
    assert torch.equal(rounded, exact.to(dtype))
    differences = exact - rounded.float()
    at_target = differences.gather(1, targets[:, None])
    differences.scatter_(1, targets[:, None], 0.0)
    other = differences.abs().argmax(1, keepdim=True)
    assert (differences.gather(1, other) != 0).all()
    columns = torch.cat([targets[:, None], other], 1)
    want = columns, torch.cat([at_target, differences.gather(1, other)], 1)
    assert lost is not None and all(map(torch.equal, lost, want))
    return exact, targets, want


def run_kernel(kernel: Any, grid: tuple[int, ...], **given: Any) -> None:
    """Launch with what is ``given`` by name; nothing is asked for by the other arguments."""
    others = {"ignore_index": -100, "label_smoothing": 0.0, "softcap": 0.0, "logit_scale": 1.0,
              "first_class": 0, "num_classes": given["vocab_size"],
              "SCALE": 1.0, "ACC": accumulator(torch.float32)}  # fmt: skip
    values = {}
    for name in kernel.arg_names:
        unused = given["logits_ptr"] if name.endswith("_ptr") else False
        values[name] = given.get(name, others.get(name, unused))
    arguments = [value for name, value in values.items() if not name.isupper()]
    constants = {name: value for name, value in values.items() if name.isupper()}
    launch(kernel, grid, *arguments, **constants, num_warps=1, num_stages=1)


@contextlib.contextmanager
def forced(*, rows: int | None = None, block_v: int | None = None) -> Iterator[None]:
    """Chunks of ``rows`` rows, and kernels with blocks of ``block_v``."""
    with contextlib.ExitStack() as stack:
        if rows is not None:
            for module in (DRIVER, EAGER):
                patch = mock.patch(f"{module}.rows_per_chunk", lambda *shapes: rows)
                stack.enter_context(patch)
        if block_v is not None:
            plan = tuning.Plan(block_v=block_v, num_warps=1)
            tables = dict.fromkeys(tuning.TABLES, ((1 << 62, plan),))
            stack.enter_context(mock.patch.dict(tuning.TABLES, tables))
            bias = tuning.BiasPlan(block_r=4, block_v=block_v, num_warps=1)
            stack.enter_context(mock.patch.object(tuning, "BIAS", bias))
        yield


class NothingLarge(TorchDispatchMode):
    """Refuses every new tensor of ``limit`` elements or more."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            # bytes are what the poisoning of memory writes
            large = isinstance(tensor, Tensor) and tensor.numel() >= self.limit
            if large and tensor.dtype != torch.uint8:
                raise AssertionError(f"{func} gives {tuple(tensor.shape)}")
        return out
