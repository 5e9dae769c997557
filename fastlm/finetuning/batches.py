"""Examples as tensors: packed one after another where the model keeps them apart, else padded."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastlm.finetuning.config import COMMAND
from fastlm.finetuning.examples import Example
from fastlm.hf.loss import base_model
from fastlm.training.config import ConfigError

IGNORE_INDEX = -100

Item = TypeVar("Item")

DEFAULT_MAX_LENGTH = 1024
"""Of examples, where the model's context is not shorter."""

# of the two documents that packing is tried on
_TRIED = 8


@dataclass(frozen=True)
class Batch:
    """What a model is called with.

    Attributes:
        inputs: Arguments of its forward.
        labels: ``(B, T)``: ids where the loss is on them, elsewhere -100.
        num_learned: How many those are.
        starts: Where each sequence begins in the flattened ids.
        num_tokens: Without padding.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    num_learned: int
    starts: tuple[int, ...]
    num_tokens: int


class Layout:
    """How sequences become a batch for one model.

    Attributes:
        why_padded: Why they are not packed, or None if they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = base_model(model)
        names = inspect.signature(self.model.forward).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in names.values())
        self.options = {"use_cache": False} if takes_any or "use_cache" in names else {}
        self.takes_positions = "position_ids" in names
        self.device = next(self.model.parameters()).device
        self.why_padded = self._why_padded()

    def batch(self, examples: Sequence[Example]) -> Batch:
        """One row of all examples, or a row each with padding at its end."""
        sequences = [example.ids for example in examples]
        learned = [example.learned for example in examples]
        if self.why_padded is None:
            return self._packed(sequences, learned)
        return self._padded(sequences, learned)

    def of(self, sequences: Sequence[Sequence[int]]) -> Batch:
        """A batch with nothing to learn."""
        return self.batch([Example(tuple(ids), (False,) * len(ids)) for ids in sequences])

    def _packed(
        self, sequences: Sequence[Sequence[int]], learned: Sequence[Sequence[bool]]
    ) -> Batch:
        lengths = [len(ids) for ids in sequences]
        ids = torch.tensor([[id for sequence in sequences for id in sequence]])
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        wanted = torch.tensor([[flag for flags in learned for flag in flags]])
        ends = torch.tensor(lengths).cumsum(0)
        starts = tuple(int(end) - length for end, length in zip(ends, lengths, strict=True))
        inputs = {"input_ids": ids, "position_ids": positions}
        return self._made(inputs, wanted, starts, sum(lengths))

    def _padded(
        self, sequences: Sequence[Sequence[int]], learned: Sequence[Sequence[bool]]
    ) -> Batch:
        longest = max(map(len, sequences))
        ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
        seen, wanted = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, (sequence, flags) in enumerate(zip(sequences, learned, strict=True)):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            seen[row, : len(sequence)] = 1
            wanted[row, : len(sequence)] = torch.tensor(flags)
        starts = tuple(row * longest for row in range(len(sequences)))
        inputs = {"input_ids": ids, "attention_mask": seen}
        return self._made(inputs, wanted, starts, int(seen.sum()))

    def _made(
        self, inputs: dict[str, Tensor], wanted: Tensor, starts: tuple[int, ...], tokens: int
    ) -> Batch:
        labels = inputs["input_ids"].masked_fill(~wanted, IGNORE_INDEX)
        moved = {name: x.to(self.device) for name, x in inputs.items()}
        return Batch(moved, labels.to(self.device), int(wanted.sum()), starts, tokens)

    @torch.no_grad()
    def _why_padded(self) -> str | None:
        """Pack a document behind two others, and see that its logits are the same to the bit."""
        if not self.takes_positions:
            return "the model takes no positions that could tell examples apart"
        count = self.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        generator = torch.Generator().manual_seed(0)
        draw: Any = torch.randint(count, (3, _TRIED), generator=generator).unbind()
        one, other, last = ([int(id) for id in ids] for ids in draw)
        was_training = [module for module in self.model.modules() if module.training]
        self.model.train(False)
        try:
            results = [
                self.model(**self._packed([first, last], [[False] * _TRIED] * 2).inputs,
                           **self.options).logits[:, -_TRIED:]
                for first in (one, other)
            ]  # fmt: skip
        finally:
            for module in was_training:
                module.training = True
        if torch.equal(*results):
            return None
        return "the logits of a packed example change in some bit with the example before it"


def context_of(model: nn.Module) -> int | None:
    """The most tokens that a model reads, where its config says so."""
    context = getattr(base_model(model).config, "max_position_embeddings", None)
    return context if isinstance(context, int) else None


def max_length_of(model: nn.Module, wanted: int | None) -> int:
    """How long examples may be.

    Raises:
        ConfigError: ``wanted`` is more than the model reads.
    """
    context = context_of(model)
    if wanted is not None and context is not None and wanted > context:
        raise ConfigError(
            f"{COMMAND}: max_length must be at most {context}, the model's context, got {wanted}"
        )
    return wanted or min(DEFAULT_MAX_LENGTH, context or DEFAULT_MAX_LENGTH)


def chunks(
    items: Sequence[Item], sizes: Sequence[int], most: int, *, padded: bool = False
) -> Iterator[Sequence[Item]]:
    """Items in order, as many together as their sizes allow; one alone may be larger.

    If ``padded``, each takes as much as the largest one that it is together with.
    """
    first, total, largest = 0, 0, 0
    for at, size in enumerate(sizes):
        together = max(largest, size) * (at - first + 1) if padded else total + size
        if at > first and together > most:
            yield items[first:at]
            first, total, largest = at, 0, 0
        total, largest = total + size, max(largest, size)
    if first < len(items):
        yield items[first:]
