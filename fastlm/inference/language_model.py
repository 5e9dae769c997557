"""A model with its tokenizer: generate, stream, next_token, score."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from fastlm._errors import ArgumentError, check_text
from fastlm.inference.completion import Completion, Reader, Score, StreamItem
from fastlm.inference.generation_config import FolderSampling, chosen, read_sampling
from fastlm.inference.next_token import NextToken
from fastlm.model.checkpoint import CONFIG, ModelFileError
from fastlm.model.generate import Generation, Request, check_prompt, new_tokens
from fastlm.model.hub import model_folder
from fastlm.model.quantize import WEIGHTS, quantize
from fastlm.model.sampling import NO_TOKEN, Sampling, is_number
from fastlm.model.transformer import CausalLM
from fastlm.ops.cross_entropy import cross_entropy
from fastlm.ops.linear_logprobs import linear_logprobs

TOKENIZER = "tokenizer.json"
# of peft's layout
ADAPTER = "adapter_config.json"


class LanguageModel:
    """What :func:`fastlm.load` returns.

    Attributes:
        model: Token ids in, logits out.
        tokenizer: Text to token ids and back.
        defaults: How tokens are drawn where the caller does not say: as the folder's
            ``generation_config.json`` says, else greedily.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        sampling: Sampling | FolderSampling | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.defaults = Sampling() if sampling is None else sampling

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn where the caller says nothing.

        Raises:
            ModelFileError: A value of ``generation_config.json`` is impossible.
        """
        return chosen(self.defaults)

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        self.defaults = sampling

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
        repetition_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] = (),
        prompt_lookup_num_tokens: int = 0,
        kv_cache: str = "float",
        page_size: int = 0,
    ) -> str:
        """Continue ``prompt``; return the continuation alone.

        Ends after ``max_new_tokens``, at an end-of-text token, before a stop string, or when prompt
        and continuation fill the context.  How tokens are drawn is what :attr:`defaults` says,
        number by number, where it is not said here.

        Args:
            prompt: Text; empty only where the model has a token that starts a text.
            max_new_tokens: At most this many tokens.
            temperature: 0 takes the most likely token each time, as is done where neither this nor
                the next three are said anywhere; any other samples.
            top_k: Draw from the k most likely tokens.
            top_p: Then from the most likely that together reach this probability.
            min_p: Then from those at least this fraction as likely as the most likely.  Any of
                these three without a temperature means temperature 1.
            repetition_penalty: Above 1 makes tokens of prompt and continuation less likely.
            logit_bias: Token id to what is added to its logit; ``-inf`` bans it.
            seed: Equal seeds give equal text.  The global random generators are not used.
            stop: A string, or strings, to end before.
            stop_token_ids: Tokens that end the text, besides those of the model's config.
            prompt_lookup_num_tokens: Guess up to this many tokens ahead where the text repeats
                itself, and verify them in one pass: faster there, and the same text but for
                rounding.
            kv_cache: ``"int8"`` holds keys and values in 8 bits with a scale for each token and
                head; ``"float"`` in the dtype of the weights.
            page_size: Hold them in pages of this many tokens, which texts take as they grow and
                share where they begin alike; 0 for room for the longest text for each.

        Raises:
            ArgumentError: One is out of range, or the prompt empty or longer than the context; a
                ValueError.
            ModelFileError: A value of ``generation_config.json`` that holds here is impossible.
            FloatingPointError: The model's logits are not finite.
        """
        items = self.stream(
            prompt,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            logit_bias=logit_bias,
            seed=seed,
            stop=stop,
            stop_token_ids=stop_token_ids,
            prompt_lookup_num_tokens=prompt_lookup_num_tokens,
            kv_cache=kv_cache,
            page_size=page_size,
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
        repetition_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] = (),
        top_logprobs: int = 0,
        prompt_lookup_num_tokens: int = 0,
        kv_cache: str = "float",
        page_size: int = 0,
    ) -> Iterator[StreamItem]:
        """Continue ``prompt`` token by token; arguments and errors as in :meth:`generate`.

        Arguments are checked here, before the first item is asked for.  ``top_logprobs`` is how
        many of the most likely tokens each item tells of.
        """
        sampling = chosen(
            self.defaults, temperature=temperature, top_k=top_k, top_p=top_p,
            min_p=min_p, repetition_penalty=repetition_penalty, logit_bias=logit_bias,
        )  # fmt: skip
        _check_count("top_logprobs", top_logprobs)
        _check_count("prompt_lookup_num_tokens", prompt_lookup_num_tokens)
        request, reader = self._request(
            prompt, max_new_tokens, sampling, seed, stop, stop_token_ids
        )
        generation = Generation(
            self.model, [request], num_top=top_logprobs, num_guesses=prompt_lookup_num_tokens,
            kv_cache=kv_cache, page_size=page_size,
        )  # fmt: skip
        return self._stream(generation, reader)

    def _stream(self, generation: Generation, reader: Reader) -> Iterator[StreamItem]:
        while not generation.is_done:
            for drawn in generation.step():
                drawn.check()
                item = reader.read(drawn)
                yield item
                if item.finish:
                    return

    def generate_batch(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 128,
        *,
        num_return_sequences: int = 1,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | Sequence[int] | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] = (),
        top_logprobs: int = 0,
        prompt_lookup_num_tokens: int = 0,
        kv_cache: str = "float",
        page_size: int = 0,
    ) -> list[Completion]:
        """Continue several prompts of any lengths together.

        Each pass over the weights gives a token of every prompt, and those that have ended leave.

        Args:
            prompts: Texts; arguments that are not here are as in :meth:`generate`.
            max_new_tokens: At most this many tokens of each.
            num_return_sequences: How many continuations of each prompt, which is read once.
            temperature, top_k, top_p, min_p, repetition_penalty, logit_bias, stop, stop_token_ids,
                prompt_lookup_num_tokens, kv_cache, page_size: Of all.
            seed: Of all prompts, or one for each.  Continuation j of a prompt is what
                :meth:`generate` gives for ``seed + j``, but for rounding.
            top_logprobs: How many of the most likely tokens each item tells of.

        Returns:
            ``num_return_sequences`` completions of the first prompt, then those of the second, ...
            Where the model's logits are not finite a completion ends with ``finish="error"``.

        Raises:
            ArgumentError: One is out of range, or a prompt empty or longer than the context; a
                ValueError.
            ModelFileError: A value of ``generation_config.json`` that holds here is impossible.
        """
        if isinstance(prompts, str):
            raise ArgumentError(f"generate_batch: prompts must be several texts, got {prompts!r}")
        if not (seed is None or isinstance(seed, int | Sequence)):
            raise ArgumentError(f"generate_batch: seed must be a whole number, got {seed!r}")
        sampling = chosen(
            self.defaults, temperature=temperature, top_k=top_k, top_p=top_p,
            min_p=min_p, repetition_penalty=repetition_penalty, logit_bias=logit_bias,
        )  # fmt: skip
        _check_count("top_logprobs", top_logprobs)
        _check_count("prompt_lookup_num_tokens", prompt_lookup_num_tokens)
        _check_count("num_return_sequences", num_return_sequences, least=1)
        seeds = [seed] * len(prompts) if seed is None or isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise ArgumentError(
                f"generate_batch: seed must be one for each of {len(prompts)} prompts, "
                f"got {len(seeds)}"
            )
        asked = [
            self._request(
                prompt, max_new_tokens, sampling, None if first is None else first + number,
                stop, stop_token_ids,
            )
            for prompt, first in zip(prompts, seeds, strict=True)
            for number in range(num_return_sequences)
        ]  # fmt: skip
        generation = Generation(
            self.model,
            [request for request, _ in asked],
            num_top=top_logprobs,
            num_guesses=prompt_lookup_num_tokens,
            kv_cache=kv_cache,
            page_size=page_size,
        )
        stopped = set[int]()
        while not generation.is_done:
            for drawn in generation.step():
                if drawn.token == NO_TOKEN:
                    asked[drawn.request][1].fail()
                # tokens after a stop string, guessed and verified in the same step, are not wanted
                elif drawn.request not in stopped and asked[drawn.request][1].read(drawn).finish:
                    stopped.add(drawn.request)
                    generation.end(drawn.request)
        return [reader.completion for _, reader in asked]

    def _request(
        self,
        prompt: str,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int | None,
        stop: str | Sequence[str] | None,
        stop_token_ids: Sequence[int],
    ) -> tuple[Request, Reader]:
        check_stop_token_ids(stop_token_ids, self.model.config.vocab_size)
        ids = self._prompt_ids(prompt)
        count = new_tokens(self.model, len(ids), max_new_tokens)
        request = Request(
            prompt=tuple(ids),
            max_new_tokens=count,
            sampling=sampling,
            seed=seed,
            end_ids=(*self.model.config.eos_token_ids, *stop_token_ids),
        )
        limit = "length" if count == max_new_tokens else "context"
        return request, Reader(self.tokenizer, request, stop, limit)

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
        if not (is_number(temperature) and 0 < temperature < float("inf")):
            raise ArgumentError(f"next_token: temperature must be above 0, got {temperature!r}")
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
        inputs = self._tensor(ids)
        hidden, targets = self.model.model(inputs[:, :-1])[0, -count:], inputs[0, -count:]
        head: nn.Module = self.model.lm_head
        if isinstance(head, nn.Linear):
            # logits are never all in memory
            logprobs = linear_logprobs(hidden, head.weight, targets)
        else:
            logprobs = -cross_entropy(head(hidden), targets, reduction="none")
        return Score(tuple(ids[-count:]), tuple(logprobs.tolist()))

    def _prompt_ids(self, prompt: str) -> list[int]:
        ids = self.encode(prompt)
        start = self.model.config.bos_token_id
        # of text that the tokenizer knows nothing of nothing is left: that is no empty prompt
        return [start] if not prompt and not ids and start is not None else ids

    def _tensor(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor([ids], device=self.model.device)


def _check_count(name: str, value: int, least: int = 0) -> None:
    if not isinstance(value, int) or value < least:
        raise ArgumentError(
            f"generate: {name} must be a whole number of at least {least}, got {value!r}"
        )


def check_stop_token_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Refuse what is no sequence of tokens of a vocabulary.

    Raises:
        ArgumentError: It is not; the message names ``stop_token_ids``.
    """
    whole = isinstance(ids, Sequence) and all(
        isinstance(token, int) and 0 <= token < vocab_size for token in ids
    )
    if not whole:
        raise ArgumentError(
            f"generate: stop_token_ids must be token ids below {vocab_size}, got {ids!r}"
        )


def load(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    weights: str = "float",
    group_size: int = 128,
) -> LanguageModel:
    """Read a model and its tokenizer.

    Args:
        source: Run folder, or any folder in Hugging Face's layout: ``config.json``, safetensors and
            ``tokenizer.json``; or the name of such a model on the Hugging Face hub.
        device: None for a CUDA device where there is one.
        dtype: Of the weights; None for that of the file, on CPU float32, where narrower types are
            slower.
        weights: ``"float"``, or ``"int8"`` or ``"int4"``: see :func:`fastlm.quantize`.
        group_size: Of int4: 32, 64, 128 or 256 inputs share a step.

    Raises:
        ModelFileError: Something is missing, damaged or not supported; the message says what.
        ArgumentError: ``weights`` is none of these, or cannot be had of this model; a ValueError.
    """
    if weights not in WEIGHTS:
        raise ArgumentError(f"load: weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    folder = model_folder(source)
    if (folder / ADAPTER).exists() and not (folder / CONFIG).exists():
        raise ModelFileError(
            f"{source}: holds an adapter; fastlm export {source} --merge makes a model folder of it"
        )
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
    bits = WEIGHTS[weights]
    if bits is not None:
        quantize(model, bits, group_size=group_size)
    return LanguageModel(model, tokenizer, read_sampling(folder))


def _read_tokenizer(folder: Path) -> Tokenizer:
    path = folder / TOKENIZER
    try:
        tokenizer = Tokenizer.from_buffer(path.read_bytes())
    except FileNotFoundError:
        raise ModelFileError(f"{folder}: {TOKENIZER} is missing") from None
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot be read as a tokenizer: {error}") from error
    # files may ask for either: left from training, and no part of what a text means
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
