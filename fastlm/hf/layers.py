"""Norms, gated MLPs and rotary embeddings of transformers' layers, by ours where they are the same.

A layer is recognised by what it consists of, and its class's forward is then compared with ours on
random inputs, small and large, output and gradients.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType, NoneType
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastlm.hf.verify import Verdict, judge
from fastlm.ops.glu import ACTIVATIONS, glu
from fastlm.ops.rms_norm import rms_norm
from fastlm.ops.rotary import apply_rotary

_ROPE = "apply_rotary_pos_emb"
# Sizes of random inputs: of no meaning but for odd ones, which no two dimensions share.
_ROWS, _WIDTH, _INNER = 7, 12, 10
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@dataclass
class Swap:
    """A layer and what may take the place of its forward.

    Attributes:
        kind: ``"norm"``, ``"mlp"`` or ``"rope"``.
        module: The layer.
        forward: Ours, or None.
        verdict: What comparing them found.
    """

    kind: str
    module: nn.Module
    forward: Callable[..., Any] | None
    verdict: Verdict


def swaps(model: nn.Module, kind: str) -> Iterator[Swap]:
    """Every layer of a kind, with what may take its place or why nothing may."""
    known: dict[Any, Verdict] = {}
    finder = {"norm": _norm, "mlp": _mlp, "rope": _rope}[kind]
    for module in model.modules():
        if "forward" not in module.__dict__ and (swap := finder(module, known)):
            yield swap


def _reads(forward: Any, *words: str) -> bool:
    names = inspect.unwrap(forward).__code__.co_names
    return any(word in name for name in names for word in words)


def _takes_one(module: nn.Module) -> bool:
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return len(parameters) == 1 and parameters[0].kind is parameters[0].POSITIONAL_OR_KEYWORD


def _settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """What tells the forward of a layer from that of another of its class: numbers and words by
    value, anything else by what it is."""
    return tuple(
        (name, x if isinstance(x, (int, float, str, NoneType)) else id(x))
        for name, x in sorted(vars(module).items())
        if name not in _OF_EVERY_MODULE
    )


# Root-mean-square norms


def _norm(module: nn.Module, known: dict[Any, Verdict]) -> Swap | None:
    if "RMSNorm" not in type(module).__name__ or next(module.children(), None) is not None:
        return None
    names = [n for n in ("variance_epsilon", "eps", "epsilon", "norm_eps") if hasattr(module, n)]
    weight = dict(module.named_parameters())
    if not names or set(weight) != {"weight"} or weight["weight"].dim() != 1:
        return Swap("norm", module, None, Verdict("it is no norm with a weight and an epsilon"))
    if not _takes_one(module) or _reads(type(module).forward, "dropout", "training"):
        return Swap("norm", module, None, Verdict("its forward does more than normalise"))
    name = names[0]
    if not isinstance(getattr(module, name), float):
        return Swap("norm", module, None, Verdict("its epsilon is no number"))
    for offset in (0.0, 1.0):
        key = (type(module), _settings(module), name, offset)
        if key not in known:
            known[key] = _judge_norm(module, name, offset)
        forward = functools.partial(norm_forward, module, name, offset)
        if known[key].why is None:
            return Swap("norm", module, forward, known[key])
    return Swap("norm", module, None, known[key])


def norm_forward(module: nn.Module, eps: str, offset: float, input: Tensor) -> Tensor:
    weight = cast(Tensor, module.weight)
    if input.dtype != weight.dtype or input.shape[-1:] != weight.shape:
        return type(module).forward(module, input)  # which promotes, or normalises groups
    return cast(Tensor, rms_norm(input, weight, getattr(module, eps), weight_offset=offset))


def _judge_norm(module: nn.Module, eps: str, offset: float) -> Verdict:
    small = _alone(module)
    small.weight = nn.Parameter(torch.empty(0))

    def with_weight(function: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
        small._parameters["weight"] = cast(nn.Parameter, weight)
        return function(x)

    theirs = functools.partial(type(module).forward, small)
    ours = functools.partial(norm_forward, small, eps, offset)
    inputs = [(x, _random(_WIDTH, seed=2)) for x in _small_and_large(_ROWS, _WIDTH)]
    return judge(
        functools.partial(with_weight, ours), functools.partial(with_weight, theirs), inputs
    )


# Gated linear units


def _mlp(module: nn.Module, known: dict[Any, Verdict]) -> Swap | None:
    children = dict(module.named_children())
    activation = next((n for n in ("act_fn", "activation_fn", "act") if hasattr(module, n)), None)
    projections = set(children) - {activation}
    if projections not in ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"}):
        return None
    if activation is None or next(module.parameters(recurse=False), None) is not None:
        return Swap("mlp", module, None, Verdict("its activation is none of its attributes"))
    if not _takes_one(module) or _reads(type(module).forward, "dropout", "training"):
        return Swap("mlp", module, None, Verdict("its forward does more than a gated unit"))
    chosen = _activation(getattr(module, activation))
    if chosen is None:
        return Swap("mlp", module, None, Verdict("its activation is none of ours"))
    key = (type(module), _settings(module), chosen, tuple(sorted(projections)))
    if key not in known:
        known[key] = _judge_mlp(module, chosen)
    forward = functools.partial(mlp_forward, module, chosen)
    return Swap("mlp", module, forward if known[key].why is None else None, known[key])


def mlp_forward(module: Any, activation: str, input: Tensor) -> Tensor:
    if "gate_up_proj" in module._modules:
        gate, up = module.gate_up_proj(input).chunk(2, dim=-1)
    else:
        gate, up = module.gate_proj(input), module.up_proj(input)
    return module.down_proj(glu(gate, up, activation))


def _activation(function: Any) -> str | None:
    """Which of ours a function is: to rounding, as bits depend on how it is written."""
    at = torch.linspace(-20, 20, 401, dtype=torch.float64)
    for name in ACTIVATIONS:
        found = function(at)
        wanted = glu(at, torch.ones_like(at), name)
        if found.dtype == at.dtype and torch.allclose(found, wanted, rtol=1e-12, atol=1e-12):
            return name
    return None


def _judge_mlp(module: nn.Module, activation: str) -> Verdict:
    """Of its class's forward, with projections of another size in the place of its own."""
    small = _alone(module)
    sizes = {
        "gate_proj": (_INNER, _WIDTH), "up_proj": (_INNER, _WIDTH), "down_proj": (_WIDTH, _INNER),
        "gate_up_proj": (2 * _INNER, _WIDTH),
    }  # fmt: skip
    names = [name for name in sizes if name in small._modules]
    weights = [_random(*sizes[name], seed=at) for at, name in enumerate(names)]

    def with_weights(function: Callable[..., Tensor], x: Tensor, *weights: Tensor) -> Tensor:
        for name, weight in zip(names, weights, strict=True):
            small._modules[name] = _Product(weight)
        return function(small, x)

    def ours(module: nn.Module, x: Tensor) -> Tensor:
        return mlp_forward(module, activation, x)

    inputs = [(x, *weights) for x in _small_and_large(_ROWS, _WIDTH)]
    theirs = type(module).forward
    return judge(
        functools.partial(with_weights, ours), functools.partial(with_weights, theirs), inputs
    )


class _Product(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight: Tensor
        self.__dict__["weight"] = weight

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T


# Rotary embeddings

# Whoever listens to the rotations of this thread: gets file's function, arguments and our results.
RopeListener = Callable[[Callable[..., Any], tuple[Tensor, ...], tuple[Tensor, Tensor]], None]
rope_listener: ContextVar[RopeListener | None] = ContextVar("fastlm_rope_listener", default=None)
# Class of layers -> its forward, with our rotation under the name of the file's.
_rotated: dict[type, Callable[..., Any]] = {}


@dataclass(frozen=True)
class Rotation:
    """In place of a file's ``apply_rotary_pos_emb``, in the eyes of one layer's forward.

    Attributes:
        theirs: The file's function.
        interleaved: Whether that pairs neighbours.
    """

    theirs: Callable[..., Any]
    interleaved: bool

    def __call__(self, query: Any, key: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = (query, key, cos, sin)
        dim = args[-1] if args else kwargs.get("unsqueeze_dim", 1)
        if len(args) > 1 or set(kwargs) - {"unsqueeze_dim"} or not _can_rotate(*tensors, dim):
            return self.theirs(*tensors, *args, **kwargs)
        half = cos.shape[-1] // 2
        angles = slice(None, None, 2) if self.interleaved else slice(half)
        cos, sin = (x[0] if x.shape[0] == 1 else x for x in (cos[..., angles], sin[..., angles]))
        if dim == 1:
            query, key = query.transpose(1, 2), key.transpose(1, 2)
        out = apply_rotary(query, key, cos, sin, interleaved=self.interleaved)
        if dim == 1:
            out = (out[0].transpose(1, 2), out[1].transpose(1, 2))
        if not torch.compiler.is_compiling() and (listener := rope_listener.get()) is not None:
            listener(functools.partial(self.theirs, *args, **kwargs), tensors, out)
        return out


def _can_rotate(query: Any, key: Any, cos: Any, sin: Any, dim: Any) -> bool:
    if dim not in (1, 2) or not all(isinstance(x, Tensor) for x in (query, key, cos, sin)):
        return False
    length = query.shape[-2] if dim == 1 else query.shape[-3]
    return (
        query.dim() == key.dim() == 4
        and cos.dim() == sin.dim() == 3
        and cos.shape == sin.shape
        and cos.shape[0] in (1, query.shape[0])
        and cos.shape[1] == length
        and cos.shape[2] == query.shape[3] == key.shape[3]
        and query.dtype == key.dtype == cos.dtype == sin.dtype
        and not (cos.requires_grad or sin.requires_grad)
    )


def is_ours(forward: Any) -> bool:
    """Whether a layer's own forward is one of these."""
    if isinstance(forward, functools.partial):
        return forward.func in (norm_forward, mlp_forward)
    return isinstance(forward, RotatedForward)


class RotatedForward:
    """The forward of an attention layer that finds our rotation where it looks for its file's."""

    def __init__(self, module: nn.Module, layer: type, interleaved: bool) -> None:
        self.module, self.layer, self.interleaved = module, layer, interleaved
        _rotate(layer, interleaved)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _rotate(self.layer, self.interleaved)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _rotated[self.layer](self.module, *args, **kwargs)


def _rotate(layer: type, interleaved: bool) -> None:
    if layer not in _rotated:
        forward = cast(FunctionType, layer.forward)  # type: ignore[attr-defined]
        ours = Rotation(forward.__globals__[_ROPE], interleaved)
        # under no name: a compiler would look the others up in the module of that name
        names = {k: v for k, v in forward.__globals__.items() if k != "__name__"}
        rotated = FunctionType(
            forward.__code__, {**names, _ROPE: ours}, forward.__name__, forward.__defaults__,
            forward.__closure__,
        )  # fmt: skip
        rotated.__kwdefaults__ = forward.__kwdefaults__
        _rotated[layer] = rotated


def _rope(module: nn.Module, known: dict[Any, Verdict]) -> Swap | None:
    forward = type(module).forward
    if not _reads(forward, _ROPE):
        return None
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
        return Swap("rope", module, None, Verdict("its forward is wrapped"))
    theirs = forward.__globals__.get(_ROPE)
    if not isinstance(theirs, FunctionType):
        return Swap("rope", module, None, Verdict("its rotation is no plain function"))
    for interleaved in (False, True):
        key = (theirs, interleaved)
        if key not in known:
            known[key] = _judge_rope(theirs, interleaved)
        if known[key].why is None:
            ours = RotatedForward(module, type(module), interleaved)
            return Swap("rope", module, ours, known[key])
    return Swap("rope", module, None, known[key])


def _judge_rope(theirs: Callable[..., Any], interleaved: bool) -> Verdict:
    ours = Rotation(theirs, interleaved)
    batch, heads, length, head_dim = 2, 3, 5, 8
    angles = 3 * _random(batch, length, head_dim // 2, seed=3)
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    names = list(inspect.signature(theirs).parameters)
    if names[:4] != ["q", "k", "cos", "sin"]:
        return Verdict("its rotation takes other arguments")

    def rotated(function: Callable[..., Any], query: Tensor, key: Tensor) -> Tensor:
        cos, sin = (f(angles).to(query.dtype) for f in (torch.cos, torch.sin))
        return torch.cat(function(query, key, cos, sin), 1)

    query, key = _random(batch, heads, length, head_dim), _random(batch, 1, length, head_dim)
    return judge(
        functools.partial(rotated, ours), functools.partial(rotated, theirs), [(query, key)]
    )


def _alone(module: nn.Module) -> Any:
    """A copy of the layer itself, which shares its numbers and whose parts can be exchanged."""
    alone = copy.copy(module)
    alone.__dict__ = {
        name: dict(value) if name in ("_parameters", "_modules", "_buffers") else value
        for name, value in module.__dict__.items()
    }
    return alone


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _small_and_large(*shape: int) -> list[Tensor]:
    """The large reaches what only large values do: limits that a layer clamps at."""
    return [_random(*shape), 50 * _random(*shape, seed=1)]
