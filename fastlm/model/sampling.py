"""Choose the next token from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlm._errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn: temperature, then top_k, then top_p, then min_p.

    Each rule sees the distribution that the one before left, renormalised.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token.  None is 0, or 1 where one
            of the other rules is given, as they say nothing about the most likely token.
        top_k: Keep this many most likely tokens; 0 or None for all.
        top_p: Keep the most likely tokens that together reach this probability (Holtzman et al.,
            2019, https://arxiv.org/abs/1904.09751); 1 or None for all.
        min_p: Keep tokens at least this fraction as likely as the most likely one (Nguyen et al.,
            2024, https://arxiv.org/abs/2407.01082); 0 or None for all.

    Raises:
        ArgumentError: A value is out of range or not a number; the message names it.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        temperature, top_p, min_p = self.temperature, self.top_p, self.min_p
        if temperature is not None:
            finite = math.isfinite(temperature) and temperature >= 0
            _check("temperature", finite, "be a number of at least 0", temperature)
        if self.top_k is not None:
            whole = isinstance(self.top_k, int) and self.top_k >= 0
            _check("top_k", whole, "be a whole number of at least 0", self.top_k)
        if top_p is not None:
            _check("top_p", 0 < top_p <= 1, "be above 0 and at most 1", top_p)
        if min_p is not None:
            _check("min_p", 0 <= min_p <= 1, "be from 0 to 1", min_p)

    @property
    def is_greedy(self) -> bool:
        if self.temperature is None:
            return self.top_k is None and self.top_p is None and self.min_p is None
        return self.temperature == 0

    def filtered(self, logits: Tensor) -> Tensor:
        """Scaled logits ``(..., V)`` in float32, -inf for tokens that are left out."""
        x = scaled(logits.float(), 1.0 if self.temperature is None else self.temperature)
        vocab_size = x.shape[-1]
        if self.top_k and self.top_k < vocab_size:
            values, indices = x.topk(self.top_k)
            x = torch.full_like(x, -torch.inf).scatter_(-1, indices, values)
        if self.top_p is not None and self.top_p < 1:
            values, indices = x.sort(dim=-1, descending=True)
            probabilities = values.softmax(dim=-1)
            before = probabilities.cumsum(dim=-1) - probabilities
            values = values.masked_fill(before >= self.top_p, -torch.inf)
            x = torch.empty_like(x).scatter_(-1, indices, values)
        if self.min_p:
            # the most likely token stands at 0
            x = x.masked_fill(x < math.log(self.min_p), -torch.inf)
        return x

    def draw(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """Token ids ``(...)`` from logits ``(..., V)``.

        Raises:
            FloatingPointError: The logits hold NaN, or no finite number.
        """
        best = logits.amax(dim=-1)
        if not best.isfinite().all():
            raise FloatingPointError("generate: the model's logits are not finite")
        if self.is_greedy:
            return logits.argmax(dim=-1)
        probabilities = self.filtered(logits).softmax(dim=-1)
        rows = probabilities.reshape(-1, probabilities.shape[-1])
        return torch.multinomial(rows, 1, generator=generator).view(logits.shape[:-1])


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """``logits / temperature`` ``(..., V)`` less their maximum, which softmax does not see.

    Without overflow at any temperature: at the smallest the most likely tokens share everything, at
    the largest all tokens share alike.
    """
    x = logits - logits.amax(dim=-1, keepdim=True)
    # rounded to 0 or infinity it would make 0 / 0 of the maximum, or inf / inf of a masked token
    limits = torch.finfo(x.dtype)
    return x / min(max(temperature, limits.tiny), limits.max)


def new_generator(seed: int | None, device: torch.device) -> torch.Generator:
    """A random number generator of its own: the global ones are neither read nor moved.

    Args:
        seed: Equal seeds give equal tokens; None for a seed from the operating system.
        device: Where the logits are.

    Raises:
        ArgumentError: The seed is no whole number of 64 bits.
    """
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        whole = isinstance(seed, int) and -(2**63) <= seed < 2**63
        _check("seed", whole, "be a whole number of 64 bits", seed)
        generator.manual_seed(seed)
    return generator


def _check(name: str, holds: bool, requirement: str, got: object) -> None:
    if not holds:
        raise ArgumentError(f"generate: {name} must {requirement}, got {got}")
