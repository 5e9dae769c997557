"""Register an op with PyTorch.  The only file that defines operators."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from fastlm.ops import _checked, _explain
from fastlm.ops._checks import PLAIN
from fastlm.ops._dispatch import choose, first_asked

# Library.define, not custom_op: half the cost of an eager call, which decoding pays in every layer.
_library = torch.library.Library("fastlm", "DEF")
# Arguments that nothing intercepts, being no tensors; a number that a compiler traces is another.
_VALUES = frozenset((type(None), bool, int, float, str))


def define_op(
    op: str,
    step: str,
    backends: Mapping[str, str],
    *,
    fake: Callable[..., Any],
    mutates: Iterable[str] = (),
) -> Callable[..., Any]:
    """Register ``torch.ops.fastlm.<op>_<step>`` and return a function that calls it.

    The operator has no gradient of its own.  The annotations of the ``"reference"`` backend give
    the schema; a string ``backend`` is added last.

    Args:
        op: Name of the public function.
        step: ``"forward"``, ``"backward"``, or another function of every backend module; its first
            argument is a tensor.
        backends: Name of each backend to the module that implements it, preferred first.
        fake: Same arguments; returns empty outputs of the right shape, dtype and device.
        mutates: Names of arguments written in place.  The ``"reference"`` module then has a
            ``written_<step>``, which :func:`fastlm.ops._checked.run` asks.
    """
    definition = getattr(importlib.import_module(backends["reference"]), step)
    mutates = tuple(mutates)
    schema = torch.library.infer_schema(definition, mutates_args=mutates)
    arguments, returns = schema.rsplit(") -> ", 1)
    written = [
        at for at, name in enumerate(inspect.signature(definition).parameters) if name in mutates
    ]
    name = f"{op}_{step}"
    _library.define(f"{name}{arguments}, str backend) -> {returns}")
    registered = getattr(torch.ops.fastlm, name).default

    def run(*args: Any) -> Any:
        inputs, wanted = args[:-1], args[-1]
        if torch._C._is_any_autocast_enabled():
            device_type = inputs[0].device.type
            if torch.is_autocast_enabled(device_type):
                # it has cast the inputs where it should; inside, dtypes are chosen
                with torch.autocast(device_type, enabled=False):
                    return run(*args)
        chosen, implementation = choose(op, step, backends, wanted, inputs)
        if chosen != "reference" and _checked.is_on():
            results = _checked.run(op, step, chosen, implementation, definition, inputs, written)
        else:
            results = implementation(*inputs)
        for at in written:
            # a kernel writes unseen by autograd, which must not take what it saved for what it saw
            if inputs[at] is not None and not inputs[at].is_inference():
                torch.autograd.graph.increment_version(inputs[at])
        return results

    def run_fake(*args: Any) -> Any:
        *inputs, wanted = args
        _explain.note(op, step, backends, wanted, inputs)
        return fake(*inputs)

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(registered, run_fake, lib=_library)

    def call(*args: Any) -> Any:
        return run(*args) if _nothing_intercepts(args) else registered(*args)

    return call


def may_be_left_to(
    name: str, backends: Mapping[str, str], wanted: str, args: Sequence[Any]
) -> bool:
    """Whether an eager call runs on backend ``name`` if that takes it, and nobody sees how.

    An op may then leave the call to torch, gradient and all, instead of its operators.  Not under
    hooks on what is saved: what checkpointing computes again must save the same tensors as before,
    even if only one of the two is watched.
    """
    return (
        first_asked(backends, wanted, args) == name
        and _nothing_intercepts(args)
        and not _checked.is_on()
        and not torch._C._is_any_autocast_enabled()
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    )


def _nothing_intercepts(args: Sequence[Any]) -> bool:
    """Whether the dispatcher would find no one to ask on its way to the implementation.

    Then an eager call goes there directly: through the dispatcher and back to Python takes longer
    than the rest of a small call.  Compilers, tensor subclasses, modes, functorch's transforms,
    batched gradients, views that negate and the profiler see the operator.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd._profiler_enabled()
    ):
        return False
    for x in args:
        if type(x) not in _VALUES and (
            type(x) not in PLAIN
            or not (x.is_cpu or x.is_cuda)
            or x.is_neg()
            or torch._C._functorch.is_legacy_batchedtensor(x)
        ):
            return False
    return True
