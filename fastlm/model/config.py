"""Sizes and options of a causal language model, under Hugging Face's names.  Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastlm.model import config_json
from fastlm.model.config_json import FULL, MODEL_TYPES, SLIDING

# Hugging Face's name of an activation -> the name fastlm.glu knows it by
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "sigmoid": "sigmoid",
}
MAX_HEAD_DIM = 512
ROPE_TYPES = ("linear", "llama3")
# an option -> its only value in models of other types than these
_OPTIONS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "attention_bias": (False, ("qwen3", "llama")),
    "mlp_bias": (False, ("llama",)),
    "sliding_window": (None, ("qwen3", "qwen2", "mistral")),
    "layer_types": (None, ("qwen3", "qwen2")),
    "rope_scaling": (None, ("qwen3", "llama", "qwen2", "mistral")),
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary angles are slowed down for contexts longer than those of pretraining.

    Attributes:
        rope_type: ``"linear"`` divides every frequency by ``factor`` (Chen et al., 2023,
            https://arxiv.org/abs/2306.15595).  ``"llama3"`` divides those that turn fewer than
            ``low_freq_factor`` times in ``original_max_position_embeddings`` positions, none that
            turns more than ``high_freq_factor`` times, and those between in part (Llama 3.1; Dubey
            et al., 2024, https://arxiv.org/abs/2407.21783).
        factor: By how much.
        low_freq_factor: llama3 alone, as the next two.
        high_freq_factor: Above ``low_freq_factor``.
        original_max_position_embeddings: The context of pretraining.

    Raises:
        ValueError: A value is missing or impossible; the message names the field.
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        _check(
            self.rope_type in ROPE_TYPES,
            f"rope_type must be one of default, {', '.join(ROPE_TYPES)}, got {self.rope_type!r}",
        )
        _check_above_zero("factor of rope_scaling", self.factor)
        if self.rope_type == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            _check_above_zero("low_freq_factor", low)
            _check_above_zero("high_freq_factor", high)
            _check(
                low is not None and high is not None and high > low,
                f"high_freq_factor must be above low_freq_factor, {low}, got {high}",
            )
            _check_size("original_max_position_embeddings", self.original_max_position_embeddings)


@dataclass(frozen=True, kw_only=True)
class CausalLMConfig:
    """What a :class:`fastlm.CausalLM` is made of.

    Attributes:
        vocab_size: V, number of token ids.
        hidden_size: C, width of the model.
        intermediate_size: Width of the feed-forward layer.
        num_hidden_layers: Number of blocks.
        num_attention_heads: H, query heads.
        num_key_value_heads: G, key and value heads; divides H; None for H.
        head_dim: D, even and at most 512; None for C / H.
        model_type: ``"llama"``; ``"qwen3"``, which normalises queries and keys per head;
            ``"qwen2"``, with biases on their projections and that of the values; ``"mistral"``,
            llama with a window; or ``"gpt2"``, with learned positions, LayerNorm, biases and a
            feed-forward layer without gate.
        hidden_act: Activation of the feed-forward layer: silu, gelu, gelu_pytorch_tanh (also called
            gelu_new), relu, relu2 or sigmoid.
        max_position_embeddings: Longest sequence, prompt and continuation together.
        rope_theta: Base of the rotary angles; gpt2 has none.
        rope_scaling: How they are slowed down, or None.
        sliding_window: How many of the latest keys a query sees, itself included, or None for all;
            qwen2, qwen3 and mistral only.
        layer_types: ``"sliding_attention"`` for each layer that has this window, or else
            ``"full_attention"``; None if all are alike.  qwen2 and qwen3 only.
        rms_norm_eps: Added to mean squares, by gpt2 to variances.
        tie_word_embeddings: The head shares the weight of the token embedding.
        attention_bias: The four projections of attention have biases; qwen3 and llama only.
        mlp_bias: The feed-forward projections have biases; llama only.
        initializer_range: Standard deviation of initial weights.
        bos_token_id: Token that starts a text, or None.
        eos_token_id: Token, or tokens, after which generation stops, or None.
        pad_token_id: Token that fills up short rows, or None.

    Raises:
        ValueError: A value is impossible; the message names the field.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    model_type: str = "qwen3"
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in (*_SIZES, "max_position_embeddings"):
            _check_size(name, getattr(self, name))
        _check(
            self.model_type in MODEL_TYPES,
            f"model_type must be one of {', '.join(MODEL_TYPES)}, got {self.model_type!r}",
        )
        for name in ("num_key_value_heads", "head_dim", "sliding_window"):
            if getattr(self, name) is not None:
                _check_size(name, getattr(self, name))
        _check(
            self.num_attention_heads % self.num_kv_heads == 0,
            f"num_key_value_heads must divide num_attention_heads, {self.num_attention_heads}, "
            f"got {self.num_kv_heads}",
        )
        _check(
            self.head_dim is not None or self.hidden_size % self.num_attention_heads == 0,
            f"num_attention_heads must divide hidden_size, {self.hidden_size}, unless head_dim is "
            f"given, got {self.num_attention_heads}",
        )
        _check(
            self.head_size % 2 == 0 and self.head_size <= MAX_HEAD_DIM,
            f"head_dim must be even and at most {MAX_HEAD_DIM}, got {self.head_size}",
        )
        _check(
            self.hidden_act in ACTIVATIONS,
            f"hidden_act must be one of {', '.join(ACTIVATIONS)}, got {self.hidden_act!r}",
        )
        _check(self.rope_theta > 0, f"rope_theta must be above 0, got {self.rope_theta}")
        for name in ("rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            _check(value >= 0, f"{name} must be at least 0, got {value}")
        self._check_options()
        for name in ("bos_token_id", "pad_token_id"):
            _check_token(name, getattr(self, name), self.vocab_size)
        for token in self.eos_token_ids:
            _check_token("eos_token_id", token, self.vocab_size)

    def _check_options(self) -> None:
        for name, (usual, types) in _OPTIONS.items():
            value = getattr(self, name)
            _check(
                self.model_type in types or value == usual,
                f"{name} must be {usual} for model_type {self.model_type!r}, got {value}",
            )
        if self.layer_types is not None:
            _check(
                len(self.layer_types) == self.num_hidden_layers,
                f"layer_types must have one for each of {self.num_hidden_layers} layers, "
                f"got {len(self.layer_types)}",
            )
            for kind in self.layer_types:
                _check(
                    kind in (FULL, SLIDING),
                    f"layer_types must be {FULL} or {SLIDING}, got {kind!r}",
                )
            _check(
                SLIDING not in self.layer_types or self.sliding_window is not None,
                f"sliding_window must be given where layer_types has {SLIDING}, got None",
            )
        if self.model_type == "gpt2":
            heads, width = self.num_attention_heads, self.hidden_size
            _check(
                self.num_kv_heads == heads,
                f"num_key_value_heads must be num_attention_heads, {heads}, for model_type 'gpt2', "
                f"got {self.num_kv_heads}",
            )
            _check(
                self.head_size * heads == width,
                f"head_dim must be {width} / {heads} for model_type 'gpt2', got {self.head_size}",
            )

    @property
    def num_kv_heads(self) -> int:
        """G, with the default filled in."""
        if self.num_key_value_heads is None:
            return self.num_attention_heads
        return self.num_key_value_heads

    @property
    def head_size(self) -> int:
        """D, with the default filled in."""
        if self.head_dim is None:
            return self.hidden_size // self.num_attention_heads
        return self.head_dim

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised."""
        return self.model_type == "qwen3"

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections to queries, keys and values have biases."""
        return self.attention_bias or self.model_type in ("qwen2", "gpt2")

    @property
    def o_bias(self) -> bool:
        """Whether the projection of attention's output has a bias."""
        return self.attention_bias or self.model_type == "gpt2"

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many of the latest keys a query sees, for each layer; None for all."""
        if self.layer_types is None:
            return (self.sliding_window,) * self.num_hidden_layers
        return tuple(self.sliding_window if kind == SLIDING else None for kind in self.layer_types)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, none, one or several."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CausalLMConfig:
        """Read the contents of a Hugging Face ``config.json``.

        Raises:
            ValueError: A size is missing, or an option asks for something that is not computed
                here; the message names it.
        """
        try:
            known = config_json.fields(values)
        except ValueError as error:
            raise ValueError(f"CausalLMConfig: {error}") from None
        names = {field.name for field in dataclasses.fields(cls)}
        known = {name: value for name, value in known.items() if name in names}
        if known.get("rope_scaling") is not None:
            known["rope_scaling"] = RopeScaling(**known["rope_scaling"])
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """The contents of a Hugging Face ``config.json``, every default spelled out."""
        return config_json.contents({
            **dataclasses.asdict(self),
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_size,
        })  # fmt: skip


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(f"CausalLMConfig: {message}")


def _check_size(name: str, value: object) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
    _check(whole, f"{name} must be a whole number above 0, got {value!r}")


def _check_above_zero(name: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    _check(number, f"{name} must be a number above 0, got {value!r}")


def _check_token(name: str, token: object, vocab_size: int) -> None:
    whole = isinstance(token, int) and not isinstance(token, bool) and 0 <= token < vocab_size
    _check(token is None or whole, f"{name} must be in [0, {vocab_size}), got {token!r}")
