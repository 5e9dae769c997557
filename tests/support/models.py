"""Tiny models and a tokenizer, quick to make."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import fastlm

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-5,
}
# it has as many key heads as query heads, and they share its width
GPT2 = {"model_type": "gpt2", "num_key_value_heads": None, "head_dim": None}


def tiny_config(**changes: Any) -> fastlm.CausalLMConfig:
    return fastlm.CausalLMConfig(**{**SIZES, **changes})


def tiny_model(**changes: Any) -> fastlm.CausalLM:
    """Weights wide enough that its distributions are far from uniform."""
    return fastlm.CausalLM(tiny_config(initializer_range=0.3, **changes))


def scramble(model: torch.nn.Module) -> None:
    """Change every parameter, also those that begin as zeros or ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE: every byte is a token, so characters are split over tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the cat sat on the mat, then the cat sat again. " * 40], trainer
    )
    return tokenizer
