"""The last layer of a transformers model and its loss in one, computed where the layer is."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from fastlm.ops.linear_cross_entropy import linear_cross_entropy

_STATE = "_fastlm_loss"


class Factor:
    """Stands for a number that a model multiplies or divides its logits by.

    The loss passes it unchanged, since the factor is in it already.
    """

    def __init__(self, value: float, divides: bool, loss: FusedLoss) -> None:
        self.value, self.divides, self.loss = value, divides, loss

    def __rmul__(self, other: Any) -> Any:
        return other if not self.divides and other is self.loss.value else other * self.value

    def __rtruediv__(self, other: Any) -> Any:
        return other if self.divides and other is self.loss.value else other / self.value


@dataclass(frozen=True)
class Epilogue:
    """What a model does to its logits by a number that it holds.

    Attributes:
        holder: Attribute of the model that holds the number; empty for the model itself.
        name: The number's own name.
        kind: ``"softcap"``, which None turns off, or ``"multiply"`` or ``"divide"``.
    """

    holder: str
    name: str
    kind: str

    def of(self, model: nn.Module) -> Any:
        return getattr(model, self.holder, None) if self.holder else model

    def value(self, model: nn.Module) -> float | None:
        value = getattr(self.of(model), "__dict__", {}).get(self.name)  # a property stays as it is
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return cast(float, value) if is_number else None


# Attributes by which the models of transformers scale and cap their logits.
EPILOGUES = (
    Epilogue("config", "final_logit_softcapping", "softcap"),
    Epilogue("config", "output_logit_soft_cap", "softcap"),
    Epilogue("", "logit_scale", "multiply"),
    Epilogue("config", "logits_scaling", "divide"),
    Epilogue("config", "logits_scaling", "multiply"),
    Epilogue("model", "lm_head_multiplier", "multiply"),
)


@dataclass
class LossStatistics:
    """What the fused loss knows of a model's predictions, summed over forward passes.

    Attributes:
        num_items: Predicted tokens, as a tensor on the device; the rest likewise.
        correct: Of these, how many the model found most likely.
        nats: Their negative log-probabilities.
        entropies: The entropies of the distributions that predicted them.
    """

    num_items: Tensor | float = 0.0
    correct: Tensor | float = 0.0
    nats: Tensor | float = 0.0
    entropies: Tensor | float = 0.0

    @property
    def accuracy(self) -> float:
        """Share of tokens that the model found most likely; NaN of none."""
        return self._mean(self.correct)

    @property
    def entropy(self) -> float:
        """Mean entropy of the predictions, in nats."""
        return self._mean(self.entropies)

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean negative log-probability."""
        return float(torch.as_tensor(self._mean(self.nats)).exp())

    def _mean(self, total: Tensor | float) -> float:
        count = float(self.num_items)
        return float(total) / count if count else float("nan")


@dataclass(eq=False, repr=False)
class FusedLoss:
    """The state of a model whose head computes the loss, and its loss function.

    A forward pass in training mode with labels is one in which the head returns the loss, the model
    hands that to its loss function as if it were logits, and this gives it back.

    Attributes:
        head: The last layer.
        original: What the model's loss function was, if it was set.
        scale: Factor of the logits.
        softcap: Their cap, or None.
        epilogues: What is held still meanwhile.
        labels_at: The position of ``labels`` among the arguments of forward.
        pending: The model, labels, whether they are shifted already, and their number, of the pass
            under way.
        value: The loss that the head has computed in it.
        always: Also outside training mode.
        watched: What the head runs on every input first, while it is verified.
        statistics: Those who want to know more than the loss.
    """

    head: nn.Linear
    original: Any
    scale: float
    softcap: float | None
    epilogues: tuple[Epilogue, ...]
    labels_at: int
    pending: tuple[nn.Module, Tensor, bool, Any] | None = None
    value: Tensor | None = None
    always: bool = False
    watched: Callable[[Tensor], Tensor] | None = None
    held: list[Any] = field(default_factory=list)
    statistics: list[LossStatistics] = field(default_factory=list)

    def __call__(
        self, logits: Any, labels: Any = None, vocab_size: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        if self.value is None:
            original = ForCausalLMLoss if self.original is None else self.original
            return original(logits, labels, vocab_size, *args, **kwargs)
        self._let_go()
        if logits is not self.value and not self._is_traced_value(logits):
            raise RuntimeError(
                "fastlm.optimize: the model changes its logits before the loss, which the fused "
                "loss does not have; fastlm.restore(model) gives its own back"
            )
        return self.value

    def _is_traced_value(self, logits: Any) -> bool:
        """Whether a compiler may see the loss times one, having no objects that stand for one."""
        has_factor = any(epilogue.kind != "softcap" for epilogue in self.epilogues)
        return torch.compiler.is_compiling() and has_factor and logits.dim() == 0

    def run(self, input: Tensor) -> Tensor:
        """The loss of the head's logits, of a pass in which it is asked for."""
        assert self.pending is not None
        model, labels, is_shifted, num_items = self.pending
        self.pending = None
        head = self.head
        target = labels.to(input.device)
        options: dict[str, Any] = {
            "linear_bias": head.bias, "softcap": self.softcap, "logit_scale": self.scale,
            "shift": 0 if is_shifted else 1,
        }  # fmt: skip
        if is_shifted:
            target = target.reshape(input.shape[:-1])
        divisor = None
        if isinstance(num_items, Tensor):
            num_items = num_items.to(input.device)
        if isinstance(num_items, float):
            options["reduction"], divisor = "sum", num_items
        elif num_items is not None:
            options["num_items"] = num_items
        if self.statistics:
            loss, stats = linear_cross_entropy(
                input, head.weight, target, return_stats=True, **options
            )
            self._tell(stats, target, is_shifted)
        else:
            loss = linear_cross_entropy(input, head.weight, target, **options)
        if divisor is not None:
            loss = loss / divisor
        # the loss of transformers is float32 whatever the model is
        self.value = loss.float()
        self._hold_still(model)
        return self.value

    def _tell(self, stats: Any, target: Tensor, is_shifted: bool) -> None:
        if not is_shifted:
            target = nn.functional.pad(target[..., 1:], (0, 1), value=-100)
        counted = target != -100
        for told in self.statistics:
            told.num_items = told.num_items + counted.sum().double()
            told.correct = told.correct + ((stats.predictions == target) & counted).sum().double()
            told.nats = told.nats - stats.logprobs.detach().double().sum()
            told.entropies = told.entropies + stats.entropy.detach().double().sum()

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.end()
        labels: Any = kwargs.get("labels")
        if labels is None and len(args) > self.labels_at >= 0:
            labels = args[self.labels_at]
        if labels is None or not (model.training or self.always):
            return
        if kwargs.get("ignore_index", -100) != -100:  # which the fused loss does not take
            return
        to_keep = kwargs.get("logits_to_keep", 0)
        keeps_all = isinstance(to_keep, int) and to_keep == 0
        as_tuple = kwargs.get("return_dict") is False or not getattr(
            model.config, "return_dict", True
        )
        # an adapter may have been put around the head since
        if not keeps_all or as_tuple or model.get_output_embeddings() is not self.head:  # type: ignore[operator]
            return
        if getattr(model, "_is_replica", False):
            raise RuntimeError(
                "fastlm.optimize: nn.DataParallel copies a model in each pass, and copies would "
                "compute with layers of the first; use DistributedDataParallel"
            )
        shifted: Any = kwargs.get("shift_labels")
        is_shifted = shifted is not None
        num_items = kwargs.get("num_items_in_batch")
        self.pending = (model, shifted if is_shifted else labels, is_shifted, num_items)

    def _hold_still(self, model: nn.Module) -> None:
        """From the head to the loss function, which come one after the other: whoever interrupts a
        pass finds the model's numbers as they were."""
        for epilogue in self.epilogues:
            holder = epilogue.of(model)
            self.held.append((holder, epilogue.name, getattr(holder, epilogue.name)))
            neutral: Any = None
            if epilogue.kind != "softcap":
                value = getattr(holder, epilogue.name)
                neutral = Factor(value, epilogue.kind == "divide", self)
                if torch.compiler.is_compiling():
                    neutral = 1.0
            object.__setattr__(holder, epilogue.name, neutral)  # configs check types

    def _let_go(self) -> None:
        for holder, name, value in self.held:
            object.__setattr__(holder, name, value)
        self.held.clear()

    def end(self) -> bool:
        """Everything as between passes; whether the head computed the loss in this one."""
        was_fused = self.value is not None
        self.pending = self.value = None
        self._let_go()
        return was_fused


def before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Hook of the model: a pass begins."""
    model.__dict__[_STATE].begin(model, args, kwargs)


def after(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Hook of the model, also when its forward raises: a pass has ended."""
    if not model.__dict__[_STATE].end() or output is None:
        return output
    # without the tensor that would be taken for logits
    return type(output)(**{name: x for name, x in output.items() if name != "logits"})


def head_forward(loss: FusedLoss, head: nn.Linear, input: Tensor) -> Tensor:
    """What the head does instead of its class's forward."""
    if loss.watched is not None:
        return loss.watched(input)
    return type(head).forward(head, input) if loss.pending is None else loss.run(input)


def is_ours(forward: Any) -> bool:
    """Whether a layer's own forward is that of a head."""
    return isinstance(forward, functools.partial) and forward.func is head_forward


def state_of(model: nn.Module) -> FusedLoss | None:
    return model.__dict__.get(_STATE)


def refusal(model: PreTrainedModel) -> str | None:
    """Why the head cannot compute the loss, as far as it can be seen; or None."""
    head = model.get_output_embeddings()
    if head is None:
        return "the model names no last layer"
    if type(head).forward is not nn.Linear.forward or "forward" in head.__dict__:
        return f"the last layer is a {type(head).__name__}, not a plain nn.Linear"
    forward = inspect.unwrap(type(model).forward)
    if forward.__module__.startswith("liger_kernel") or not _runs(model, forward):
        return "the model's forward was replaced by somebody else"
    if "fused_lm_head" in forward.__code__.co_varnames:
        return "left to TRL, which has a loss of its own"
    if "labels" not in inspect.signature(forward).parameters:
        return "forward takes no labels"
    if model.loss_function is not ForCausalLMLoss:
        return "its loss is not that of causal language models"
    return None


def _runs(model: PreTrainedModel, forward: Any) -> bool:
    """Whether a call of the model ends in ``forward``, wrapped for mixed precision perhaps."""
    own = model.__dict__.get("forward", forward)
    while own is not forward:
        inner = inspect.unwrap(getattr(own, "__func__", own))
        if inner is own:
            return False
        own = inner
    return True


def candidates(model: PreTrainedModel) -> list[tuple[Epilogue, ...]]:
    """What the model may do to its logits, by the numbers it holds; likely first."""
    present = [e for e in EPILOGUES if e.value(model) is not None]
    caps = tuple(e for e in present if e.kind == "softcap")
    factors = [e for e in present if e.kind != "softcap"]
    return [(*caps, factor) for factor in factors] + [caps]


def attach(model: PreTrainedModel, epilogues: tuple[Epilogue, ...]) -> FusedLoss:
    """Let the head of ``model`` compute the loss from now on."""
    head = cast(nn.Linear, model.get_output_embeddings())
    scale, softcap = 1.0, None
    for epilogue in epilogues:
        value = cast(float, epilogue.value(model))
        match epilogue.kind:
            case "softcap":
                softcap = float(value)
            case "multiply":
                scale = float(value)
            case "divide":
                scale = 1.0 / float(value)
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    loss = FusedLoss(
        head, model.__dict__.get("_loss_function"), scale, softcap, epilogues, names.index("labels")
    )
    model.__dict__[_STATE] = loss
    model.loss_function = loss
    head.__dict__["forward"] = functools.partial(head_forward, loss, head)
    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, with_kwargs=True, always_call=True)
    return loss


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`."""
    loss: FusedLoss = model.__dict__.pop(_STATE)
    loss.end()
    del loss.head.__dict__["forward"]
    del model.__dict__["_loss_function"]
    if loss.original is not None:
        model.loss_function = loss.original
    for hooks, hook, extra in (
        (model._forward_pre_hooks, before, [model._forward_pre_hooks_with_kwargs]),
        (
            model._forward_hooks, after,
            [model._forward_hooks_with_kwargs, model._forward_hooks_always_called],
        ),
    ):  # fmt: skip
        for key in [key for key, value in hooks.items() if value is hook]:
            del hooks[key]
            for marks in extra:
                marks.pop(key, None)


@contextlib.contextmanager
def loss_statistics(model: nn.Module) -> Iterator[LossStatistics]:
    """Collect accuracy, entropy and perplexity of a model's fused losses, without logits.

    Of the passes inside the block in which the head computes the loss: with labels, in training
    mode.  Nothing is read on the host until a mean is asked for.

    Raises:
        ValueError: The loss of ``model`` is not fused.
    """
    loss = state_of(base_model(model))
    if loss is None:
        raise ValueError(
            "loss_statistics: model must be one whose loss fastlm.optimize replaced, "
            f"got a {type(model).__name__} whose loss is its own"
        )
    told = LossStatistics()
    loss.statistics.append(told)
    try:
        yield told
    finally:
        loss.statistics[:] = [x for x in loss.statistics if x is not told]


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside adapters of peft."""
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else cast(nn.Module, inner())
