"""A config's fields from Hugging Face's ``config.json``, and back.  Imports no torch.

Each type of model has its own names, defaults and options there; what such a file asks for and we
do not compute is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODEL_TYPES = ("qwen3", "llama", "qwen2", "mistral", "gpt2")
FULL, SLIDING = "full_attention", "sliding_attention"
_ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "mistral": "MistralForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
# What a key that the file leaves out means to transformers, where it is not our own default.
_QWEN = {"max_position_embeddings": 32_768, "num_key_value_heads": 32}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3": {**_QWEN, "head_dim": 128},
    "llama": {"bos_token_id": 1, "eos_token_id": 2},
    "qwen2": _QWEN,
    "mistral": {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "gpt2": {
        "bos_token_id": 50_256,
        "eos_token_id": 50_256,
        "hidden_act": "gelu_new",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
}
# gpt2's name -> ours
_GPT2_NAMES = {
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "activation_function": "hidden_act",
    "layer_norm_epsilon": "rms_norm_eps",
}
# gpt2's files usually ask for dropout, which is of training alone; ours has none
_GPT2_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
# Fields that a type's file does not have, because they can have one value only.
_ABSENT = {
    "qwen3": ("mlp_bias",),
    "llama": (),
    "qwen2": ("attention_bias", "mlp_bias"),
    "mistral": ("attention_bias", "mlp_bias"),
    "gpt2": ("attention_bias", "mlp_bias", "num_key_value_heads", "head_dim", "rope_theta"),
}

# Options that change what a model computes and that we do not compute, with the only values under
# which they change nothing.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
    "reorder_and_upcast_attn": (False, None),
    "scale_attn_by_inverse_layer_idx": (False, None),
    "scale_attn_weights": (True, None),
}


def fields(file: Mapping[str, Any]) -> dict[str, Any]:
    """What a ``config.json`` says, by the names of a config's fields; others may be among them.

    Raises:
        ValueError: A size is missing, or an option asks for something that is not computed here;
            the message names it.
    """
    kind = file.get("model_type")
    _check(
        kind in MODEL_TYPES,
        f"model_type must be one of {', '.join(MODEL_TYPES)}, got {kind!r}",
    )
    assert isinstance(kind, str)
    for name, allowed in _WITHOUT_EFFECT.items():
        _check(file.get(name) in allowed, f"{name} is not supported, got {file.get(name)!r}")
    names = _GPT2_NAMES if kind == "gpt2" else {}
    values = {names.get(name, name): value for name, value in file.items()}
    _check_sizes(kind, values)
    values = {**_known(_DEFAULTS[kind], values["vocab_size"]), **values}
    if kind == "gpt2" and values.get("intermediate_size") is None:
        values["intermediate_size"] = 4 * values["hidden_size"]
    if isinstance(values.get("eos_token_id"), list):
        values["eos_token_id"] = tuple(values["eos_token_id"])
    window, layers = _window(kind, values)
    theta, scaling = (None, None) if kind == "gpt2" else _rope(values)
    values |= {"sliding_window": window, "layer_types": layers, "rope_scaling": scaling}
    if theta is not None:
        values["rope_theta"] = theta
    return values


def contents(values: Mapping[str, Any]) -> dict[str, Any]:
    """The ``config.json`` for all fields of a config."""
    file = dict(values)
    kind = file["model_type"]
    window, layers = file.pop("sliding_window"), file.pop("layer_types")
    scaling = file.pop("rope_scaling")
    if isinstance(file["eos_token_id"], tuple):
        file["eos_token_id"] = list(file["eos_token_id"])
    theta = file["rope_theta"]
    for name in _ABSENT[kind]:
        del file[name]
    if kind == "gpt2":
        theirs = {ours: name for name, ours in _GPT2_NAMES.items()}
        file = {theirs.get(name, name): value for name, value in file.items()}
        file |= dict.fromkeys(_GPT2_DROPOUTS, 0.0)
        return {"architectures": [_ARCHITECTURES[kind]], **file}
    if kind == "mistral":
        file["sliding_window"] = window
    elif window is not None:
        layers = list(layers or (SLIDING,) * file["num_hidden_layers"])
        # the last two say the same; the last is for readers that know no other pattern
        file |= {"use_sliding_window": True, "sliding_window": window, "layer_types": layers}
        file["max_window_layers"] = layers.index(SLIDING) if SLIDING in layers else len(layers)
    # rope_theta and rope_scaling are where transformers 4 and other engines look, rope_parameters
    # where 5 does
    rope = {"rope_type": "default"}
    if scaling is not None:
        rope = {name: value for name, value in scaling.items() if value is not None}
        file["rope_scaling"] = rope
    file["rope_parameters"] = {**rope, "rope_theta": theta}
    return {"architectures": [_ARCHITECTURES[kind]], **file}


def _check_sizes(kind: str, values: Mapping[str, Any]) -> None:
    sizes = _SIZES if kind == "gpt2" else (*_SIZES, "intermediate_size")
    theirs = {ours: name for name, ours in _GPT2_NAMES.items()} if kind == "gpt2" else {}
    missing = [theirs.get(name, name) for name in sizes if name not in values]
    _check(not missing, f"needs {', '.join(missing)}, which the file does not give")
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        shown, value = theirs.get(name, name), values[name]
        whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
        _check(whole, f"{shown} must be a whole number above 0, got {value!r}")


def _known(defaults: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Without the tokens that a smaller vocabulary does not have: they are never generated."""
    return {
        name: value
        for name, value in defaults.items()
        if not name.endswith("_token_id") or value < vocab_size
    }


def _window(kind: str, values: Mapping[str, Any]) -> tuple[int | None, tuple[str, ...] | None]:
    """Fields ``sliding_window`` and ``layer_types``."""
    used, layers = values.get("use_sliding_window"), values.get("layer_types")
    num_layers = values["num_hidden_layers"]
    if kind in ("qwen2", "qwen3"):
        window = values.get("sliding_window", 4096) if used else None
        if layers is None and window is not None:
            first = values.get("max_window_layers", 28)
            layers = [SLIDING if layer >= first else FULL for layer in range(num_layers)]
        return window, layers and tuple(layers)
    window = values["sliding_window"] if kind == "mistral" else None
    # options of other types, which transformers does not look at
    slides = window is not None
    _check(
        used is None or used == slides,
        f"use_sliding_window must be {slides} for model_type {kind!r}, got {used!r}",
    )
    usual = SLIDING if slides else FULL
    _check(
        layers is None or set(layers) <= {usual},
        f"layer_types must be {usual} for model_type {kind!r}, got {layers!r}",
    )
    return window, None


def _rope(values: Mapping[str, Any]) -> tuple[float | None, dict[str, Any] | None]:
    """Fields ``rope_theta`` and ``rope_scaling``."""
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope = values.get(name) or {}
    _check(isinstance(rope, Mapping), f"{name} must be an object, got {rope!r}")
    nested = [key for key, value in rope.items() if isinstance(value, Mapping)]
    _check(not nested, f"{name} must be the same for all layers, got {', '.join(nested)}")
    factor = rope.get("partial_rotary_factor", 1)
    _check(factor == 1, f"partial_rotary_factor is not supported, got {factor!r}")
    theta = rope.get("rope_theta", values.get("rope_theta"))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return theta, None
    scaling = {"rope_type": rope_type, "factor": rope.get("factor")}
    if rope_type == "llama3":
        scaling |= {key: rope.get(key) for key in ("low_freq_factor", "high_freq_factor")}
        original = rope.get("original_max_position_embeddings")
        outer = values.get("original_max_position_embeddings")
        context = values.get("max_position_embeddings")
        scaling["original_max_position_embeddings"] = outer or original or context
    return theta, scaling


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
