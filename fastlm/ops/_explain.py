"""Say which backend would run a call, without running it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastlm.ops._checks import overrides_torch
from fastlm.ops._dispatch import Choice, weigh


@dataclass(frozen=True)
class Route:
    """Where a function that computes nothing itself sends a call.

    Attributes:
        to: Name of the function that runs.
        why: The reason, half a sentence.
        is_ours: Whether that function has backends.
    """

    to: str
    why: str
    is_ours: bool


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
    if not _under_way:
        return
    modes = {arg.fake_mode for arg in args if isinstance(arg, FakeTensor)}
    for mode in modes & _under_way.keys():
        _under_way[mode].steps[step] = weigh(op, step, backends, wanted, args)


def explain(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    route: Route | None = None,
) -> Explanation:
    """Trace ``function`` on shapes alone, forward and, where an input needs it, backward.

    No memory is allocated for tensors and nothing is computed.  Arguments are checked as in the
    real call, so a call that would raise raises here.

    Where ``function`` hands its calls on, ``route`` is where this one goes.  A call that goes to
    torch with tensors that have versions of torch's functions of their own is not traced.
    """
    explanation = Explanation(function.__name__, route=route)
    if route is not None and not route.is_ours and _has_its_own_functions(args, kwargs):
        return explanation
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def faked(tensor: torch.Tensor) -> torch.Tensor:
        # what is routed by its class, a mask that knows whom it hides, keeps it
        if route is not None and overrides_torch(tensor):
            return tensor
        return mode.from_tensor(tensor, static_shapes=True)

    _under_way[mode] = explanation
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


def _has_its_own_functions(*arguments: Any) -> bool:
    tensors = (x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor))
    return any(overrides_torch(x) or x.is_nested for x in tensors)
