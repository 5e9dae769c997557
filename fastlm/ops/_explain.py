"""Say which backend would run a call, without running it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

from fastlm.ops._dispatch import Choice, weigh

# What each explain() under way has found.  Keyed by its mode, which its tensors carry, because
# autograd runs the backward of CUDA tensors in threads of its own.
_under_way: dict[FakeTensorMode, dict[str, Choice]] = {}


@dataclass(frozen=True)
class Explanation:
    """Which backend serves each operator of a call, and why the others do not.

    Attributes:
        op: Name of the public function.
        steps: Operator step (``"forward"``, ``"backward"``) to its choice.
    """

    op: str
    steps: dict[str, Choice]

    def __str__(self) -> str:
        lines = []
        for step, choice in self.steps.items():
            lines.append(f"{self.op} {step}: {choice.backend or 'no backend takes this call'}")
            lines += [f"  not {name}: {why}" for name, why in choice.refusals.items()]
        return "\n".join(lines)


def note(op: str, step: str, backends: Mapping[str, str], wanted: str, args: Sequence[Any]) -> None:
    """Called by every operator when it is traced; records the choice if an explain() asked."""
    if not _under_way:
        return
    modes = {arg.fake_mode for arg in args if isinstance(arg, FakeTensor)}
    for mode in modes & _under_way.keys():
        _under_way[mode][step] = weigh(op, step, backends, wanted, args)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Trace ``function`` on shapes alone, forward and, where an input needs it, backward.

    No memory is allocated for tensors and nothing is computed.  Arguments are checked as in the
    real call, so a call that would raise raises here.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def faked(tensor: torch.Tensor) -> torch.Tensor:
        return mode.from_tensor(tensor, static_shapes=True)

    steps = _under_way[mode] = {}
    try:
        fake_args, fake_kwargs = tree_map_only(torch.Tensor, faked, (args, kwargs))
        with mode:
            result = function(*fake_args, **fake_kwargs)
            outputs = result if isinstance(result, tuple) else (result,)
            needing = [x for x in outputs if isinstance(x, torch.Tensor) and x.requires_grad]
            if needing:
                torch.autograd.backward(needing, [torch.ones_like(x) for x in needing])
        return Explanation(function.__name__, steps)
    finally:
        del _under_way[mode]
