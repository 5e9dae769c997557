"""Sizes and options of a causal language model, under Hugging Face's names.  Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MODEL_TYPES = ("qwen3", "llama")
# Hugging Face's name of an activation -> the name fastlm.glu knows it by
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "sigmoid": "sigmoid",
}
MAX_HEAD_DIM = 512
_ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}

# Options of a Hugging Face config that change what a model computes and that we do not compute,
# with the only values under which they change nothing.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
    "rope_scaling": (None,),
    "use_sliding_window": (False, None),
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


@dataclass(frozen=True, kw_only=True)
class CausalLMConfig:
    """What a :class:`fastlm.CausalLM` is made of.

    Attributes:
        vocab_size: V, number of token ids.
        hidden_size: C, width of the model.
        intermediate_size: Width of the gated feed-forward layer.
        num_hidden_layers: Number of blocks.
        num_attention_heads: H, query heads.
        num_key_value_heads: G, key and value heads; divides H; None for H.
        head_dim: D, even and at most 512; None for C / H.
        model_type: ``"qwen3"`` normalises queries and keys per head, ``"llama"`` does not.
        hidden_act: Activation of the gate: silu, gelu, gelu_pytorch_tanh, relu, relu2 or sigmoid.
        max_position_embeddings: Longest sequence, prompt and continuation together.
        rope_theta: Base of the rotary angles.
        rms_norm_eps: Added to mean squares.
        tie_word_embeddings: The head shares the weight of the token embedding.
        attention_bias: The four projections of attention have biases.
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
        for name in ("num_key_value_heads", "head_dim"):
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
        _check(
            not (self.mlp_bias and self.model_type == "qwen3"),
            "mlp_bias must be False for model_type 'qwen3', got True",
        )
        for name in ("bos_token_id", "pad_token_id"):
            _check_token(name, getattr(self, name), self.vocab_size)
        for token in self.eos_token_ids:
            _check_token("eos_token_id", token, self.vocab_size)

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
        _check(
            values.get("model_type") in MODEL_TYPES,
            f"model_type must be one of {', '.join(MODEL_TYPES)}, got {values.get('model_type')!r}",
        )
        missing = [name for name in _SIZES if name not in values]
        _check(not missing, f"needs {', '.join(missing)}, which the file does not give")
        _check_without_effect(values)
        fields = {field.name for field in dataclasses.fields(cls)}
        known = {name: value for name, value in values.items() if name in fields}
        if isinstance(known.get("eos_token_id"), list):
            known["eos_token_id"] = tuple(known["eos_token_id"])
        theta = _rope_parameters(values).get("rope_theta")
        if theta is not None:
            known["rope_theta"] = theta
        if values["model_type"] == "qwen3":
            # Hugging Face's defaults for a key that the file leaves out
            known = {"head_dim": 128, "max_position_embeddings": 32_768, **known}
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """The contents of a Hugging Face ``config.json``, every default spelled out."""
        values = dataclasses.asdict(self)
        values["num_key_value_heads"] = self.num_kv_heads
        values["head_dim"] = self.head_size
        if isinstance(self.eos_token_id, tuple):
            values["eos_token_id"] = list(self.eos_token_id)
        if self.model_type == "qwen3":
            del values["mlp_bias"]
        # rope_theta is where transformers 4 and other engines look, rope_parameters where 5 does
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": self.rope_theta}
        return {"architectures": [_ARCHITECTURES[self.model_type]], **values}


def _rope_parameters(values: Mapping[str, Any]) -> Mapping[str, Any]:
    return values.get("rope_parameters") or {}


def _check_without_effect(values: Mapping[str, Any]) -> None:
    for name, allowed in _WITHOUT_EFFECT.items():
        value = values.get(name)
        _check(value in allowed, f"{name} is not supported, got {value!r}")
    layers = {str(layer) for layer in values.get("layer_types") or ()}
    _check(
        layers <= {"full_attention"}, f"layer_types must be full_attention, got {sorted(layers)}"
    )
    rope = _rope_parameters(values)
    kind = rope.get("rope_type", "default")
    _check(kind == "default", f"rope_parameters must have rope_type 'default', got {kind!r}")
    factor = rope.get("partial_rotary_factor", 1)
    _check(factor == 1, f"partial_rotary_factor is not supported, got {factor!r}")


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(f"CausalLMConfig: {message}")


def _check_size(name: str, value: object) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
    _check(whole, f"{name} must be a whole number above 0, got {value!r}")


def _check_token(name: str, token: object, vocab_size: int) -> None:
    whole = isinstance(token, int) and not isinstance(token, bool) and 0 <= token < vocab_size
    _check(token is None or whole, f"{name} must be in [0, {vocab_size}), got {token!r}")
