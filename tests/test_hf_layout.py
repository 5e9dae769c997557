"""Model folders: transformers reads what we write, we read what transformers writes."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.disk import files_of_at_most
from support.models import GPT2, scramble, tiny_config, tiny_model

import fastlm
from fastlm.model.config import RopeScaling
from fastlm.testing import assert_as_accurate

LLAMA3 = RopeScaling(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
LINEAR = RopeScaling(rope_type="linear", factor=2.5)

VARIANTS = [
    {"model_type": "qwen3", "tie_word_embeddings": True},
    {"model_type": "qwen3", "attention_bias": True},
    {"model_type": "llama", "tie_word_embeddings": True},
    {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "hidden_act": "relu2"},
    {"model_type": "llama", "num_key_value_heads": 4, "head_dim": None, "eos_token_id": (3, 5)},
    {"model_type": "llama", "rope_scaling": LLAMA3},
    {"model_type": "qwen2", "rope_scaling": LINEAR},
    {"model_type": "qwen2", "tie_word_embeddings": True, "sliding_window": 7},
    {"model_type": "qwen3", "sliding_window": 7, "layer_types": ("full_attention",) * 2},
    {
        "model_type": "qwen3",
        "sliding_window": 7,
        "layer_types": ("sliding_attention", "full_attention"),
    },
    {"model_type": "mistral"},
    {"model_type": "mistral", "sliding_window": 7, "hidden_act": "gelu_new"},
    {**GPT2, "tie_word_embeddings": True, "hidden_act": "gelu_new"},
    {
        **GPT2,
        "hidden_act": "relu2",
        "intermediate_size": 128,
        "pad_token_id": 7,
        "rms_norm_eps": 0.1,
    },
]


@pytest.fixture
def ids():
    return torch.randint(320, (2, 40))


def logits_of(model, ids):
    with torch.inference_mode():
        return model(ids).logits


def assert_same_logits(model, theirs, ids):
    """Ours and those of transformers are as close to ours in float64 as each other."""
    ours, usual = logits_of(model, ids), logits_of(theirs, ids)
    truth = logits_of(copy.deepcopy(model).double(), ids)
    assert_as_accurate("logits", ours, plain=usual, truth=truth)
    # and the same function: the truth of another would have no fault with ours
    assert_as_accurate("logits of transformers", usual, plain=ours, truth=truth)


@pytest.mark.parametrize("changes", VARIANTS)
def test_transformers_reads_what_we_write(changes, ids, tmp_path):
    model = tiny_model(**changes)
    scramble(model)
    model.save_pretrained(tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values())
    assert type(theirs).__name__.lower().startswith(changes["model_type"])
    assert_same_logits(model, theirs, ids)
    labels = ids.clone()
    labels[:, 5:9] = -100
    torch.testing.assert_close(model(ids, labels=labels).loss, theirs(ids, labels=labels).loss)


@pytest.mark.parametrize("changes", VARIANTS)
def test_we_read_what_transformers_writes(changes, ids, tmp_path):
    values = tiny_config(**changes).to_dict()
    config = transformers.AutoConfig.for_model(**values)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    scramble(theirs)
    theirs.save_pretrained(tmp_path)
    model = fastlm.CausalLM.from_pretrained(tmp_path)
    assert_same_logits(model, theirs, ids)
    assert model.config.rms_norm_eps == changes.get("rms_norm_eps", 1e-5)
    assert model.config.rope_theta == 5000.0 or model.config.model_type == "gpt2"
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings


@pytest.mark.parametrize("changes", VARIANTS)
def test_reads_what_it_wrote(changes, ids, tmp_path):
    model = tiny_model(**changes)
    model.save_pretrained(tmp_path)
    again = fastlm.CausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))
    assert dict(again.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert again.config.to_dict() == model.config.to_dict()
    again(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in again.parameters())


@pytest.mark.parametrize("changes", [{}, {**GPT2, "tie_word_embeddings": True}])
def test_shards_are_read(changes, ids, tmp_path):
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**tiny_config(**changes).to_dict())
    )
    scramble(theirs)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    model = fastlm.CausalLM.from_pretrained(tmp_path)
    assert_same_logits(model, theirs, ids)
    first = sorted(tmp_path.glob("model-*.safetensors"))[0]
    first.unlink()
    with pytest.raises(fastlm.ModelFileError, match=f"{first.name} is missing"):
        fastlm.CausalLM.from_pretrained(tmp_path)


def test_dtype_of_the_file_or_as_asked(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    load = fastlm.CausalLM.from_pretrained
    assert load(tmp_path).lm_head.weight.dtype == torch.bfloat16
    assert load(tmp_path, dtype=torch.float32).lm_head.weight.dtype == torch.float32
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_loaded_weights_are_not_the_file(ids, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    again = fastlm.CausalLM.from_pretrained(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(-4096, 2)
        file.write(b"\xff" * 4096)
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))


def test_tokens_that_end_a_text_come_from_the_generation_config(tmp_path):
    tiny_model(eos_token_id=3).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 7]}))
    assert fastlm.CausalLM.from_pretrained(tmp_path).config.eos_token_ids == (3, 7)


def test_a_head_that_contradicts_the_tie_is_refused(tmp_path):
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    fastlm.CausalLM.from_pretrained(tmp_path)
    weights["lm_head.weight"][3, 4] += 1
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(fastlm.ModelFileError, match=r"lm_head.weight must equal"):
        fastlm.CausalLM.from_pretrained(tmp_path)


def break_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def shorten(weights):
    weights["model.norm.weight"] = weights["model.norm.weight"][1:]


DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        "config.json: cannot be read as JSON",
    ),
    "a JSON list": (
        lambda f: (f / "config.json").write_text("[]"),
        "must hold a JSON object, got list",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:-100]
        ),
        "model.safetensors: is damaged",
    ),
    "missing key": (
        lambda f: break_weights(f, lambda w: w.pop("model.norm.weight")),
        "weights are missing: model.norm.weight",
    ),
    "extra key": (
        lambda f: break_weights(f, lambda w: w.update(adapter=w["model.norm.weight"].clone())),
        "weights that the config has no place for: adapter",
    ),
    "other shape": (
        lambda f: break_weights(f, shorten),
        r"model.norm.weight has \(31,\), must have \(32,\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_named(damage, tmp_path):
    change, message = DAMAGES[damage]
    tiny_model().save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises(fastlm.ModelFileError, match=message) as caught:
        fastlm.CausalLM.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(fastlm.ModelFileError, match="nowhere: no such folder"):
        fastlm.CausalLM.from_pretrained(tmp_path / "nowhere")


def test_a_pickle_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(fastlm.ModelFileError, match=r"pytorch_model.bin: is a pickle"):
        fastlm.CausalLM.from_pretrained(tmp_path)


def test_links_out_of_the_folder_are_refused_but_a_hub_cache_is_read(ids, tmp_path):
    model = tiny_model()
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    model.save_pretrained(snapshot)
    blobs.mkdir()
    weights = snapshot / "model.safetensors"
    weights.rename(blobs / "123")
    weights.symlink_to(blobs / "123")
    assert torch.equal(
        logits_of(fastlm.CausalLM.from_pretrained(snapshot), ids), logits_of(model, ids)
    )
    other = tmp_path / "other"
    shutil.copytree(snapshot, other, symlinks=True)
    with pytest.raises(fastlm.ModelFileError, match="is a link to outside the folder"):
        fastlm.CausalLM.from_pretrained(other)


@pytest.mark.parametrize("name", ["../model.safetensors", "weights.bin"])
def test_an_index_names_safetensors_beside_it(name, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(fastlm.ModelFileError, match="must name a safetensors file beside it"):
        fastlm.CausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "one of qwen3, llama, qwen2, mistral, gpt2, got 'gemma'"),
        ({"model_type": ["llama"]}, "model_type must be one of"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4}},
            "rope_type must be one of default, linear, llama3, got 'yarn'",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "llama3, got 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "factor of rope_scaling must be a number above 0"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 1}},
            "high_freq_factor must be a number above 0, got None",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "rope_parameters must be the same for all layers, got full_attention",
        ),
        ({"layer_types": ["sliding_attention"] * 2}, "sliding_window must be given where"),
        ({"layer_types": ["full_attention"]}, "one for each of 2 layers, got 1"),
        (
            {"layer_types": ["full_attention", "chunked_attention"]},
            "layer_types must be full_attention or sliding_attention, got 'chunked_attention'",
        ),
        (
            {"model_type": "llama", "use_sliding_window": True},
            "use_sliding_window must be False for model_type 'llama', got True",
        ),
        (
            {"model_type": "mistral", "layer_types": ["sliding_attention", "full_attention"]},
            "layer_types must be sliding_attention for model_type 'mistral'",
        ),
        ({"model_type": "qwen2", "attention_bias": True}, "attention_bias must be False for"),
        ({"attention_dropout": 0.1}, "attention_dropout is not supported, got 0.1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        ({"pretraining_tp": 2}, "pretraining_tp is not supported, got 2"),
        ({"hidden_act": "quick_gelu"}, "hidden_act must be one of"),
        ({"hidden_size": "32"}, "hidden_size must be a whole number above 0, got '32'"),
    ],
)
def test_options_that_are_not_computed_are_refused_by_name(changes, message, tmp_path):
    refused(tiny_model(), changes, message, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_attn_weights": False}, "scale_attn_weights is not supported, got False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is not"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is not supported, got True"),
        ({"add_cross_attention": True}, "add_cross_attention is not supported, got True"),
        ({"activation_function": "quick_gelu"}, "hidden_act must be one of .* got 'quick_gelu'"),
        ({"n_embd": "32"}, "n_embd must be a whole number above 0, got '32'"),
        ({"n_head": 5}, "num_attention_heads must divide hidden_size, 32"),
        ({"num_key_value_heads": 2}, "num_key_value_heads must be num_attention_heads, 4, for"),
        ({"use_sliding_window": True}, "use_sliding_window must be False for model_type 'gpt2'"),
    ],
)
def test_options_of_gpt2_that_are_not_computed_are_refused_by_name(changes, message, tmp_path):
    refused(tiny_model(**GPT2), changes, message, tmp_path)


def refused(model, changes, message, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(fastlm.ModelFileError, match=message):
        fastlm.CausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(("changes", "name"), [({}, "intermediate_size"), (GPT2, "n_layer")])
def test_a_size_that_is_missing_is_named(changes, name, tmp_path):
    tiny_model(**changes).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values[name]
    path.write_text(json.dumps(values))
    with pytest.raises(fastlm.ModelFileError, match=f"needs {name}, which"):
        fastlm.CausalLM.from_pretrained(tmp_path)


def test_saving_on_a_full_disk_keeps_what_was_there(ids, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    logits = logits_of(model, ids)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with (
        files_of_at_most(4000),
        pytest.raises(
            fastlm.ModelFileError, match=r"model.safetensors: cannot be written: .*large"
        ),
    ):
        model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(fastlm.CausalLM.from_pretrained(tmp_path), ids), logits)
    assert not list(tmp_path.glob(".*"))


def test_all_files_may_be_read_by_whom_the_umask_lets(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "plain").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_saving_over_a_folder_that_is_open_replaces_it(ids, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = fastlm.CausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        logits_of(fastlm.CausalLM.from_pretrained(tmp_path), ids), logits_of(model, ids)
    )
    assert not list(tmp_path.glob(".*"))
