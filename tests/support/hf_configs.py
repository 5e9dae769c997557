"""Small configs of the types of causal language models that transformers knows."""

from __future__ import annotations

from typing import Any

VOCABULARY = 131

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
    "logits_scaling": 4.0, "lm_head_multiplier": 0.5, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "type_vocab_size": 2,
}  # fmt: skip

# What a type needs beside that.
_MLA = {"num_key_value_heads": 4}
_DECODER = {"is_decoder": True}
_LINEAR_HEADS = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_LINEAR_MLA = {
    **_MLA, "linear_head_dim": 8, "linear_num_heads": 4, "num_expert_group": 1, "topk_group": 1,
    "num_experts_per_token": 2, "layer_types": ["linear_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
ALSO: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite",
         "glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"), _MLA,
    ),
    **dict.fromkeys(
        ("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie",
         "megatron-bert", "rembert", "reformer", "roberta", "roberta-prelayernorm", "roformer",
         "xlm-roberta", "xlm-roberta-xl"), _DECODER,
    ),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text"),
                    _LINEAR_HEADS),
    **dict.fromkeys(("bailing_hybrid", "kimi_linear"), _LINEAR_MLA),
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "ctrl": {"dff": 48},
    "dots3_note_text": _MLA,
    "gemma4_text": {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
    "falcon_h1": {
        "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
        "mamba_chunk_size": 8, "mamba_n_groups": 1,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "inkling_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
        "sliding_window_size": 7, "d_rel": 4, "rel_extent": 16,
        "mlp_layer_types": ["dense", "sparse"], "layer_types": ["hybrid_sliding", "hybrid"],
    },
    "inkling2_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
        "sliding_window_size": 7, "d_rel": 4, "rel_extent": 16,
        "mlp_layer_types": ["dense", "sparse"], "layer_types": ["hybrid_sliding", "hybrid"],
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8},
    "nemotron_h": {
        "num_hidden_layers": ..., "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2,
        "moe_shared_expert_intermediate_size": 16, "ssm_state_size": 8, "chunk_size": 8,
    },
    "prophetnet": {"num_hidden_layers": ...},
    "recurrent_gemma": {
        "block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 7,
    },
    "roc_bert": {
        **_DECODER, "shape_vocab_size": 16, "pronunciation_vocab_size": 16, "shape_embed_dim": 8,
        "pronunciation_embed_dim": 8,
    },
    "xlnet": {"max_position_embeddings": ...},
    "xmod": {**_DECODER, "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {
        "num_hidden_layers": 3, "attention_hidden_size": 64, "attention_head_dim": 16,
        "n_mamba_heads": 2, "mamba_dt_rank": 4, "num_key_value_heads": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
    },
    "zamba2": {
        "num_hidden_layers": 3, "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_d_state": 8,
        "chunk_size": 8, "num_key_value_heads": 4, "hybrid_layer_ids": [1],
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
        "attention_hidden_size": 64, "attention_head_dim": 16, "kv_channels": 8,
    },
}  # fmt: skip

# Types left out, with the reason: no small config builds them, or what it builds cannot be judged.
_PARTS = "its config holds those of several models, which the sizes above do not reach"
NOT_BUILT: dict[str, str] = {
    **dict.fromkeys(
        ("blt", "dots3_note", "emu3", "fuyu", "gemma3", "gemma4", "gemma4_unified", "git",
         "got_ocr2", "llama4", "mllama", "moss_transcribe_diarize", "musicgen", "musicgen_melody",
         "phi4_multimodal", "qwen3_5", "qwen3_5_moe", "qwen4_exp"), _PARTS,
    ),
    "cohere_compass_text": "angles for a type of layer that its config does not name",
    "dbrx": "its config asks its parts for fields that they do not have",
    "gemma3n": "needs timm",
    "gemma3n_text": "layers that share caches need more layers",
    "gemma4_assistant": "runs on the caches of another model",
    "gemma4_unified_assistant": "runs on the caches of another model",
    "gemma4_unified_text": "sizes that differ by layer, which the sizes above do not reach",
    "inkling2_text": "mixes float32 into float64, so that there is no truth to compare with",
    "prophetnet": "its cache has no layers without num_hidden_layers, which it refuses",
    "qwen4_exp_text": "its experts need sizes that its default config does not have",
    "reformer": "its axial positions fix its width",
    "xglm": "its mask overflows in float64, so that there is no truth to compare with",
    "xlstm": "its states do not fit its heads when small",
    "zamba": "its tied weights need as many layers as it is published with",
}  # fmt: skip

# Types of which neither attention nor loss is replaced, with the reason.
_OWN = "attention is written into its layers, and its loss takes the logits themselves"
REFUSED: dict[str, str] = {
    **dict.fromkeys(("cpmant", "mvp", "trocr", "xlm", "xlnet"), _OWN),
    "inkling_text": "a bias of positions in attention, and logits that are cut to the vocabulary",
    "bigbird_pegasus": "block-sparse attention of its own, and a loss that takes the logits",
}
