"""Names and shapes of weights in Hugging Face's files, where they are not those of our modules."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
# gpt2, ours -> theirs
_GPT2 = {
    "model.embed_tokens": "transformer.wte",
    "model.embed_positions": "transformer.wpe",
    "model.norm": "transformer.ln_f",
    "lm_head": "lm_head",
}
_GPT2_LAYER = {
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
# these three are one in the file, in this order
_GPT2_FUSED, _GPT2_PARTS = "attn.c_attn", ("q_proj", "k_proj", "v_proj")
# its linear layers keep their weights transposed, (in, out)
_GPT2_TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
# buffers of early versions of transformers, computed from the config everywhere
_COMPUTED = (".rotary_emb.inv_freq",)
_GPT2_COMPUTED = (".attn.bias", ".attn.masked_bias")


def embedding_name(model_type: str) -> str:
    """The token embedding in a file; a tied head has its values."""
    return _renamed(_EMBEDDING) if model_type == "gpt2" else _EMBEDDING


def to_file(model_type: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights as they are in a file."""
    if model_type != "gpt2":
        return dict(state)
    file: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer, _, part = name.rpartition(".self_attn.")
        projection, _, kind = part.partition(".")
        if projection not in _GPT2_PARTS:
            file[_renamed(name)] = tensor
        elif projection == _GPT2_PARTS[0]:
            parts = [state[f"{layer}.self_attn.{each}.{kind}"] for each in _GPT2_PARTS]
            file[f"{_layer(layer)}.{_GPT2_FUSED}.{kind}"] = torch.cat(parts)
    return {n: t.t() if _GPT2_TRANSPOSED.search(n) else t for n, t in file.items()}


def from_file(model_type: str, file: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a file as ours; the inverse of :func:`to_file`."""
    if model_type != "gpt2":
        return dict(file)
    ours = {theirs: name for name, theirs in _GPT2.items()}
    ours_in_layer = {theirs: name for name, theirs in _GPT2_LAYER.items()}
    state: dict[str, Tensor] = {}
    for name, tensor in file.items():
        weight = tensor.t() if _GPT2_TRANSPOSED.search(name) else tensor
        module, _, kind = name.rpartition(".")
        if module in ours:
            state[f"{ours[module]}.{kind}"] = weight
            continue
        _, _, number, part = module.split(".", 3)
        layer = f"model.layers.{number}"
        if part != _GPT2_FUSED:
            state[f"{layer}.{ours_in_layer[part]}.{kind}"] = weight
            continue
        for each, piece in zip(_GPT2_PARTS, weight.chunk(3), strict=True):
            state[f"{layer}.self_attn.{each}.{kind}"] = piece.clone()
    return {name: tensor.contiguous() for name, tensor in state.items()}


def standard(model_type: str, file: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a file by the names that today's transformers gives them.

    Files of gpt2 from before the head was part of them leave out the first word of every name.
    """
    if model_type != "gpt2":
        return {name: tensor for name, tensor in file.items() if not name.endswith(_COMPUTED)}
    whole = ("transformer.", "lm_head.")
    return {
        name if name.startswith(whole) else f"transformer.{name}": tensor
        for name, tensor in file.items()
        if not name.endswith(_GPT2_COMPUTED)
    }


def _renamed(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in _GPT2:
        return f"{_GPT2[module]}.{kind}"
    _, _, number, part = module.split(".", 3)
    return f"transformer.h.{number}.{_GPT2_LAYER[part]}.{kind}"


def _layer(name: str) -> str:
    return f"transformer.h.{name.rpartition('.')[2]}"
