"""The transformer: token ids to logits, or to a loss without logits."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.model import checkpoint
from fastlm.model.blocks import Decoder
from fastlm.model.config import CausalLMConfig
from fastlm.model.generate import Generation, Request, new_tokens
from fastlm.model.hub import model_folder
from fastlm.model.kv_cache import KVCache
from fastlm.model.paged_kv_cache import PagedKVCache, PagedRows
from fastlm.model.sampling import Sampling
from fastlm.ops.linear_cross_entropy import linear_cross_entropy

IGNORE_INDEX = -100


class CausalLMOutput(NamedTuple):
    """What a :class:`CausalLM` returns.

    Attributes:
        loss: Scalar, float32 or wider; None without labels.
        logits: ``(B, T, V)``; None when there is a loss, unless asked for.
    """

    loss: Tensor | None
    logits: Tensor | None


class CausalLM(nn.Module):
    """A decoder-only language model: Llama, Mistral, Qwen2, Qwen3 or GPT-2, as the config says.

    Modules and parameters have the names that Hugging Face gives to those of the first four, whose
    state dict is their checkpoint; GPT-2's are renamed in its files.

    Args:
        config: Sizes and options.
    """

    def __init__(self, config: CausalLMConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.reset_parameters()

    def tie_weights(self) -> None:
        """Make the head share the embedding's weight, where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def reset_parameters(self) -> None:
        """Draw new weights: normal, and narrower where a projection adds to the residual stream.

        That factor, one over the root of the number of such additions, is GPT-2's (Radford et al.,
        2019, section 2.3).
        """
        std = self.config.initializer_range
        narrow = std * (2 * self.config.num_hidden_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=narrow if adds else std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.ones_(parameter)

    @property
    def device(self) -> torch.device:
        """Where the token embedding is."""
        return self.model.embed_tokens.weight.device

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> CausalLM:
        """Read a Llama, Mistral, Qwen2, Qwen3 or GPT-2 model in Hugging Face's layout.

        Its weights may be in one file or in several.

        Args:
            source: Folder with ``config.json`` and safetensors, or the model's name on the hub.
            dtype: Of the weights; None for that of the file.
            device: Of the weights.

        Raises:
            ModelFileError: Something is missing, damaged or not supported; the message says what.
        """
        folder = model_folder(source)
        config = checkpoint.read_config(folder)
        device = torch.device(device)
        with torch.device("meta"):
            model = cls(config)
        checkpoint.load_weights(model, folder, config, dtype=dtype, device=device)
        model.tie_weights()
        if model.model.rotary is not None:
            model.model.rotary.to_empty(device=device)
        return model

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that transformers' ``AutoModelForCausalLM`` and we read.

        Files that are there are replaced, each once the new one is complete.
        """
        checkpoint.save(folder, self.config, self.state_dict())

    def generate(
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        eos_token_id: int | tuple[int, ...] | None = None,
        num_return_sequences: int = 1,
        prompt_lookup_num_tokens: int = 0,
        kv_cache: str = "float",
        page_size: int = 0,
    ) -> Tensor:
        """Continue token ids.

        Ends after ``max_new_tokens``, when every row has ended, or when prompt and continuation
        fill the context.  A row that has ended is no longer computed.

        Args:
            input_ids: ``(B, T)``, prompts of one length, T from 1 to the context; or lists of token
                ids, of any lengths, without padding.
            max_new_tokens: At most this many more of each.
            temperature: 0, the default, takes the most likely token; see
                :class:`fastlm.model.sampling.Sampling` for this and the next five.
            top_k: Keep the k most likely.
            top_p: Keep the most likely that reach this probability.
            min_p: Keep those at least this fraction as likely as the most likely.
            repetition_penalty: Above 1 makes tokens that were there less likely.
            logit_bias: Token id to what is added to its logit.
            seed: Row b draws with seed + b, so equal seeds give equal tokens.  The global
                generators are not used.
            eos_token_id: A row ends with this token, or one of these; None for the config's.
            num_return_sequences: Rows of each prompt, which follow each other; it is read once.
            prompt_lookup_num_tokens: Guess up to this many tokens ahead where a row repeats itself,
                and verify them in one pass; what is drawn is the same but for rounding.
            kv_cache: ``"int8"`` holds keys and values in 8 bits with a scale for each token and
                head; ``"float"`` in the dtype of the weights.
            page_size: Hold them in pages of this many tokens, which rows take as they grow and
                share where they begin alike; 0 for room for the longest row in every row.

        Returns:
            ``(B * num_return_sequences, longest)``, prompts included; after its end a row holds the
            config's pad token, or where there is none the first token that ends a row.

        Raises:
            ValueError: An argument is out of range; the message names it.
            FloatingPointError: The model's logits are not finite.
        """
        if isinstance(input_ids, Tensor):
            _check_ids(input_ids, "input_ids")
            dtype, prompts = input_ids.dtype, input_ids.tolist()
        else:
            dtype, prompts = torch.int64, [_listed(prompt) for prompt in input_ids]
        largest = max((max(prompt, default=0) for prompt in prompts), default=0)
        smallest = min((min(prompt, default=0) for prompt in prompts), default=0)
        if smallest < 0 or largest >= self.config.vocab_size:
            raise ValueError(
                f"generate: input_ids must be in [0, {self.config.vocab_size}), "
                f"got {smallest if smallest < 0 else largest}"
            )
        for name, value, least in (
            ("num_return_sequences", num_return_sequences, 1),
            ("prompt_lookup_num_tokens", prompt_lookup_num_tokens, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"generate: {name} must be at least {least}, got {value!r}")
        sampling = Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repetition_penalty=repetition_penalty, logit_bias=logit_bias,
        )  # fmt: skip
        eos = self.config.eos_token_ids if eos_token_id is None else eos_token_id
        eos = (eos,) if isinstance(eos, int) else tuple(eos)
        rows = [list(prompt) for prompt in prompts for _ in range(num_return_sequences)]
        requests = [
            Request(
                prompt=tuple(prompt),
                max_new_tokens=new_tokens(self, len(prompt), max_new_tokens),
                sampling=sampling,
                seed=None if seed is None else seed + row,
                end_ids=eos,
            )
            for row, prompt in enumerate(rows)
        ]
        generation = Generation(
            self, requests, num_guesses=prompt_lookup_num_tokens, kv_cache=kv_cache,
            page_size=page_size,
        )  # fmt: skip
        while not generation.is_done:
            for drawn in generation.step():
                drawn.check()
                rows[drawn.request].append(drawn.token)
        pad = self.config.pad_token_id
        pad = (eos[0] if eos else 0) if pad is None else pad
        longest = max(map(len, rows), default=0)
        filled = [[*row, *[pad] * (longest - len(row))] for row in rows]
        return torch.tensor(filled, dtype=dtype, device=self.device).view(len(rows), longest)

    def new_cache(
        self, batch: int, max_length: int | None = None, *, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty cache for ``model(input_ids, cache=cache)``.

        Args:
            batch: Number of sequences.
            max_length: Tokens each may reach; None for as many as the model can.
            dtype: ``torch.int8`` for keys and values in 8 bits, with a scale for each token and
                head; None for the dtype of the weights.

        Raises:
            ValueError: ``max_length`` is beyond the model's context, or there is no cache of
                ``dtype``.
        """
        context = self.config.max_position_embeddings
        max_length = context if max_length is None else max_length
        if not 0 < max_length <= context:
            raise ValueError(
                f"CausalLM: max_length must be in [1, {context}], the context of the model, "
                f"got {max_length}"
            )
        options = self._cache_options(dtype)
        return KVCache(self.config.num_hidden_layers, batch, max_length, **options)

    def new_paged_cache(
        self, num_pages: int, page_size: int = 16, *, dtype: torch.dtype | None = None
    ) -> PagedKVCache:
        """Pages for ``model(input_ids, cache=cache.rows(sequences))``.

        Args:
            num_pages: Pages of all sequences together.
            page_size: Tokens of a page.
            dtype: As in :meth:`new_cache`.

        Raises:
            ValueError: One of the two is not above 0, or there is no cache of ``dtype``.
        """
        for name, value in (("num_pages", num_pages), ("page_size", page_size)):
            if value < 1:
                raise ValueError(f"CausalLM: {name} must be at least 1, got {value}")
        return PagedKVCache(
            self.config.num_hidden_layers, num_pages, page_size,
            max_length=self.config.max_position_embeddings, **self._cache_options(dtype),
        )  # fmt: skip

    def _cache_options(self, dtype: torch.dtype | None) -> dict[str, Any]:
        weight = self.model.embed_tokens.weight
        if dtype not in (None, weight.dtype, torch.int8):
            raise ValueError(f"CausalLM: dtype must be {weight.dtype} or torch.int8, got {dtype}")
        return {
            "num_kv_heads": self.config.num_kv_heads,
            "head_dim": self.config.head_size,
            "dtype": weight.dtype if dtype is None else dtype,
            "device": weight.device,
        }

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        num_items: int | Tensor | None = None,
        return_logits: bool = False,
        logits_to_keep: int = 0,
        cache: KVCache | PagedRows | None = None,
    ) -> CausalLMOutput:
        """Predict each next token.

        Args:
            input_ids: ``(B, T)`` token ids.
            labels: ``(B, T)`` token ids that line up with ``input_ids``, usually the same; position
                t is held to label t + 1 here, and -100 is left out of the loss.
            targets: ``(B, T)`` token ids that line up with the logits, instead of ``labels``: for
                callers who know the token after the last one.
            num_items: Divide the summed loss by this, not by the targets of this batch: gradient
                accumulation over batches of unequal size.
            return_logits: Compute logits beside the loss.
            logits_to_keep: Only the logits of this many last positions; 0 for all.
            cache: What came before; the new tokens follow it and are added to it.  Nothing is then
                recorded for a gradient of the blocks.

        Returns:
            The loss, with labels or targets, never holding ``(B, T, V)`` logits unless they are
            asked for; without, the logits.

        Raises:
            ValueError: Shapes do not match, the sequence is longer than the context, or the cache
                is full; nothing is written to it then.
        """
        batch, length = _check_ids(input_ids, "input_ids")
        if labels is not None:
            if targets is not None:
                raise ValueError("CausalLM: labels must be None beside targets, got both")
            _check_like(labels, "labels", input_ids)
            # a column to ignore, rather than a copy of the hidden states without the last position
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        elif targets is not None:
            _check_like(targets, "targets", input_ids)
        if cache is None:
            hidden = self.model(input_ids)
        else:
            cache.check_room(batch, length)
            with torch.no_grad():
                hidden = self.model(input_ids, cache)
        loss = None if targets is None else self._loss(hidden, targets, num_items)
        if loss is not None and not return_logits:
            return CausalLMOutput(loss, None)
        return CausalLMOutput(loss, self.lm_head(hidden[:, -logits_to_keep:]))

    def _loss(self, hidden: Tensor, targets: Tensor, num_items: int | Tensor | None) -> Tensor:
        weight = self.lm_head.weight
        if num_items is None:
            return linear_cross_entropy(hidden, weight, targets)
        return linear_cross_entropy(hidden, weight, targets, reduction="sum") / num_items


def _listed(prompt: Sequence[int]) -> list[int]:
    if not (isinstance(prompt, Sequence) and all(isinstance(token, int) for token in prompt)):
        raise ValueError(f"generate: input_ids must be lists of token ids, got {prompt!r}")
    return list(prompt)


def _check_ids(ids: Tensor, name: str) -> tuple[int, int]:
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"CausalLM: {name} must be (B, T) token ids, int64 or int32, got shape "
            f"{tuple(ids.shape)} of {ids.dtype}"
        )
    return ids.shape[0], ids.shape[1]


def _check_like(ids: Tensor, name: str, input_ids: Tensor) -> None:
    if ids.shape != input_ids.shape:
        raise ValueError(
            f"CausalLM: {name} must have the shape of input_ids, {tuple(input_ids.shape)}, "
            f"got {tuple(ids.shape)}"
        )
