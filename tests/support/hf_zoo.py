"""Every causal language model that the installed transformers can build small."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 131
LENGTH = 12
TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# Attribute of a config -> a small value, where the config has such an attribute.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32,
    "embed_dim": 32, "embedding_size": 32, "word_embed_proj_dim": 32, "emb_dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "d_ff": 48, "n_inner": 48, "ffn_hidden_size": 48,
    "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "dim_ff": 48, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "d_inner": 48, "expert_ffn_hidden_size": 16,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2,
    "encoder_layers": 1, "num_decoder_layers": 2, "num_encoder_layers": 1, "num_blocks": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64,
    "max_target_positions": 64, "max_source_positions": 64, "context_length": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "moe_num_experts": 4, "moe_topk": 2,
    "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "qk_head_dim": 16, "sliding_window": 7,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "type_vocab_size": 2,
}  # fmt: skip

# What a type needs beside that.
ALSO: dict[str, dict[str, Any]] = {}

# Types that no small config builds, or whose models take more than token ids: with the reason.
NOT_BUILT: dict[str, str] = {}


def small_config(model_type: str) -> Any:
    """A config of the type with few and narrow layers.

    Raises:
        Exception: What the config's class raises where it cannot be so small.
    """
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    changes = {name: value for name, value in SMALL.items() if hasattr(default, name)}
    also = ALSO.get(model_type, {})
    changes.update(also)
    return config_class(**{k: v for k, v in changes.items() if v is not ...})


def build(model_type: str) -> nn.Module:
    """The model with numbers large enough that nothing hides, in evaluation mode."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = small_config(model_type)
        model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.is_floating_point():
                parameter.mul_(3.0)
    return model.eval()


def batch() -> dict[str, Tensor]:
    """Two rows, the second padded at its end."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)
    seen = torch.ones_like(ids)
    seen[1, -3:] = 0
    return {"input_ids": ids, "attention_mask": seen, "labels": ids.masked_fill(seen == 0, -100)}


def loss_and_gradients(model: nn.Module, **inputs: Any) -> dict[str, Tensor]:
    """By name; of parameters that the loss does not depend on there is none."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.detach().clone()
    model.zero_grad(set_to_none=True)
    return found


def in_double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()
