"""The layers of a transformer: token ids to hidden states."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.model.config import ACTIVATIONS, CausalLMConfig, RopeScaling
from fastlm.model.kv_cache import Context
from fastlm.nn import CausalSelfAttention, RMSNorm
from fastlm.ops.glu import glu


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


# those that fastlm.glu knows by these names, alone
ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": _relu2,
    "sigmoid": torch.sigmoid,
}


class Decoder(nn.Module):
    """Token embedding, blocks and the final norm: token ids to hidden states ``(B, T, C)``."""

    def __init__(self, config: CausalLMConfig) -> None:
        super().__init__()
        width, context = config.hidden_size, config.max_position_embeddings
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList(Block(config, window) for window in config.windows)
        self.norm = _norm(config)
        # positions are either learned and added to the tokens, or turn queries and keys
        learned = config.model_type == "gpt2"
        self.embed_positions = LearnedPositions(context, width) if learned else None
        self.rotary = (
            None
            if learned
            else Rotary(config.head_size, config.rope_theta, context, config.rope_scaling)
        )

    def forward(self, input_ids: Tensor, cache: Context | None = None) -> Tensor:
        length = input_ids.shape[1]
        hidden, stream = self.embed_tokens(input_ids), None
        if self.embed_positions is not None:
            positions = None if cache is None else cache.positions(length)
            hidden = hidden + self.embed_positions(length, positions)
        tables = None if self.rotary is None else self.rotary.tables
        rotary = None if self.rotary is None or cache is not None else self.rotary(length)
        for index, layer in enumerate(self.layers):
            attend = None
            if cache is not None:
                attend = functools.partial(cache.attend, index, rotary=tables)
            hidden, stream = layer(hidden, stream, rotary, attend)
        if cache is not None:
            cache.advance(length)
        return self.norm(hidden, residual=stream)[0]


class Block(nn.Module):
    """Attention, then feed-forward, each behind a norm and beside the residual stream.

    Each branch is added to the stream by the norm after it, which reads and writes both anyway.

    Args:
        config: Sizes and options.
        window_size: How many of the latest keys each query sees; None for all.
    """

    def __init__(self, config: CausalLMConfig, window_size: int | None = None) -> None:
        super().__init__()
        self.self_attn = CausalSelfAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_kv_heads,
            config.head_size,
            qk_norm=config.qk_norm,
            bias=config.qkv_bias,
            out_bias=config.o_bias,
            window_size=window_size,
            eps=config.rms_norm_eps,
        )
        self.mlp = (
            UngatedFeedForward(config) if config.model_type == "gpt2" else FeedForward(config)
        )
        self.input_layernorm = _norm(config)
        self.post_attention_layernorm = _norm(config)

    def forward(
        self,
        branch: Tensor,
        stream: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
        attend: Callable[[Tensor, Tensor, Tensor, int | None], Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Take and return what the branch before computed, and the stream it is to be added to."""
        if stream is None:
            hidden, stream = self.input_layernorm(branch), branch
        else:
            hidden, stream = self.input_layernorm(branch, residual=stream)
        branch = self.self_attn(hidden, rotary, attend)
        hidden, stream = self.post_attention_layernorm(branch, residual=stream)
        return self.mlp(hidden), stream


class FeedForward(nn.Module):
    """Gated feed-forward layer."""

    def __init__(self, config: CausalLMConfig) -> None:
        super().__init__()
        outer, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(outer, inner, bias=bias)
        self.up_proj = nn.Linear(outer, inner, bias=bias)
        self.down_proj = nn.Linear(inner, outer, bias=bias)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(glu(self.gate_proj(hidden), self.up_proj(hidden), self.activation))


class UngatedFeedForward(nn.Module):
    """Feed-forward layer of GPT-2, with biases."""

    def __init__(self, config: CausalLMConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATION_FUNCTIONS[ACTIVATIONS[config.hidden_act]]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(hidden)))


class LayerNorm(nn.Module):
    """torch's, with weight and bias, called like :class:`fastlm.nn.RMSNorm`."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        self.eps = eps

    def forward(
        self, input: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        total = input if residual is None else input + residual
        out = F.layer_norm(total, self.weight.shape, self.weight, self.bias, self.eps)
        return out if residual is None else (out, total)


def _norm(config: CausalLMConfig) -> RMSNorm | LayerNorm:
    norm = LayerNorm if config.model_type == "gpt2" else RMSNorm
    return norm(config.hidden_size, config.rms_norm_eps)


class LearnedPositions(nn.Module):
    """A vector for each position, ``weight`` ``(max_length, C)``."""

    def __init__(self, max_length: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(max_length, hidden_size))

    def forward(self, length: int, positions: Tensor | None = None) -> Tensor:
        """``(length, C)`` of the first positions, or ``(..., C)`` of ``positions``, int64.

        Raises:
            ValueError: The first positions go beyond the last.
        """
        if positions is not None:
            # of a cache, which has checked them
            return self.weight[positions]
        _check_length(length, len(self.weight))
        return self.weight[:length]


class Rotary(nn.Module):
    """Cosines and sines of all positions, float32 whatever the dtype of the model.

    Args:
        head_dim: D.
        theta: Base of the angles: pair i turns by position * theta^(-2i/D).
        max_length: Number of positions.
        scaling: How these angles are slowed down, or None.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, head_dim: int, theta: float, max_length: int, scaling: RopeScaling | None = None
    ) -> None:
        super().__init__()
        self.head_dim, self.theta, self.max_length = head_dim, theta, max_length
        self.scaling = scaling
        self._fill(None)

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines, ``(max_length, D/2)``."""
        return self.cos, self.sin

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        """Tables ``(length, D/2)`` of the first positions.

        Raises:
            ValueError: The positions go beyond ``max_length``.
        """
        _check_length(length, self.max_length)
        return self.cos[:length], self.sin[:length]

    def _fill(self, device: torch.device | None) -> None:
        # float32 throughout, as Hugging Face does: exact angles would be other angles
        exponents = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32)
        frequencies = 1.0 / self.theta ** (exponents / self.head_dim)
        if self.scaling is not None:
            frequencies = _slowed(frequencies, self.scaling)
        positions = torch.arange(self.max_length, device=device, dtype=torch.float32)
        angles = torch.outer(positions, frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        # model.to(bfloat16) must not round the angles, and to_empty() leaves them without values
        device = fn(self.cos).device
        self._fill(device)
        return self


def _slowed(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Frequencies under ``scaling``, in the order of operations of Hugging Face: the same bits."""
    factor = scaling.factor
    if scaling.rope_type == "linear":
        return frequencies / factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    context = scaling.original_max_position_embeddings
    assert low is not None and high is not None and context is not None, "llama3 has them"
    wavelengths = 2 * math.pi / frequencies
    is_slow, is_fast = wavelengths > context / low, wavelengths < context / high
    slow = torch.where(is_slow, frequencies / factor, frequencies)
    kept = (context / wavelengths - low) / (high - low)
    between = (1 - kept) * slow / factor + kept * slow
    return torch.where(is_slow | is_fast, slow, between)


def _check_length(length: int, context: int) -> None:
    if length > context:
        raise ValueError(
            f"CausalLM: input must end within the context, {context} tokens, got {length}"
        )
