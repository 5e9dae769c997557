"""How well a model knows held-out examples: losses, the likeliest labels, the next token."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastlm.finetuning.batches import Batch, Layout, chunks
from fastlm.finetuning.examples import Example
from fastlm.hf.loss import base_model, state_of
from fastlm.inference.next_token import NextToken
from fastlm.inference.perplexity import exp
from fastlm.ops.cross_entropy import cross_entropy

TOKENS = 4096
"""Read together, at least one example."""


@dataclass(frozen=True)
class Measured:
    """What a model made of examples.

    Attributes:
        rows: How many there were.
        tokens: To predict in them.
        loss: Mean negative log-probability of these, in nats.
        accuracy: Share of labelled examples whose label was the likeliest, or None.
        predicted: The likeliest label of each, where they have labels.
    """

    rows: int
    tokens: int
    loss: float
    accuracy: float | None = None
    predicted: tuple[int, ...] = ()

    @property
    def perplexity(self) -> float:
        return exp(self.loss)

    def to_dict(self) -> dict[str, Any]:
        values = {**asdict(self), "perplexity": self.perplexity}
        del values["predicted"]
        return values

    def __str__(self) -> str:
        loss = f"perplexity {self.perplexity:.4g}, loss {self.loss:.4f} nats"
        rows = f"{self.rows:,} rows, {self.tokens:,} learned tokens"
        accuracy = "" if self.accuracy is None else f"accuracy {self.accuracy:.1%}, "
        return f"{accuracy}{loss} ({rows})"


def loss_sum(layout: Layout, batch: Batch) -> Tensor:
    """The sum of the losses of a batch; by the fused loss, where the model has it."""
    model = layout.model
    if state_of(model) is not None:
        output: Any = model(**batch.inputs, labels=batch.labels, **layout.options)
        return output.loss * batch.num_learned
    logits = model(**batch.inputs, **layout.options).logits
    # after padding no logit is wanted, and none is of another example than its target
    targets = batch.labels[:, 1:]
    return cast(Tensor, cross_entropy(logits[:, :-1], targets, reduction="sum"))


@torch.inference_mode()
def measure(
    layout: Layout, examples: Sequence[Example], labels: Sequence[Sequence[int]] = ()
) -> Measured:
    """Loss over all examples, and accuracy where they have labels.

    Args:
        layout: Of the model.
        examples: At least one.
        labels: Tokens of each label.

    Raises:
        FloatingPointError: The model's logits are not finite.
    """
    total, tokens = 0.0, 0
    padded = layout.why_padded is not None
    sizes = [len(example.ids) for example in examples]
    with _evaluating(layout.model):
        for part in chunks(examples, sizes, TOKENS, padded=padded):
            batch = layout.batch(part)
            total += float(loss_sum(layout, batch))
            tokens += batch.num_learned
        accuracy, predicted = None, tuple[int, ...]()
        if labels:
            prompts = [example.ids[: example.prompt] for example in examples]
            found = label_logprobs(layout, prompts, labels).argmax(1)
            wanted = torch.tensor([example.label for example in examples])
            accuracy = float((found == wanted).double().mean())
            predicted = tuple(map(int, found))
    if not math.isfinite(total):
        raise FloatingPointError("measure: the model's logits are not finite")
    return Measured(len(examples), tokens, total / tokens, accuracy, predicted)


@torch.inference_mode()
def label_logprobs(
    layout: Layout, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> Tensor:
    """Log-probability of each label after each prompt: ``(prompts, labels)``, float64.

    A prompt is read once, with all but the last token of each label behind it; where every label
    is one token, alone.
    """
    stems = _stems(labels)
    stem_of = [
        next(i for i, s in enumerate(stems) if s[: len(label) - 1] == tuple(label[:-1]))
        for label in labels
    ]
    padded, longest = layout.why_padded is not None, max(map(len, stems))
    sizes = [
        sum(len(prompt) + (longest if padded else len(stem)) for stem in stems)
        for prompt in prompts
    ]
    found = []
    for part in chunks(prompts, sizes, TOKENS, padded=padded):
        sequences = [(*prompt, *stem) for prompt in part for stem in stems]
        batch = layout.of(sequences)
        # rows of logits: of the last token of a prompt and of each token of a stem
        rows, first = list[int](), list[int]()
        for number, (sequence, start) in enumerate(zip(sequences, batch.starts, strict=True)):
            first.append(len(rows))
            end = start + len(sequence)
            rows += range(end - len(stems[number % len(stems)]) - 1, end)
        logprobs = _logits_at(layout, batch, rows).double().log_softmax(-1)
        scores = torch.stack(
            [
                sum(
                    (logprobs[at + i, token] for i, token in enumerate(label)),
                    start=logprobs.new_zeros(()),
                )
                for begin in range(0, len(sequences), len(stems))
                for label, stem in zip(labels, stem_of, strict=True)
                for at in [first[begin + stem]]
            ]
        )
        found.append(scores.view(len(part), len(labels)).cpu())
    return torch.cat(found)


def _stems(labels: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """What has to be read behind a prompt to know all labels: none begins another one."""
    every = {tuple(label[:-1]) for label in labels}
    return sorted(a for a in every if not any(a != b and b[: len(a)] == a for b in every))


@torch.inference_mode()
def next_token(
    layout: Layout, tokenizer: Any, prompt: str, ids: Sequence[int], top_k: int
) -> NextToken:
    """The distribution of what comes after ``ids``, the tokens of ``prompt``."""
    with _evaluating(layout.model):
        logits = _logits_at(layout, layout.of([ids]), [len(ids) - 1])[0]
    return NextToken.of(logits, tokenizer, prompt, top_k, 1.0)


def _logits_at(layout: Layout, batch: Batch, rows: Sequence[int]) -> Tensor:
    """Logits ``(rows, V)`` at some places of a batch; the last layer sees no others.

    What a model does to its logits it does to each row alone.
    """
    model = layout.model
    head = cast(Callable[[], nn.Module | None], model.get_output_embeddings)()
    at = torch.tensor(rows, device=layout.device)

    def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].flatten(0, -2)[at][None], *args[1:])

    hook = None if head is None else head.register_forward_pre_hook(select)
    try:
        logits = model(**batch.inputs, **layout.options).logits
    finally:
        if hook is not None:
            hook.remove()
    # a model may use the weight of its last layer without calling it
    logits = logits.flatten(0, 1)
    return cast(Tensor, logits if len(logits) == len(rows) else logits[at])


@torch.inference_mode()
def text_loss(layout: Layout, ids: Sequence[int], window: int) -> float:
    """The mean loss of a text, as :func:`fastlm.inference.perplexity.mean_loss` reads it.

    Raises:
        FloatingPointError: The model's logits are not finite.
    """
    tokens, total = torch.tensor(ids, device=layout.device), 0.0
    with _evaluating(layout.model):
        for inputs, targets in zip(
            tokens[:-1].split(window), tokens[1:].split(window), strict=True
        ):
            logits = layout.model(input_ids=inputs[None], **layout.options).logits[0]
            total += float(cross_entropy(logits, targets, reduction="sum"))
    if not math.isfinite(total):
        raise FloatingPointError("perplexity: the model's logits are not finite")
    return total / (len(ids) - 1)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, but with the loss still fused."""
    model = base_model(model)
    was_training = [module for module in model.modules() if module.training]
    model.train(False)
    state = state_of(model)
    if state is not None:
        state.always = True
    try:
        yield
    finally:
        if state is not None:
            state.always = False
        for module in was_training:
            module.training = True
