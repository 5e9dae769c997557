"""Choose the next token from logits."""

from __future__ import annotations

import copy
import math
import numbers
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeGuard

import torch
from torch import Tensor

from fastlm._errors import ArgumentError

# what a row draws that has nothing to draw from
NO_TOKEN = -1
# bits of a float64, so that sums of whole numbers below 2**53 are exact
_EXACT_BITS = 53
_FLOAT32 = torch.finfo(torch.float32)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    In this order: logit_bias and repetition_penalty change the logits, for the most likely token
    too; temperature divides them; then top_k, top_p and min_p leave tokens out, where each sees the
    distribution that the one before left, renormalised.  It is the order of transformers, which
    takes the last four one by one as well, and that in which vLLM and llama.cpp take the first two.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token.  None is 0, or 1 where one
            of the next three is given, as they say nothing about the most likely token.
        top_k: Keep this many most likely tokens, of equally likely ones those that come first in
            the vocabulary; 0 or None for all.
        top_p: Keep the most likely tokens that together reach this probability (Holtzman et al.,
            2019, https://arxiv.org/abs/1904.09751); 1 or None for all.
        min_p: Keep tokens at least this fraction as likely as the most likely one (Nguyen et al.,
            2024, https://arxiv.org/abs/2407.01082); 0 or None for all.
        repetition_penalty: Divides the positive logits of tokens that are in the prompt or the
            continuation, and multiplies the negative ones, once however often a token is there
            (Keskar et al., 2019, https://arxiv.org/abs/1909.05858); 1 or None for none.
        logit_bias: Added to the logits of these token ids; -inf bans a token.

    Raises:
        ArgumentError: A value is out of range or not a number; the message names it.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        temperature, top_p, min_p = self.temperature, self.top_p, self.min_p
        penalty = self.repetition_penalty
        if temperature is not None:
            holds = is_number(temperature) and 0 <= temperature < math.inf
            _check("temperature", holds, "be a number of at least 0", temperature)
            # whole numbers of Python have no end
            holds = temperature <= sys.float_info.max
            _check("temperature", holds, "be finite in float64", temperature)
        if self.top_k is not None:
            whole = is_number(self.top_k) and isinstance(self.top_k, int) and self.top_k >= 0
            _check("top_k", whole, "be a whole number of at least 0", self.top_k)
        if top_p is not None:
            holds = is_number(top_p) and 0 < top_p <= 1
            _check("top_p", holds, "be above 0 and at most 1", top_p)
        if min_p is not None:
            _check("min_p", is_number(min_p) and 0 <= min_p <= 1, "be from 0 to 1", min_p)
        if penalty is not None:
            holds = is_number(penalty) and _FLOAT32.tiny <= penalty <= _FLOAT32.max
            _check("repetition_penalty", holds, "be a finite number above 0 in float32", penalty)
        if self.logit_bias is not None:
            holds = isinstance(self.logit_bias, Mapping)
            _check("logit_bias", holds, "map token ids to numbers", self.logit_bias)
        for token, bias in (self.logit_bias or {}).items():
            whole = isinstance(token, int) and token >= 0
            _check("logit_bias", whole, "have token ids for keys", token)
            limit = sys.float_info.max
            holds = is_number(bias) and (-limit <= bias <= limit or bias == -math.inf)
            _check("logit_bias", holds, "have finite numbers or -inf for values", bias)

    @property
    def is_greedy(self) -> bool:
        if self.temperature is None:
            return self.top_k is None and self.top_p is None and self.min_p is None
        return self.temperature == 0


class Sampler:
    """Draws the next token of each request of a batch, where the logits are.

    Nothing is read back: :meth:`draw` does not wait for the device, branches on no value there, and
    can be captured in a CUDA graph.

    Each request has a stream of uniform numbers of its own, drawn here, and its token t is the
    inverse of the cumulative distribution at number t.  So the tokens of a request depend on its
    logits, its :class:`Sampling` and its seed alone: not on the batch around it, and not on how
    many of its positions are drawn at once, as when several guessed tokens are verified together.

    Probabilities are rounded to whole multiples of 2^-k of the most likely one, where 2^(53 - k) is
    at least V (k = 35 for 150,000 tokens), so that float64 sums of them are exact in whatever order
    a device adds: a token of probability zero is never drawn.

    Args:
        samplings: One per request; row b of a batch belongs to request b.
        seeds: One per request; equal seeds give equal tokens, None is a seed from the operating
            system.  The global generators are neither read nor moved.
        vocab_size: V.
        max_draws: Tokens each request may draw.  More do not change the first ones.
        device: Where the logits are.

    Raises:
        ArgumentError: A seed is no whole number of 64 bits, or a logit bias names a token beyond
            the vocabulary.
    """

    def __init__(
        self,
        samplings: Sequence[Sampling],
        seeds: Sequence[int | None],
        *,
        vocab_size: int,
        max_draws: int,
        device: torch.device,
    ) -> None:
        if len(seeds) != len(samplings):
            raise ValueError(
                f"Sampler: seeds must be one per request, {len(samplings)}, got {len(seeds)}"
            )
        for sampling in samplings:
            for token in sampling.logit_bias or ():
                _check("logit_bias", token < vocab_size, f"name tokens below {vocab_size}", token)
        self._samplings, self._vocab_size = tuple(samplings), vocab_size
        self._max_draws, self._device = max_draws, device
        # 1 follows the last draw: beyond every token
        uniforms = torch.ones(len(self._samplings), max_draws + 1, dtype=torch.float64)
        for row, sampling, seed in zip(uniforms, self._samplings, seeds, strict=True):
            generator = new_generator(seed, row.device)
            if not sampling.is_greedy:
                row[:max_draws].uniform_(generator=generator)
        self._uniforms = uniforms.to(device)
        # of which row of them each row of the batch draws
        self._streams = torch.arange(len(self._samplings), device=device)
        self._make_columns()

    @property
    def needs_history(self) -> bool:
        """Whether a request has a repetition penalty."""
        return self._penalty is not None

    def keep(self, rows: Sequence[int] | Tensor) -> Sampler:
        """A sampler of these requests of this one, in this order; one may come more than once.

        For sequences that finish and leave, and for several positions of one sequence in a batch.
        May wait for the device, if ``rows`` is there.
        """
        numbers = rows.tolist() if isinstance(rows, Tensor) else list(rows)
        kept = copy.copy(self)
        kept._samplings = tuple(self._samplings[row] for row in numbers)
        kept._streams = self._streams[self._tensor(numbers, torch.int64)]
        kept._make_columns()
        return kept

    def draw(
        self,
        logits: Tensor,
        steps: Tensor,
        history: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """The next token of each row, ``(B,)`` int64.

        Where a row's logits hold NaN or have no finite maximum, or it has drawn ``max_draws``
        tokens before, the token is :data:`NO_TOKEN`, -1: whoever reads it on the host is to raise.

        Args:
            logits: ``(B, V)``, left as they are.
            steps: ``(B,)`` int64: how many tokens each row has drawn, from 0.
            history: ``(B, S)`` token ids of prompt and continuation, where :attr:`needs_history`;
                ids that are not in the vocabulary are passed over.
            lengths: ``(B,)``: how many tokens at the start of each row of ``history`` are there;
                what follows is not looked at.  None for all S.

        Raises:
            ValueError: Shapes do not match, or the history that a penalty needs is not there.
        """
        if logits.shape != (len(self._samplings), self._vocab_size):
            raise ValueError(
                f"Sampler: logits must be {(len(self._samplings), self._vocab_size)}, "
                f"got {tuple(logits.shape)}"
            )
        if self._changes_nothing and self._greedy_alone:
            # where NaN is, it is what argmax finds
            tokens = logits.argmax(dim=-1, keepdim=True)
            return torch.where(logits.gather(-1, tokens).isfinite(), tokens, NO_TOKEN)[:, 0]
        x = logits if logits.dtype == torch.float64 else logits.float()
        if self._bias is not None:
            x = x.scatter_add(-1, self._biased, self._bias.to(x.dtype))
        if self._penalty is not None:
            if history is None:
                raise ValueError("Sampler: history must be given for a repetition penalty")
            x = _penalised(x, self._penalty.to(x.dtype), history, lengths)
        best = x.amax(dim=-1)
        if self._greedy_alone:
            tokens = x.argmax(dim=-1)
        else:
            tokens = self._sampled(x, best, steps)
            if self._greedy is not None:
                tokens = torch.where(self._greedy, x.argmax(dim=-1), tokens)
        # after the last draw, and where NaN is, what was drawn is V
        holds = best.isfinite() & (tokens < self._vocab_size)
        return torch.where(holds, tokens, NO_TOKEN)

    def _sampled(self, x: Tensor, best: Tensor, steps: Tensor) -> Tensor:
        """From logits ``(B, V)`` and their maxima ``(B,)``."""
        x = x - best[:, None]
        x = x if self._temperature is None else x / self._temperature.to(x.dtype)
        weights = self._weights(x)
        if self._prefix:
            weights = weights.masked_fill(~self._most_likely(x), 0.0)
        if self._log_min_p is not None:
            weights = weights.masked_fill(x < self._log_min_p.to(x.dtype), 0.0)
        cumulative = weights.cumsum(dim=-1)
        uniforms = self._uniforms[self._streams, steps.clamp(max=self._max_draws)]
        # u < 1 makes the product less than the total, rounded too, and so it is below some token's
        # sum; a token of weight 0 has the sum of the one before it, which is found first
        heights = uniforms[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, heights, right=True)[:, 0]

    def _weights(self, x: Tensor) -> Tensor:
        """``exp(x)`` for x of at most 0 in whole multiples of 2^-k, times 2^k, float64."""
        scale = 2.0 ** (_EXACT_BITS - (self._vocab_size - 1).bit_length())
        return x.exp().double().mul_(scale).round_()

    def _most_likely(self, x: Tensor) -> Tensor:
        """Which tokens top_k and top_p keep, ``(B, V)`` bool; ties go to the first ones.

        Both keep some number of most likely tokens, so the values alone are sorted, and as many as
        the largest k where no row needs them all.
        """
        if self._prefix < self._vocab_size:
            values = x.topk(self._prefix, dim=-1).values
        else:
            values = x.sort(dim=-1, descending=True).values
        weights = self._weights(values)
        cumulative = weights.cumsum(dim=-1)
        limit = self._top_p * cumulative.gather(1, self._top_k - 1)
        # from place top_k on, what is before is all there is; no less than one, for rows of NaN
        count = (cumulative - weights < limit).sum(dim=-1, keepdim=True).clamp(min=1)
        least = values.gather(1, count - 1).masked_fill(self._keeps_all, -torch.inf)
        room = count - (values > least).sum(dim=-1, keepdim=True)
        ties = x == least
        return (x > least) | (ties & (ties.cumsum(dim=-1) <= room))

    def _make_columns(self) -> None:
        """The rules of all rows: columns ``(B, 1)``, None for a rule that no row has."""
        # what a greedy row does not look at is as if it were not there
        rules = [
            replace(rule, top_k=None, top_p=None, min_p=None) if rule.is_greedy else rule
            for rule in self._samplings
        ]
        greedy = [rule.is_greedy for rule in rules]
        self._greedy_alone = all(greedy)
        self._greedy = self._tensor(greedy, torch.bool) if any(greedy) else None

        self._temperature = self._column([_divisor(rule) for rule in rules], nothing=1.0)
        self._penalty = self._column([rule.repetition_penalty or 1.0 for rule in rules], 1.0)
        self._log_min_p = self._column(
            [math.log(rule.min_p) if rule.min_p else -math.inf for rule in rules], -math.inf
        )

        biases = [dict(rule.logit_bias or {}) for rule in rules]
        longest = max(map(len, biases), default=0)
        self._bias = None
        if longest:
            # rows of fewer biases add 0 to the first token
            ids = [[*bias, *[0] * (longest - len(bias))] for bias in biases]
            values = [[*bias.values(), *[0.0] * (longest - len(bias))] for bias in biases]
            self._biased = self._tensor(ids, torch.int64)
            self._bias = self._tensor(values, torch.float64)

        size = self._vocab_size
        top_k = [min(rule.top_k or size, size) for rule in rules]
        top_p = [rule.top_p or 1.0 for rule in rules]
        keeps_all = [k == size and p == 1 for k, p in zip(top_k, top_p, strict=True)]
        # how many of the most likely tokens must be in order
        self._prefix = max(
            (k for k, all_ in zip(top_k, keeps_all, strict=True) if not all_), default=0
        )
        if self._prefix:
            self._top_k = self._tensor([min(k, self._prefix) for k in top_k], torch.int64)[:, None]
            self._top_p = self._tensor(top_p, torch.float64)[:, None]
            self._keeps_all = self._tensor(keeps_all, torch.bool)[:, None]

        self._changes_nothing = self._bias is None and self._penalty is None

    def _column(self, values: list[float], nothing: float) -> Tensor | None:
        if all(value == nothing for value in values):
            return None
        return self._tensor(values, torch.float64)[:, None]

    def _tensor(self, values: Sequence[object], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)


def _divisor(rule: Sampling) -> float:
    # rounded to 0 or infinity it would make 0 / 0 of the maximum, or inf / inf of a banned token
    temperature = 1.0 if rule.temperature is None else rule.temperature
    return min(max(temperature, _FLOAT32.tiny), _FLOAT32.max)


def _penalised(x: Tensor, penalty: Tensor, history: Tensor, lengths: Tensor | None) -> Tensor:
    """Logits ``(B, V)`` of which those of tokens in ``history`` are made smaller."""
    size = x.shape[1]
    # one token more, for what is not to be looked at
    seen = torch.zeros(x.shape[0], size + 1, dtype=torch.bool, device=x.device)
    ids = history.long()
    counts = (ids >= 0) & (ids < size)
    if lengths is not None:
        counts &= torch.arange(ids.shape[1], device=x.device) < lengths[:, None]
    seen.scatter_(1, ids.masked_fill(~counts, size), True)
    return torch.where(seen[:, :size], torch.where(x < 0, x * penalty, x / penalty), x)


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


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a real number of Python or NumPy; True and False are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check(name: str, holds: bool, requirement: str, got: object) -> None:
    if not holds:
        raise ArgumentError(f"generate: {name} must {requirement}, got {got!r}")
