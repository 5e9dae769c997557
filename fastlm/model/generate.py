"""The decoding loop: one pass over the prompts, then a token of every sequence at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastlm._errors import ArgumentError
from fastlm.model.decode_step import DirectStep, Step, decode_step, new_step
from fastlm.model.graphed_step import keep
from fastlm.model.kv_cache import KVCache
from fastlm.model.lookup import PromptLookup
from fastlm.model.paged_kv_cache import PagedRows
from fastlm.model.prefill import prefill
from fastlm.model.sampling import NO_TOKEN, Sampler, Sampling

if TYPE_CHECKING:
    from fastlm.model.transformer import CausalLM

# what keys and values are held in; None for the dtype of the weights
KV_CACHES = {"float": None, "int8": torch.int8}


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt, and how to continue it.

    Attributes:
        prompt: Token ids, one or more.
        max_new_tokens: At most this many more, which must fit in the model's context.
        sampling: How tokens are drawn.
        seed: Equal seeds give equal tokens; None for a seed from the operating system.
        end_ids: Tokens after which there are no more.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    seed: int | None = None
    end_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Drawn:
    """A token of a request.

    Attributes:
        request: Number of the request.
        token: The token; :data:`fastlm.model.sampling.NO_TOKEN` where the request's logits are not
            finite, and then it is the last.
        logprob: Its natural log probability under the model, before temperature and filters.
        top: The most likely tokens there, with theirs, as many as were asked for.
        is_last: No more will come: it ends the text, or the request has all it asked for.
    """

    request: int
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    is_last: bool

    def check(self) -> None:
        """Raise where there is no token.

        Raises:
            FloatingPointError: The model's logits are not finite.
        """
        if self.token == NO_TOKEN:
            raise FloatingPointError("generate: the model's logits are not finite")


class Generation:
    """Requests that are decoded together.

    A request that has ended leaves the batch.  Its tokens do not depend on those it was decoded
    with, but for the rounding of matrix products, which may differ with the number of rows.

    Args:
        model: Predicts.
        requests: Prompts that are equal are read once.
        num_top: How many of the most likely tokens to tell of at each place; None to tell of no
            log-probabilities at all.
        num_guesses: Guess up to this many tokens ahead by prompt lookup and verify them in one
            pass.  The tokens that are drawn are the same, but for rounding.
        kv_cache: What keys and values are held in, ``"float"``, the dtype of the weights, or
            ``"int8"``.
        page_size: Hold them in pages of this many tokens, taken as sequences grow, which requests
            of one prompt share; 0 for a row of the length of the longest request for each.

    Raises:
        ArgumentError: A seed, a logit bias or one of the last two is impossible; a ValueError.
    """

    _cache: KVCache | PagedRows
    # of the rows; None while the model has not seen their last tokens
    _logits: Tensor | None
    _history: Tensor | None
    # last tokens, on the device, and how many each row has drawn
    _tokens: Tensor
    _steps: Tensor

    def __init__(
        self,
        model: CausalLM,
        requests: Sequence[Request],
        *,
        num_top: int | None = None,
        num_guesses: int = 0,
        kv_cache: str = "float",
        page_size: int = 0,
    ) -> None:
        if kv_cache not in KV_CACHES:
            raise ArgumentError(
                f"generate: kv_cache must be one of {', '.join(KV_CACHES)}, got {kv_cache!r}"
            )
        if not isinstance(page_size, int) or page_size < 0:
            raise ArgumentError(
                f"generate: page_size must be a whole number of at least 0, got {page_size!r}"
            )
        self._cache_dtype, self._page_size = KV_CACHES[kv_cache], page_size
        self._model, self._requests = model, list(requests)
        self._num_top, self._num_guesses = num_top, num_guesses
        self._counts = [0] * len(self._requests)
        self._ended = {n for n, request in enumerate(requests) if request.max_new_tokens == 0}
        # the request of each row of the batch
        self._rows = [n for n in range(len(self._requests)) if n not in self._ended]
        running = [self._requests[n] for n in self._rows]
        self._sampler = Sampler(
            [request.sampling for request in running],
            [request.seed for request in running],
            vocab_size=model.config.vocab_size,
            max_draws=max((request.max_new_tokens for request in running), default=0),
            device=model.device,
        )
        self._has_started = False

    @property
    def is_done(self) -> bool:
        """Whether every request has ended."""
        return len(self._ended) == len(self._requests)

    def end(self, request: int) -> None:
        """Draw no more tokens of a request."""
        self._ended.add(request)
        self._finish()

    @torch.inference_mode()
    def step(self) -> list[Drawn]:
        """The next token of every request that has not ended; several where guesses were right.

        A request whose logits are not finite ends without a token, and the others go on.
        """
        if self.is_done:
            return []
        if not self._has_started:
            self._start()
        self._drop_ended()
        if self._logits is None:
            self._logits = self._verified() if self._num_guesses else self._decoded()
        tokens = self._sampled(self._logits)
        read = _sent(self._told(self._logits, tokens))
        self._logits = None
        if not self._num_guesses:
            self._tokens = tokens[:, 0]
            self._steps += 1
            if self._runs_ahead and not self._draws_last():
                # while the host waits for what was drawn
                self._logits = self._decoded()
        drawn = self._accepted(read())
        self._finish()
        return drawn

    def _finish(self) -> None:
        """When every request has ended, leave what was captured to the next generation."""
        if self.is_done and self._has_started:
            keep(self._model, self._step)
            self._has_started = False

    def _start(self) -> None:
        """Read the prompts, each once."""
        model, device = self._model, self._model.device
        requests = [self._requests[n] for n in self._rows]
        self._runs_ahead = device.type != "cpu" and not self._num_guesses
        longest = max((len(r.prompt) + r.max_new_tokens for r in requests), default=1)
        prompts = list(dict.fromkeys(request.prompt for request in requests))
        sources = [prompts.index(request.prompt) for request in requests]
        self._step, self._cache = self._new_step(requests, len(prompts))
        if isinstance(self._step, DirectStep) and self._step.reads(prompts):
            logits, lengths = self._step.read(prompts), self._cache.lengths
        else:
            first = self._cache.part(0, len(prompts))
            logits, lengths = prefill(model, prompts, first), first.lengths
        self._logits = logits[sources][:, None]
        self._cache.spread(sources, lengths)
        self._tokens = torch.zeros(len(requests), dtype=torch.int64, device=device)
        self._steps = torch.zeros_like(self._tokens)
        self._starts = torch.tensor([len(request.prompt) for request in requests], device=device)
        self._history = None
        if self._sampler.needs_history:
            rows = [[*r.prompt, *[0] * (longest - len(r.prompt))] for r in requests]
            self._history = torch.tensor(rows, device=device)
        self._last = [0] * len(requests)
        self._guesses: list[list[int]] = [[] for _ in requests]
        self._lookups = [PromptLookup(r.prompt) for r in requests] if self._num_guesses else []
        self._has_started = True

    def _new_step(
        self, requests: Sequence[Request], num_prompts: int
    ) -> tuple[Step, KVCache | PagedRows]:
        """And room for the requests; in pages, whose rows at first are those of the prompts."""
        context = self._model.config.max_position_embeddings
        sizes = [min(len(r.prompt) + r.max_new_tokens, context) for r in requests]
        if not self._page_size:
            longest = max(sizes, default=1)
            return new_step(self._model, len(requests), longest, self._cache_dtype)
        # a row takes the guesses of the others too, beyond what is left to itself
        sizes = [min(size + self._num_guesses, context) for size in sizes]
        # no page is larger than what the longest row fills
        page_size = min(self._page_size, max(sizes, default=1))
        pages = max(1, sum(-(-size // page_size) for size in sizes))
        cache = self._model.new_paged_cache(pages, page_size, dtype=self._cache_dtype)
        rows = cache.rows([cache.add() for _ in range(num_prompts)])
        return decode_step(self._model, rows), rows

    def _draws_last(self) -> bool:
        """Whether every row has just drawn all it was asked for."""
        return all(self._counts[n] + 1 == self._requests[n].max_new_tokens for n in self._rows)

    def _drop_ended(self) -> None:
        """Let the rows of requests that have ended leave: the last ones take their places."""
        kept = [row for row, n in enumerate(self._rows) if n not in self._ended]
        if len(kept) == len(self._rows):
            return
        staying = set(kept[: sum(row < len(kept) for row in kept)])
        movers = iter(kept[len(staying) :])
        order = [row if row in staying else next(movers) for row in range(len(kept))]
        self._rows = [self._rows[row] for row in order]
        if not order:
            return
        self._cache.keep(order)
        self._sampler = self._sampler.keep(order)
        self._tokens, self._steps = self._tokens[order], self._steps[order]
        self._starts = self._starts[order]
        if self._history is not None:
            self._history = self._history[order]
        if self._logits is not None:
            self._logits = self._logits[order]
        self._guesses = [self._guesses[row] for row in order]
        self._last = [self._last[row] for row in order]
        if self._lookups:
            self._lookups = [self._lookups[row] for row in order]

    def _decoded(self) -> Tensor:
        """Logits ``(B, 1, V)`` after the last tokens; where one is none, any."""
        tokens = self._tokens[:, None]
        self._remember(tokens)
        # ahead of the host, which would have seen that a row has no token
        return self._step(tokens.clamp(min=0) if self._runs_ahead else tokens)

    def _verified(self) -> Tensor:
        """Logits ``(B, T, V)`` after the last tokens and after each guess that follows them."""
        # every row has room for as many as the longest guess
        most = min(self._num_guesses, self._cache.max_length - self._cache.length - 1)
        for row, n in enumerate(self._rows):
            left = self._requests[n].max_new_tokens - self._counts[n]
            self._guesses[row] = self._lookups[row].guess(min(most, left - 1))
        width = 1 + max(map(len, self._guesses))
        rows = zip(self._last, self._guesses, strict=True)
        # a short row is filled up with any tokens: what they draw is not looked at
        ids = [[last, *row, *[0] * (width - 1 - len(row))] for last, row in rows]
        inputs = torch.tensor(ids, device=self._tokens.device)
        self._remember(inputs)
        return self._step(inputs)

    def _remember(self, ids: Tensor) -> None:
        """Write tokens ``(B, T)``, of which the first was drawn last, into the history."""
        if self._history is not None:
            start = (self._starts + self._steps - 1)[:, None]
            places = start + torch.arange(ids.shape[1], device=ids.device)
            self._history.scatter_(1, places.clamp(max=self._history.shape[1] - 1), ids)

    def _sampled(self, logits: Tensor) -> Tensor:
        """Tokens ``(B, T)``; at each place those before it count as drawn."""
        drawn = []
        for at in range(logits.shape[1]):
            steps = self._steps + at if at else self._steps
            lengths = None if self._history is None else self._starts + steps
            drawn.append(self._sampler.draw(logits[:, at], steps, self._history, lengths))
        return torch.stack(drawn, dim=1) if len(drawn) > 1 else drawn[0][:, None]

    def _told(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """``(B, T, 1 + ...)`` for one transfer: token, its log-probability, the most likely."""
        if self._num_top is None:
            return tokens[..., None]
        logprobs = logits.float().log_softmax(dim=-1)
        columns = [tokens[..., None], logprobs.gather(-1, tokens[..., None].clamp(min=0))]
        if self._num_top:
            values, ids = logprobs.topk(min(self._num_top, logprobs.shape[-1]))
            columns += [ids, values]
        return torch.cat([column.double() for column in columns], dim=-1)

    def _accepted(self, told: list[list[list[float]]]) -> list[Drawn]:
        """What was drawn, up to the first place after a wrong guess, and with it the new state."""
        out: list[Drawn] = []
        lengths = list(self._cache.lengths)
        width = len(told[0])
        for row, n in enumerate(self._rows):
            guesses, request = self._guesses[row], self._requests[n]
            for at, (token, *rest) in enumerate(told[row]):
                token = int(token)
                self._counts[n] += 1
                ends = token == NO_TOKEN or token in request.end_ids
                is_last = ends or self._counts[n] == request.max_new_tokens
                out.append(_drawn(n, token, rest, is_last))
                self._last[row] = token
                if self._lookups and token != NO_TOKEN:
                    self._lookups[row].add(token)
                if is_last:
                    self._ended.add(n)
                if is_last or at >= len(guesses) or guesses[at] != token:
                    # what was stored of the guesses after this place is forgotten
                    lengths[row] -= width - 1 - at
                    break
        if self._num_guesses:
            self._cache.set_lengths(lengths)
            counts = [self._counts[n] for n in self._rows]
            self._steps = torch.tensor(counts, device=self._steps.device)
        return out


def _sent(told: Tensor) -> Callable[[], list[list[list[float]]]]:
    """Begin to copy to the host; a function that waits for it, and not for what comes after."""
    if not told.is_cuda:
        return told.tolist
    copy = torch.empty(told.shape, dtype=told.dtype, pin_memory=True)
    copy.copy_(told, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(told.device))

    def read() -> list[list[list[float]]]:
        copied.synchronize()
        return copy.tolist()

    return read


def _drawn(request: int, token: int, rest: Sequence[float], is_last: bool) -> Drawn:
    if not rest:
        return Drawn(request, token, math.nan, (), is_last)
    logprob, *top = rest
    count = len(top) // 2
    pairs = zip(map(int, top[:count]), top[count:], strict=True)
    return Drawn(request, token, logprob, tuple(pairs), is_last)


def new_tokens(model: CausalLM, length: int, max_new_tokens: int) -> int:
    """How many tokens may follow a prompt of ``length``.

    Raises:
        ArgumentError: The prompt is empty or longer than the context, or ``max_new_tokens`` is no
            whole number or negative.
    """
    context = model.config.max_position_embeddings
    check_prompt("generate", length, context)
    whole = isinstance(max_new_tokens, int) and max_new_tokens >= 0
    if not whole:
        raise ArgumentError(
            f"generate: max_new_tokens must be a whole number of at least 0, got {max_new_tokens}"
        )
    return min(max_new_tokens, context - length)


def check_prompt(caller: str, length: int, context: int) -> None:
    """Refuse a prompt of no tokens, or of more than the context has.

    Raises:
        ArgumentError: It is; the message begins with ``caller``.
    """
    if length == 0:
        raise ArgumentError(f"{caller}: prompt must have at least one token, got none")
    if length > context:
        raise ArgumentError(
            f"{caller}: prompt must fit in the context of {context} tokens, got {length}"
        )
