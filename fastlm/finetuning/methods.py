"""Which parameters a method trains, and which a run has changed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastlm.finetuning.config import COMMAND, FinetuneConfig
from fastlm.finetuning.pretrained import import_peft, peft_is_behind
from fastlm.hf.verify import first_line
from fastlm.training.config import ConfigError

# what adapters put before the names of the model inside
_INSIDE = re.compile(r"^base_model\.model\.")


def prepare(model: nn.Module, config: FinetuneConfig) -> nn.Module:
    """Let what the method trains ask for gradients, in float32, and nothing else.

    Returns:
        The model, or for ``lora`` one of peft around it.

    Raises:
        ConfigError: The model has nothing that the method could train.
        MissingPackageError: peft is needed and not installed.
    """
    if config.method == "lora":
        return _with_adapter(model, config)
    model.requires_grad_(False)
    chosen = {"full": lambda: [model], "head": lambda: [_head(model)]}.get(
        config.method, lambda: _last_blocks(model, config.last_n_layers)
    )()
    for module in chosen:
        for parameter in module.parameters():
            parameter.requires_grad_()
            parameter.data = parameter.data.float()
    return model


def _with_adapter(model: nn.Module, config: FinetuneConfig) -> nn.Module:
    peft = import_peft(f"{COMMAND}: --method lora")
    options = peft.LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    try:
        with peft_is_behind():
            adapted: nn.Module = peft.get_peft_model(model, options)
    except ValueError as error:
        raise ConfigError(
            f"{COMMAND}: method must be full, last-n-layers or head for {type(model).__name__}, "
            f"got 'lora': {first_line(error)}"
        ) from error
    return adapted


def _head(model: nn.Module) -> nn.Module:
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise ConfigError(f"{COMMAND}: method head: {type(model).__name__} names no output layer")
    return head


def _last_blocks(model: nn.Module, count: int) -> list[nn.Module]:
    number = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    lists = [x for x in model.modules() if isinstance(x, nn.ModuleList) and len(x) == number]
    if not lists:
        raise ConfigError(
            f"{COMMAND}: method last-n-layers: {type(model).__name__} has no list of its blocks"
        )
    if count > number:
        raise ConfigError(
            f"{COMMAND}: last_n_layers must be at most {number}, the model's blocks, got {count}"
        )
    return list(lists[0])[-count:]


@dataclass(frozen=True)
class Changes:
    """What a run has changed.

    Attributes:
        changed: Name and shape of each parameter that has another value.
        trained: How many were trained.
        untouched: How many have the very bits they had.
        parameters: Numbers in those that changed.
        total: Numbers in all.
    """

    changed: dict[str, tuple[int, ...]]
    trained: int
    untouched: int
    parameters: int
    total: int

    def rest(self) -> str:
        """What of the parameters is not among those."""
        if not self.untouched:
            return "there is no other"
        return f"the {self.untouched:,} others have the very bits they had"

    def grouped(self) -> list[tuple[str, int, tuple[int, ...]]]:
        """Names with their layers' numbers as ``*``, how many there are of each, their shape."""
        groups: dict[tuple[str, tuple[int, ...]], int] = {}
        for name, shape in self.changed.items():
            key = re.sub(r"\.\d+\.", ".*.", name), shape
            groups[key] = groups.get(key, 0) + 1
        return [(name, count, shape) for (name, shape), count in groups.items()]


def fingerprints(model: nn.Module) -> dict[str, bytes]:
    """A digest of the bits of each parameter."""
    return {name: _digest(parameter) for name, parameter in model.named_parameters()}


def changes(model: nn.Module, before: Mapping[str, bytes]) -> Changes:
    """What is not as it was when ``before`` was taken."""
    parameters = dict(model.named_parameters())
    now = fingerprints(model)
    names = [name for name in parameters if now[name] != before[name]]
    return Changes(
        changed={_INSIDE.sub("", name): tuple(parameters[name].shape) for name in names},
        trained=sum(parameter.requires_grad for parameter in parameters.values()),
        untouched=len(parameters) - len(names),
        parameters=sum(parameters[name].numel() for name in names),
        total=sum(parameter.numel() for parameter in parameters.values()),
    )


def _digest(tensor: Tensor) -> bytes:
    bits = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.blake2b(bits.numpy().tobytes(), digest_size=16).digest()
