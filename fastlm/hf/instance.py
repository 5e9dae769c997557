"""Make one transformers model faster, say what was done, and undo it."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from fastlm.functional import explain
from fastlm.hf import loss as fused
from fastlm.hf.attention import NAME, Attention, Call, attention_forward, listening
from fastlm.hf.layers import is_ours, rope_listener, swaps
from fastlm.hf.report import Report, Row, count
from fastlm.hf.verify import SURPRISES, Verdict, agree, first_line

_CHANGES = "_fastlm_changes"
# Of the tokens that a model is tried on: few, but of two rows, the second with padding at its end.
_ROWS, _LENGTH, _PADDED = 2, 16, 3
# Logits and scores are brought to this deviation, where caps and sinks cannot hide.
_SPREAD = 6.0


@dataclass
class _Changes:
    """What was done to a model, to be undone.

    Attributes:
        configs: Configs, the copies that have taken their place, and what these held then.
        places: Modules and the config that each had.
    """

    configs: list[tuple[Any, Any, dict[str, Any]]] = field(default_factory=list)
    places: list[tuple[nn.Module, Any]] = field(default_factory=list)

    def give_back_configs(self) -> None:
        """The configs that were there, with what was changed since in their copies."""
        for config, own, then in self.configs:
            for name, value in vars(own).items():
                of_ours = name.startswith("_attn_implementation")
                if of_ours or isinstance(value, PreTrainedConfig):
                    continue
                if name not in then or then[name] is not value:
                    config.__dict__[name] = value
        for module, config in self.places:
            module.__dict__["config"] = config
        self.configs.clear()
        self.places.clear()


def optimize(
    model: nn.Module,
    *,
    attention: bool = True,
    loss: bool = True,
    norm: bool = True,
    rope: bool = True,
    mlp: bool = True,
    verify: bool = True,
    strict: bool = False,
) -> Report:
    """Compute parts of a transformers model by fastlm, where that is exact; prints what it did.

    Of this instance alone: no class, function or other model is changed, and its parameters stay
    its own.  :func:`restore` undoes it.  A layer is replaced if it is built as one that is known
    and, with ``verify``, gives what it gave: attention and the loss on a few random tokens, norms,
    rotary embeddings and MLPs on random inputs, by the rule that fastlm's kernels are judged by
    (at most about twice the error of the model's own code against float64).  What is not replaced
    stays as it was.

    - attention: ``attn_implementation="fastlm"``, on a copy of the config.  Calls that are not
      causal attention go to torch's or the model's own function; :func:`fastlm.hf.explain` says
      which.
    - loss: where labels are given in training mode, the last layer and the loss are
      :func:`fastlm.linear_cross_entropy`, inside the layer's own forward, so that sharded
      parameters are there; ``outputs.logits`` is then None.  Takes ``labels``, ``shift_labels`` and
      ``num_items_in_batch``.
    - norm, mlp: :func:`fastlm.rms_norm` and :func:`fastlm.glu` in each layer's forward.
    - rope: :func:`fastlm.apply_rotary` in a copy of the attention layer's forward.

    Args:
        model: A causal language model of transformers, or one inside adapters of peft.
        attention: Replace attention.
        loss: Replace the last layer and the loss.
        norm: Replace root-mean-square norms.
        rope: Replace rotary embeddings.
        mlp: Replace gated linear units.
        verify: Run the model on a few tokens and compare.  Without, attention, rotations and a
            loss of logits without factors are taken for what they are built like.
        strict: Raise where nothing could be replaced.

    Returns:
        What was replaced, what was not and why; true if anything was.

    Raises:
        TypeError: ``model`` is no model of transformers.
        RuntimeError: Nothing could be replaced and ``strict`` is set.
    """
    base = _transformers_model("optimize", model)
    if is_optimized(base):
        restore(base)
    changes = base.__dict__[_CHANGES] = _Changes()
    rows = []
    with _standing_still(base):
        for kind, wanted in (("norm", norm), ("rope", rope), ("mlp", mlp)):
            if wanted:
                rows.append(_replace_layers(base, kind, verify, changes))
        if attention:
            rows.insert(0, _replace_attention(base, verify, changes))
        if loss:
            rows.insert(int(attention), _replace_loss(base, verify))
    report = Report(type(base).__name__, tuple(rows))
    print(report)
    if not report:
        restore(base)
        message = f"fastlm.optimize replaced nothing in {report.model}\n{report}"
        if strict:
            raise RuntimeError(message)
        warnings.warn(message, stacklevel=2)
    return report


def is_optimized(model: nn.Module) -> bool:
    """Whether :func:`optimize` has changed the model, and nothing has undone it."""
    return _CHANGES in fused.base_model(model).__dict__


def restore(model: nn.Module) -> None:
    """Undo :func:`optimize`: every attribute, hook and config is what it was.

    A model that is not optimized is left alone.

    Raises:
        TypeError: ``model`` is no model of transformers.
    """
    base = _transformers_model("restore", model)
    changes: _Changes | None = base.__dict__.pop(_CHANGES, None)
    if changes is None:
        return
    if fused.state_of(base) is not None:
        fused.detach(base)
    # also of copies that adapters have made of layers
    for module in base.modules():
        forward = module.__dict__.get("forward")
        if is_ours(forward) or fused.is_ours(forward):
            del module.__dict__["forward"]
    changes.give_back_configs()


@contextlib.contextmanager
def optimized(model: nn.Module, **options: Any) -> Iterator[Report]:
    """:func:`optimize` for the length of a ``with`` block, with the same options."""
    report = optimize(model, **options)
    try:
        yield report
    finally:
        restore(model)


@dataclass(frozen=True)
class Routes:
    """Where the attention of a forward pass went.

    Attributes:
        calls: Name of each layer, who attended, and why not ours or None; in order.
    """

    calls: tuple[tuple[str, str, str | None], ...]

    def __str__(self) -> str:
        lines = [f"{name}: {to}" + (f", {why}" if why else "") for name, to, why in self.calls]
        return "\n".join(lines) or "no layer asked for attn_implementation='fastlm'"


def explain_attention(model: nn.Module, *args: Any, **kwargs: Any) -> Routes:
    """Run ``model(*args, **kwargs)`` and say where each call of attention went, and why."""
    names = {module: name for name, module in model.named_modules()}
    calls = []

    def listener(call: Call, *_: Any) -> None:
        calls.append((names.get(call.module, "?"), call.to, call.why))

    with listening(listener):
        model(*args, **kwargs)
    return Routes(tuple(calls))


def _transformers_model(what: str, model: nn.Module) -> PreTrainedModel:
    base = fused.base_model(model) if isinstance(model, nn.Module) else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"{what}: model must be a PreTrainedModel of transformers, got {type(base).__name__}"
        )
    return base


@contextlib.contextmanager
def _standing_still(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, and everything as it was afterwards: modes and random numbers."""
    was_training = [module for module in model.modules() if module.training]
    for module in was_training:
        module.training = False
    devices = [x for x in {p.device for p in model.parameters()} if x.type == "cuda"]
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module in was_training:
            module.training = True


def _replace_layers(model: nn.Module, kind: str, verify: bool, changes: _Changes) -> Row:
    op = {"norm": "rms_norm", "rope": "apply_rotary", "mlp": "glu"}[kind]
    found, reasons, worst = 0, [], None
    replaced: list[nn.Module] = []
    for swap in list(swaps(model, kind)):
        found += 1
        if swap.forward is None:
            reasons.append(swap.verdict.why or "")
            continue
        swap.module.__dict__["forward"] = swap.forward
        replaced.append(swap.module)
        worst = _larger(worst, swap.verdict.error)
    if kind == "rope" and replaced and verify:
        verdict = _try_rotations(model)
        worst = _larger(worst, verdict.error)
        if verdict.why is not None:
            for module in replaced:
                del module.__dict__["forward"]
            reasons += [verdict.why] * len(replaced)
            replaced = []
    backend = _backend(op, model) if replaced else None
    return Row(kind, len(replaced), found, op, backend, worst, count(reasons))


def _replace_attention(model: PreTrainedModel, verify: bool, changes: _Changes) -> Row:
    op = "causal_attention"
    layers = [x for x in model.modules() if type(x).__name__.endswith("Attention")]
    if not model._can_set_attn_implementation():
        return Row("attention", 0, len(layers), op, reasons={"it computes attention itself": 1})
    _give_own_configs(model, changes)
    model.set_attn_implementation(NAME)
    if not verify:
        return Row("attention", len(layers), len(layers), op, _backend(op, model))
    served: dict[nn.Module, None] = {}
    others: dict[nn.Module, str] = {}
    verdicts: list[Verdict] = []

    def listener(call: Call, result: Tensor, other: Attention, args: Any, options: Any) -> None:
        if call.why is None:
            served[call.module] = None
            verdicts.append(_judge_attention(result, other, args, options))
        else:
            others[call.module] = call.why

    why = None
    try:
        with listening(listener), torch.no_grad():
            model(**_tokens(model))
    except SURPRISES as error:
        why = f"the model cannot be tried: {first_line(error)}"
    why = why or next((verdict.why for verdict in verdicts if verdict.why is not None), None)
    reasons = count([why] if why else list(others.values()))
    if why is not None or not served:
        changes.give_back_configs()
        if not reasons:
            reasons = {"no layer asked for it": 1}
        return Row("attention", 0, max(len(layers), len(others)), op, reasons=reasons)
    worst = max(verdict.error or 0.0 for verdict in verdicts)
    found = len(served | others)
    return Row("attention", len(served), found, op, _backend(op, model), worst, reasons)


def _judge_attention(
    result: Tensor, other: Attention, args: tuple[Any, ...], options: dict[str, Any]
) -> Verdict:
    """Compare a call with who would have served it, as it came and with scores far apart."""
    module, query, key, value, mask = args
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    spread = float(query.float().std() * key.float().std()) * query.shape[-1] ** 0.5 * abs(scale)
    far = query * (_SPREAD / spread if spread > 0 else 1.0)
    wide = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in options.items()
    }
    worst = 0.0
    for tensor in (query, far):
        if tensor is far:
            with listening(lambda *_: None):
                result = attention_forward(module, far, key, value, mask, **options)[0]
        plain = other(module, tensor, key, value, mask, **options)[0]
        doubles = (x.double() for x in (tensor, key, value))
        wide_mask = mask.double() if mask is not None and mask.is_floating_point() else mask
        truth = other(module, *doubles, wide_mask, **wide)[0].double()
        verdict = agree([result], [plain], [truth])
        if verdict.why is not None:
            return verdict
        worst = max(worst, verdict.error or 0.0)
    return Verdict(error=worst)


def _try_rotations(model: PreTrainedModel | nn.Module) -> Verdict:
    """Compare each rotation of a forward pass with that of the model's file."""
    verdicts = []

    def listener(theirs: Callable[..., Any], args: Any, results: tuple[Tensor, Tensor]) -> None:
        plain, truth = theirs(*args), theirs(*(x.double() for x in args))
        verdicts.append(agree(results, plain, truth))

    token = rope_listener.set(listener)
    try:
        with torch.no_grad():
            model(**_tokens(cast(PreTrainedModel, model)))
    except SURPRISES as error:
        return Verdict(f"the model cannot be tried: {first_line(error)}")
    finally:
        rope_listener.reset(token)
    if not verdicts:
        return Verdict("no layer rotates as it is built to")
    why = next((verdict.why for verdict in verdicts if verdict.why is not None), None)
    return Verdict(why, max(verdict.error or 0.0 for verdict in verdicts))


def _replace_loss(model: PreTrainedModel, verify: bool) -> Row:
    op = "linear_cross_entropy"
    why = fused.refusal(model)
    if why is not None:
        return Row("loss", 0, 1, op, reasons={why: 1})
    # with a number at hand that may be a factor of the logits, one is a guess
    if not verify and len(fused.candidates(model)) == 1:
        fused.attach(model, fused.candidates(model)[0])
        return Row("loss", 1, 1, op, _backend(op, model))
    reasons: list[str] = []
    for epilogues in fused.candidates(model):
        state = fused.attach(model, epilogues)
        try:
            verdict = _try_loss(model, state)
        except SURPRISES as error:
            verdict = Verdict(f"its forward does not take the loss for logits: {first_line(error)}")
        finally:
            state.watched, state.always = None, False
            state.end()
        if verdict.why is None:
            return Row("loss", 1, 1, op, _backend(op, model), verdict.error)
        fused.detach(model)
        reasons.append(verdict.why)
    return Row("loss", 0, 1, op, reasons={reasons[0]: 1})


def _try_loss(model: PreTrainedModel, state: fused.FusedLoss) -> Verdict:
    """Compare the loss and its gradient for the last layer's input, with logits far apart."""
    head, pinned = state.head, torch.empty(0)
    tokens = _tokens(model)
    labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
    labels[0, :2] = -100

    def first(input: Tensor) -> Tensor:
        nonlocal pinned
        logits = type(head).forward(head, input)
        spread = float(logits.detach().float().std())
        pinned = (input * (_SPREAD / spread if spread > 0 else 1.0)).detach()
        return logits

    def plain(_: Tensor) -> Tensor:
        return type(head).forward(head, pinned)

    def truth(_: Tensor) -> Tensor:
        # by parts: a last layer in float64 may not fit
        bias = head.bias
        parts = [
            pinned.double() @ head.weight[at : at + 4096].double().T
            + (0 if bias is None else bias[at : at + 4096].double())
            for at in range(0, head.weight.shape[0], 4096)
        ]
        return torch.cat(parts, -1)

    def ours(_: Tensor) -> Tensor:
        return state.run(pinned)

    results = []
    for watched in (first, truth, plain, ours):
        state.watched, state.always = watched, watched is ours
        with torch.enable_grad():
            if watched is not first:
                pinned.requires_grad_()
            loss = model(**tokens, labels=labels, use_cache=False).loss
            if watched is not first:
                results.append((loss.detach(), *torch.autograd.grad(loss, pinned)))
    want, usual, got = results
    return agree(got, usual, want)


def _tokens(model: PreTrainedModel) -> dict[str, Tensor]:
    embedding = model.get_input_embeddings()
    weight = embedding.weight
    vocab_size = min(weight.shape[0], getattr(model.config, "vocab_size", weight.shape[0]))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (_ROWS, _LENGTH), generator=generator)
    seen = torch.ones_like(ids)
    seen[1, -_PADDED:] = 0
    return {"input_ids": ids.to(weight.device), "attention_mask": seen.to(weight.device)}


def _give_own_configs(model: nn.Module, changes: _Changes) -> None:
    """Copies in the place of configs, which other models may share."""
    copies: dict[int, PreTrainedConfig] = {}

    def copied(config: PreTrainedConfig) -> PreTrainedConfig:
        if id(config) not in copies:
            own = copies[id(config)] = copy.copy(config)
            changes.configs.append((config, own, dict(vars(own))))
            for name, value in vars(config).items():
                if isinstance(value, PreTrainedConfig):
                    own.__dict__[name] = copied(value)
        return copies[id(config)]

    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig):
            changes.places.append((module, config))
            module.__dict__["config"] = copied(config)


def _larger(worst: float | None, error: float | None) -> float | None:
    return worst if error is None else max(worst or 0.0, error)


def _backend(op: str, model: nn.Module) -> str:
    """Which backend an op has where the model is."""
    parameter = next(model.parameters())
    x = torch.zeros(1, 2, 2, 8, dtype=parameter.dtype, device=parameter.device)
    examples: dict[str, Callable[[], Any]] = {
        "causal_attention": functools.partial(explain, "causal_attention", x, x, x),
        "linear_cross_entropy": functools.partial(
            explain,
            "linear_cross_entropy",
            x[0, 0],
            x[0, 0],
            torch.zeros_like(x[0, 0, :, 0]).long(),
        ),
        "rms_norm": functools.partial(explain, "rms_norm", x),
        "apply_rotary": functools.partial(explain, "apply_rotary", x, x, *2 * [x[0, :, 0, :4]]),
        "glu": functools.partial(explain, "glu", x, x),
    }
    return str(examples[op]().steps["forward"].backend)
