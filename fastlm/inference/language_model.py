"""A model with its tokenizer: generate, stream, next_token, score."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from fastlm._errors import ArgumentError, check_text
from fastlm.inference.next_token import NextToken
from fastlm.inference.text import StopStrings, TextStream
from fastlm.model.checkpoint import ModelFileError
from fastlm.model.generate import check_prompt, decode, new_tokens
from fastlm.model.hub import model_folder
from fastlm.model.sampling import Sampling, new_generator
from fastlm.model.transformer import CausalLM

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class StreamItem:
    """One generated token.

    Attributes:
        text: Text that became certain with it: empty while a character or a stop string may be
            incomplete.  The texts of all items join to what ``generate`` returns.
        id: The token.
        logprob: Its natural log probability under the model, before temperature and filters.
        finish: Why it is the last, or None: ``"eos"``, ``"stop"`` (a stop string), ``"length"``
            (``max_new_tokens``) or ``"context"`` (the context is full).
    """

    text: str
    id: int
    logprob: float
    finish: str | None


@dataclass(frozen=True)
class Score:
    """How likely a model finds a continuation.

    Attributes:
        ids: Tokens of the continuation.
        logprobs: Natural log probability of each, given what is before it.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def logprob(self) -> float:
        """Of the whole continuation."""
        return sum(self.logprobs)


class LanguageModel:
    """What :func:`fastlm.load` returns.

    Attributes:
        model: Token ids in, logits out.
        tokenizer: Text to token ids and back.
    """

    def __init__(self, model: CausalLM, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the tokenizer puts around a text.

        Raises:
            ArgumentError: The text has lone surrogates; a ValueError.
        """
        check_text("encode: text", text)
        return self.tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return self.tokenizer.decode(list(ids))

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 128,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> str:
        """Continue ``prompt``; return the continuation alone.

        Ends after ``max_new_tokens``, at an end-of-text token, before a stop string, or when prompt
        and continuation fill the context.

        Args:
            prompt: Text; empty only where the model has a token that starts a text.
            max_new_tokens: At most this many tokens.
            temperature: 0, the default, takes the most likely token each time; any other samples.
            top_k: Draw from the k most likely tokens.
            top_p: Then from the most likely that together reach this probability.
            min_p: Then from those at least this fraction as likely as the most likely.  Any of
                these three without a temperature means temperature 1.
            seed: Equal seeds give equal text.  The global random generators are not used.
            stop: A string, or strings, to end before.

        Raises:
            ArgumentError: One is out of range, or the prompt empty or longer than the context; a
                ValueError.
            FloatingPointError: The model's logits are not finite.
        """
        items = self.stream(
            prompt,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=stop,
        )
        return "".join(item.text for item in items)

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 128,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> Iterator[StreamItem]:
        """Continue ``prompt`` token by token; arguments and errors as in :meth:`generate`.

        Arguments are checked here, before the first item is asked for.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        stops = StopStrings(stop)
        prompt_ids = self._prompt_ids(prompt)
        count = new_tokens(self.model, len(prompt_ids), max_new_tokens)
        limit = "length" if count == max_new_tokens else "context"
        ids = self._tensor(prompt_ids)
        steps = decode(self.model, ids, count, sampling, new_generator(seed, ids.device))
        return self._stream(prompt_ids, count, limit, steps, stops)

    def _stream(
        self,
        prompt_ids: list[int],
        count: int,
        limit: str,
        steps: Iterator[tuple[torch.Tensor, torch.Tensor]],
        stops: StopStrings,
    ) -> Iterator[StreamItem]:
        texts = TextStream(self.tokenizer, prompt_ids)
        for number, (tokens, logits) in enumerate(steps, start=1):
            token = int(tokens.item())
            logprob = logits[0].float().log_softmax(dim=-1)[token].item()
            ended = token in self.model.config.eos_token_ids
            text = stops.add("" if ended else texts.add(token))
            if ended or number == count:
                text += stops.add(texts.finish()) + stops.finish()
            finish = "stop" if stops.found else limit if number == count else None
            finish = "eos" if ended else finish
            yield StreamItem(text, token, logprob, finish)
            if finish:
                return

    @torch.inference_mode()
    def next_token(self, prompt: str, top_k: int = 10, temperature: float = 1.0) -> NextToken:
        """The ``top_k`` most likely next tokens after ``prompt``, with their probabilities.

        Raises:
            ArgumentError: One is out of range, or the prompt empty or longer than the context; a
                ValueError.
            FloatingPointError: The model's logits are not finite.
        """
        if not (isinstance(top_k, int) and top_k > 0):
            raise ArgumentError(f"next_token: top_k must be a whole number above 0, got {top_k}")
        if not 0 < temperature < float("inf"):
            raise ArgumentError(f"next_token: temperature must be above 0, got {temperature}")
        ids = self._prompt_ids(prompt)
        check_prompt("next_token", len(ids), self.model.config.max_position_embeddings)
        logits = self.model(self._tensor(ids), logits_to_keep=1).logits[0, -1]
        if not logits.amax().isfinite():
            raise FloatingPointError("next_token: the model's logits are not finite")
        return NextToken.of(logits, self.tokenizer, prompt, top_k, temperature)

    @torch.inference_mode()
    def score(self, prompt: str, continuation: str) -> Score:
        """How likely ``continuation`` is after ``prompt``.

        Where a token would span the seam, the two are tokenized apart.

        Raises:
            ArgumentError: One of the two has no tokens, or they do not fit in the context together;
                a ValueError.
        """
        context = self.model.config.max_position_embeddings
        before = self._prompt_ids(prompt)
        check_prompt("score", len(before), context)
        ids = self.encode(prompt + continuation) if prompt else []
        if ids[: len(before)] != before:
            ids = before + self.tokenizer.encode(continuation, add_special_tokens=False).ids
        count = len(ids) - len(before)
        if count <= 0:
            raise ArgumentError("score: continuation must have at least one token, got none")
        if len(ids) > context:
            raise ArgumentError(
                f"score: prompt and continuation must fit in the context of {context} tokens, "
                f"got {len(ids)}"
            )
        logits = self.model(self._tensor(ids[:-1]), logits_to_keep=count).logits[0]
        targets = torch.tensor(ids[-count:], device=logits.device)
        logprobs = logits.float().log_softmax(dim=-1).gather(-1, targets[:, None])[:, 0]
        return Score(tuple(ids[-count:]), tuple(logprobs.tolist()))

    def _prompt_ids(self, prompt: str) -> list[int]:
        ids = self.encode(prompt)
        start = self.model.config.bos_token_id
        # of text that the tokenizer knows nothing of nothing is left: that is no empty prompt
        return [start] if not prompt and not ids and start is not None else ids

    def _tensor(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor([ids], device=self.model.lm_head.weight.device)


def load(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> LanguageModel:
    """Read a model and its tokenizer.

    Args:
        source: Run folder, or any folder in Hugging Face's layout: ``config.json``, safetensors and
            ``tokenizer.json``; or the name of such a model on the Hugging Face hub.
        device: None for a CUDA device where there is one.
        dtype: Of the weights; None for that of the file, on CPU float32, where narrower types are
            slower.

    Raises:
        ModelFileError: Something is missing, damaged or not supported; the message says what.
    """
    folder = model_folder(source)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    model = CausalLM.from_pretrained(folder, dtype=dtype, device=device)
    tokenizer = _read_tokenizer(folder)
    # sizes may differ: embeddings are often padded to a round number
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= model.config.vocab_size:
        raise ModelFileError(
            f"{folder / TOKENIZER}: has token {largest}, the model knows {model.config.vocab_size}"
        )
    return LanguageModel(model, tokenizer)


def _read_tokenizer(folder: Path) -> Tokenizer:
    path = folder / TOKENIZER
    try:
        return Tokenizer.from_buffer(path.read_bytes())
    except FileNotFoundError:
        raise ModelFileError(f"{folder}: {TOKENIZER} is missing") from None
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot be read as a tokenizer: {error}") from error
