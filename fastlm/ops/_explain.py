"""Say which backend would run a call, without running it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

from fastlm.ops._checks import overrides_torch
from fastlm.ops._dispatch import Choice, weigh


@dataclass(frozen=True)
class Route:
    """Where a function that computes nothing itself sends a call.

    Attributes:
        to: Name of the function that runs.
        why: The reason, half a sentence.
    """

    to: str
    why: str


@dataclass
class Explanation:
    """Which backend serves each operator of a call, and why the others do not.

    Attributes:
        op: Name of the public function.
        steps: Operator step (``"forward"``, ``"backward"``) to its choice.
        route: Where ``op`` sends the call, if it computes nothing itself; one to a function of
            torch has no steps.
    """

    op: str
    steps: dict[str, Choice] = field(default_factory=dict)
    route: Route | None = None

    def __str__(self) -> str:
        lines, op = [], self.op
        if self.route is not None:
            lines.append(f"{op} runs {self.route.to}: {self.route.why}")
            op = self.route.to
        for step, choice in self.steps.items():
            lines.append(f"{op} {step}: {choice.backend or 'no backend takes this call'}")
            lines += [f"  not {name}: {why}" for name, why in choice.refusals.items()]
        return "\n".join(lines)


# What each explain() under way has found.  Keyed by its mode, which its tensors carry, because
# autograd runs the backward of CUDA tensors in threads of its own.
_under_way: dict[FakeTensorMode, Explanation] = {}


def note(op: str, step: str, backends: Mapping[str, str], wanted: str, args: Sequence[Any]) -> None:
    """Called by every operator when it is traced; records the choice if an explain() asked."""
    for explanation in _asking(args):
        explanation.steps[step] = weigh(op, step, backends, wanted, args)


def note_route(args: Sequence[Any], to: str, why: str) -> None:
    """Called by functions that hand their calls on; records where to if an explain() asked."""
    for explanation in _asking(args):
        explanation.route = Route(to, why)


def _asking(args: Sequence[Any]) -> list[Explanation]:
    if not _under_way:
        return []
    modes = {arg.fake_mode for arg in args if isinstance(arg, FakeTensor)}
    return [_under_way[mode] for mode in modes & _under_way.keys()]


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Trace ``function`` on shapes alone, forward and, where an input needs it, backward.

    No memory is allocated for tensors and nothing is computed.  Arguments are checked as in the
    real call, so a call that would raise raises here.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def faked(tensor: torch.Tensor) -> torch.Tensor:
        # a subclass that is something else than its elements stays what it is
        if overrides_torch(tensor):
            return tensor
        return mode.from_tensor(tensor, static_shapes=True)

    explanation = _under_way[mode] = Explanation(function.__name__)
    try:
        fake_args, fake_kwargs = tree_map_only(torch.Tensor, faked, (args, kwargs))
        with mode:
            result = function(*fake_args, **fake_kwargs)
            outputs = result if isinstance(result, tuple) else (result,)
            needing = [x for x in outputs if isinstance(x, torch.Tensor) and x.requires_grad]
            if needing:
                torch.autograd.backward(needing, [torch.ones_like(x) for x in needing])
        return explanation
    finally:
        del _under_way[mode]
