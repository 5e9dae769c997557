"""What sets the types of models apart: windows, angles, positions, names of weights, defaults."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from support.models import GPT2, scramble, tiny_config, tiny_model
from support.poison import poisoned
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlm
from fastlm.model import names
from fastlm.model.blocks import Rotary
from fastlm.model.config import CausalLMConfig, RopeScaling
from fastlm.testing import assert_as_accurate

LINEAR = RopeScaling(rope_type="linear", factor=3.0)
# of Llama 3.1
LLAMA3 = RopeScaling(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)  # fmt: skip
FULL_THEN_SLIDING = ("full_attention", "sliding_attention")
TYPES = [
    {"model_type": "qwen2", "rope_scaling": LINEAR},
    {"model_type": "qwen2", "sliding_window": 5, "layer_types": FULL_THEN_SLIDING},
    {"model_type": "mistral", "sliding_window": 5},
    {**GPT2, "tie_word_embeddings": True},
]


def batch(device, rows=2, length=24):
    return torch.randint(320, (rows, length), device=device)


def scrambled(device, **changes):
    model = tiny_model(**changes).to(device)
    scramble(model)
    return model


@pytest.mark.parametrize("changes", TYPES)
@torch.inference_mode()
def test_a_cache_gives_the_logits_of_the_whole(changes, device):
    model, ids = scrambled(device, **changes), batch(device)
    with poisoned():
        cache = model.new_cache(2, 30)
    parts = [model(part, cache=cache).logits for part in ids.split((9, 1, 6, 1, 7), dim=1)]
    truth = copy.deepcopy(model).double()(ids).logits
    assert_as_accurate("logits", torch.cat(parts, 1), plain=model(ids).logits, truth=truth)


@pytest.mark.parametrize("changes", TYPES)
def test_greedy_text_is_that_of_transformers(changes, tmp_path):
    model, ids = scrambled("cpu", **changes), batch("cpu", length=3)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    want = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    assert torch.equal(model.generate(ids, 20), want)


@pytest.mark.parametrize("changes", TYPES)
def test_gradients_are_those_of_the_logits(changes, device):
    model, ids = scrambled(device, **changes), batch(device)
    parameters = list(model.parameters())
    got = torch.autograd.grad(model(ids, labels=ids).loss, parameters)
    logits = model(ids).logits[:, :-1]
    want = torch.autograd.grad(
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()), parameters
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("changes", TYPES[3:])
def test_compiles_whole(changes, device):
    model, ids = scrambled(device, **changes, num_hidden_layers=1), batch(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    parameters = list(model.parameters())
    want = torch.autograd.grad(model(ids, labels=ids).loss, parameters)
    got = torch.autograd.grad(compiled(ids, labels=ids).loss, parameters)
    torch.testing.assert_close(got, want)


# ---- windows


@pytest.mark.parametrize(("window", "reach"), [(1, 1), (5, 9), (64, 24)])
@torch.inference_mode()
def test_a_window_of_n_in_two_layers_lets_a_token_reach_2n_minus_1_back(window, reach, device):
    model = scrambled(device, model_type="mistral", sliding_window=window)
    ids = batch(device, rows=1)
    last = model(ids).logits[0, -1]
    for back in range(ids.shape[1]):
        other = ids.clone()
        other[0, -1 - back] = (other[0, -1 - back] + 1) % 320
        moved = not torch.equal(model(other).logits[0, -1], last)
        assert moved == (back < reach), back


@pytest.mark.parametrize(
    ("use", "window", "first", "layer_types", "windows"),
    [
        (None, None, None, None, [None] * 4),
        (False, 9, 0, None, [None] * 4),
        (True, None, None, None, [None] * 4),
        (True, None, 0, None, [4096] * 4),
        (True, 9, 3, None, [None, None, None, 9]),
        (True, 9, 0, FULL_THEN_SLIDING * 2, [None, 9, None, 9]),
    ],
)
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_windows_of_a_file_are_those_of_transformers(
    use, window, first, layer_types, windows, model_type
):
    options = {
        "use_sliding_window": use, "sliding_window": window, "max_window_layers": first,
        "layer_types": layer_types and list(layer_types),
    }  # fmt: skip
    # what is left out has a default
    options = {name: value for name, value in options.items() if value is not None}
    values = {**tiny_config(model_type=model_type, num_hidden_layers=4).to_dict(), **options}
    config = CausalLMConfig.from_dict(values)
    assert list(config.windows) == windows
    theirs = transformers.AutoConfig.for_model(**copy.deepcopy(values))
    kinds = {"sliding_attention": theirs.sliding_window, "full_attention": None}
    assert [kinds[kind] for kind in theirs.layer_types] == windows
    again = config.to_dict()
    assert CausalLMConfig.from_dict(again) == config
    # readers that know no layer_types take the first layers for full ones
    first = next((i for i, window in enumerate(windows) if window), len(windows))
    assert again.get("max_window_layers", 4) == first


# ---- angles

LINEAR_FILE = {"rope_type": "linear", "factor": 4.0}
LLAMA3_FILE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip


@pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3])
def test_angles_are_those_of_transformers_bit_for_bit(scaling):
    ours = Rotary(128, 500_000.0, 9000, scaling)
    config = tiny_config(
        model_type="llama", head_dim=128, rope_theta=500_000.0, rope_scaling=scaling,
        max_position_embeddings=131_072,
    )  # fmt: skip
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(
        transformers.AutoConfig.for_model(**config.to_dict())
    )
    positions = torch.arange(9000)[None]
    for got, want in zip(ours(9000), theirs(torch.empty(0), positions), strict=True):
        assert torch.equal(got, want[0, :, :64])


@pytest.mark.parametrize(
    "written",
    [
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 7e3},
        {"rope_scaling": {"rope_type": "linear", "factor": 4}, "rope_theta": 7e3},
        {"rope_parameters": {**LINEAR_FILE, "rope_theta": 7e3}, "rope_theta": 1.0},
        {"rope_scaling": LINEAR_FILE, "rope_parameters": {"rope_theta": 1.0}, "rope_theta": 7e3},
        {"rope_scaling": {"type": "default"}, "rope_theta": 7e3},
        {"rope_scaling": {}, "rope_parameters": {"rope_theta": 7e3}},
        {"rope_scaling": LLAMA3_FILE, "rope_theta": 7e3},
        {"rope_scaling": LLAMA3_FILE, "rope_theta": 7e3, "original_max_position_embeddings": 8},
        {"rope_parameters": {**LLAMA3_FILE, "original_max_position_embeddings": 8,
                             "rope_theta": 7e3}},
    ],
)  # fmt: skip
def test_angles_are_found_wherever_files_keep_them(written):
    values = tiny_config(model_type="llama").to_dict()
    del values["rope_theta"], values["rope_parameters"]
    config = CausalLMConfig.from_dict({**values, **written})
    theirs = transformers.AutoConfig.for_model(**copy.deepcopy({**values, **written}))
    # as its model does when it is made
    theirs.standardize_rope_params()
    rope = theirs.rope_parameters
    assert config.rope_theta == rope["rope_theta"] == 7e3
    if rope["rope_type"] == "default":
        assert config.rope_scaling is None
    else:
        for name in ("rope_type", "factor", "low_freq_factor", "original_max_position_embeddings"):
            assert getattr(config.rope_scaling, name) == rope.get(name)
    file = config.to_dict()
    # readers of today look at the first, those of yesterday at the others
    old, new = dict(file), dict(file)
    del old["rope_parameters"], new["rope_theta"]
    new.pop("rope_scaling", None)
    for each in (file, old, new):
        assert CausalLMConfig.from_dict(each) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_type": "yarn"}, "rope_type must be one of default, linear, llama3, got 'yarn'"),
        ({"factor": 0}, "factor of rope_scaling must be a number above 0, got 0"),
        ({"factor": "8"}, "factor of rope_scaling must be a number above 0, got '8'"),
        ({"low_freq_factor": None}, "low_freq_factor must be a number above 0, got None"),
        ({"high_freq_factor": 1.0}, "high_freq_factor must be above low_freq_factor, 1.0, got 1.0"),
        ({"original_max_position_embeddings": 8.5}, "original_max_position_embeddings must be a"),
    ],
)
def test_impossible_scalings_are_named(changes, message):
    values = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"CausalLMConfig: {message}"):
        RopeScaling(**{**values, **changes})


# ---- gpt2


def test_gpt2_knows_no_positions_beyond_its_context():
    model = tiny_model(**GPT2)
    model(torch.zeros(1, 64, dtype=torch.long))
    with pytest.raises(ValueError, match="end within the context, 64 tokens, got 65"):
        model(torch.zeros(1, 65, dtype=torch.long))


def published(folder):
    """A model as the first published files of gpt2 are: no prefix, no head, masks, dropout."""
    config = transformers.GPT2Config(
        vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=64,
        bos_token_id=5, eos_token_id=5,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).eval()
    scramble(theirs)
    theirs.save_pretrained(folder)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    assert values["attn_pdrop"] == 0.1 and values["n_inner"] is None
    path.write_text(json.dumps({**values, "n_ctx": 64}))
    weights = load_file(folder / "model.safetensors")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    for layer in range(2):
        weights[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        weights[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return theirs


def test_the_first_files_of_gpt2_are_read(tmp_path):
    theirs, ids = published(tmp_path), batch("cpu")
    model = fastlm.CausalLM.from_pretrained(tmp_path)
    with torch.inference_mode():
        truth = copy.deepcopy(model).double()(ids).logits
        ours, usual = model(ids).logits, theirs(ids).logits
    assert_as_accurate("logits", ours, plain=usual, truth=truth)
    assert_as_accurate("logits of transformers", usual, plain=ours, truth=truth)
    assert model.config.tie_word_embeddings and model.config.intermediate_size == 128
    assert model.config.eos_token_ids == (5,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("h.1.attn.c_attn.bias"), "are missing: transformer.h.1.attn.c_attn.bias"),
        (lambda w: w.update({"h.2.ln_1.bias": torch.ones(32)}), "place for: transformer.h.2.ln_1"),
        (
            lambda w: w.update({"h.0.mlp.c_fc.weight": torch.ones(128, 32)}),
            r"transformer.h.0.mlp.c_fc.weight has \(128, 32\), must have \(32, 128\)",
        ),
        (
            lambda w: w.update({"lm_head.weight": torch.ones(320, 32)}),
            "lm_head.weight must equal transformer.wte.weight",
        ),
    ],
)
def test_damaged_files_of_gpt2_are_told_by_their_own_names(change, message, tmp_path):
    published(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(fastlm.ModelFileError, match=message):
        fastlm.CausalLM.from_pretrained(tmp_path)


def test_masks_are_no_weights_of_other_types(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.attn.bias"] = torch.ones(3)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(fastlm.ModelFileError, match=r"no place for: model\.attn\.bias"):
        fastlm.CausalLM.from_pretrained(tmp_path)


def test_loaded_weights_share_no_memory(tmp_path):
    tiny_model(**GPT2).save_pretrained(tmp_path)
    model = fastlm.CausalLM.from_pretrained(tmp_path)
    places = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(places)) == len(places)
    assert all(p.is_contiguous() for p in model.parameters())


# ---- defaults and options


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "gpt2"])
@pytest.mark.parametrize("vocab_size", [2, 60_000])
def test_what_a_file_leaves_out_is_what_transformers_takes(model_type, vocab_size):
    sizes = {"vocab_size": vocab_size, "hidden_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 32}  # fmt: skip
    if model_type != "gpt2":
        sizes["intermediate_size"] = 256
    ours = CausalLMConfig.from_dict({"model_type": model_type, **sizes})
    theirs = transformers.AutoConfig.for_model(model_type, **sizes)
    alike = ["max_position_embeddings", "initializer_range", "tie_word_embeddings", "pad_token_id"]
    pairs = [(getattr(ours, name), getattr(theirs, name)) for name in alike]
    if model_type == "gpt2":
        pairs += [(ours.hidden_act, theirs.activation_function), (ours.intermediate_size, 256)]
        pairs += [(ours.rms_norm_eps, theirs.layer_norm_epsilon)]
    else:
        pairs += [(ours.num_kv_heads, theirs.num_key_value_heads)]
        pairs += [(ours.hidden_act, theirs.hidden_act), (ours.rms_norm_eps, theirs.rms_norm_eps)]
        pairs += [(ours.rope_theta, theirs.rope_parameters["rope_theta"])]
        pairs += [(ours.head_size, getattr(theirs, "head_dim", 2))]
    if model_type == "mistral":
        pairs += [(ours.sliding_window, theirs.sliding_window)]
    for name in ("bos_token_id", "eos_token_id"):
        want = getattr(theirs, name)
        # a vocabulary without the token never generates it
        pairs += [(getattr(ours, name), want if want is None or want < vocab_size else None)]
    for got, want in pairs:
        assert got == want


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama", "sliding_window": 8}, "sliding_window must be None for model_t"),
        ({"sliding_window": 0}, "sliding_window must be a whole number above 0, got 0"),
        (
            {"layer_types": ("sliding_attention",) * 2},
            "sliding_window must be given where layer_types has sliding_attention, got None",
        ),
        ({**GPT2, "rope_scaling": LINEAR}, "rope_scaling must be None for model_type 'gpt2'"),
        ({**GPT2, "num_key_value_heads": 2}, "num_key_value_heads must be num_attention_heads, 4"),
        ({**GPT2, "head_dim": 16}, "head_dim must be 32 / 4 for model_type 'gpt2', got 16"),
        ({**GPT2, "mlp_bias": True}, "mlp_bias must be False for model_type 'gpt2', got True"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias must be False for"),
    ],
)
def test_impossible_configs_are_named(changes, message):
    with pytest.raises(ValueError, match=f"CausalLMConfig: {message}"):
        tiny_config(**changes)


# ---- models that people have

GPT2_SMALL = {
    "model_type": "gpt2", "vocab_size": 50_257, "n_ctx": 1024, "n_embd": 768, "n_head": 12,
    "n_layer": 12, "n_positions": 1024, "activation_function": "gelu_new", "attn_pdrop": 0.1,
    "embd_pdrop": 0.1, "resid_pdrop": 0.1, "layer_norm_epsilon": 1e-5, "bos_token_id": 50_256,
    "eos_token_id": 50_256, "initializer_range": 0.02, "summary_type": "cls_index",
}  # fmt: skip
LLAMA_3_2_1B = {
    "model_type": "llama", "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "hidden_act": "silu", "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0, "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "tie_word_embeddings": True, "bos_token_id": 128_000, "eos_token_id": [128_001, 128_009],
    "pretraining_tp": 1, "use_cache": True,
}  # fmt: skip
QWEN2_5_HALF_B = {
    "model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    "hidden_act": "silu", "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0, "attention_dropout": 0.0, "tie_word_embeddings": True,
    "sliding_window": 32_768, "use_sliding_window": False, "max_window_layers": 21,
    "bos_token_id": 151_643, "eos_token_id": 151_645,
}  # fmt: skip
QWEN3_0_6B = {
    **QWEN2_5_HALF_B, "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 40_960, "attention_bias": False, "rope_scaling": None,
    "sliding_window": None, "max_window_layers": 28,
}  # fmt: skip
MISTRAL_7B = {
    "model_type": "mistral", "vocab_size": 32_000, "hidden_size": 4096,
    "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "hidden_act": "silu", "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "sliding_window": 4096,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "parameters"),
    [
        (GPT2_SMALL, 124_439_808),
        (LLAMA_3_2_1B, 1_235_814_400),
        (QWEN2_5_HALF_B, 494_032_768),
        (QWEN3_0_6B, 596_049_920),
        (MISTRAL_7B, 7_241_732_096),
    ],
    ids=["gpt2", "llama", "qwen2", "qwen3", "mistral"],
)
def test_well_known_models_have_the_parameters_they_are_known_for(values, parameters):
    config = CausalLMConfig.from_dict(values)
    # shapes without memory; the meta device does not know of the poisoned torch.empty of all tests
    with FakeTensorMode():
        model = fastlm.CausalLM(config)
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**copy.deepcopy(values))
        )
        ours = names.to_file(config.model_type, model.state_dict())
    assert {name: t.shape for name, t in ours.items()} == {
        name: t.shape for name, t in theirs.state_dict().items()
    }
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert set(config.windows) == {4096 if config.model_type == "mistral" else None}
