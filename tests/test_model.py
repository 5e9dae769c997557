"""CausalLM: loss, logits, gradients, compilation, configuration."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from support.models import tiny_config, tiny_model

import fastlm

VARIANTS = [
    {"model_type": "qwen3"},
    {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
]


def batch(device, rows=2, length=17):
    return torch.randint(320, (rows, length), device=device)


@pytest.mark.parametrize("changes", VARIANTS)
def test_loss_is_that_of_the_logits(changes, device):
    model, ids = tiny_model(**changes).to(device), batch(device)
    labels = ids.clone()
    labels[0, 3:9] = -100
    out = model(ids, labels=labels)
    assert out.logits is None
    logits = model(ids).logits
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, want)
    both = model(ids, labels=labels, return_logits=True)
    assert torch.equal(both.loss, out.loss) and torch.equal(both.logits, logits)
    assert model(ids).loss is None


@pytest.mark.parametrize("changes", VARIANTS)
def test_gradients_are_those_of_the_logits(changes, device):
    model, ids = tiny_model(**changes).to(device), batch(device)
    parameters = list(model.parameters())
    got = torch.autograd.grad(model(ids, labels=ids).loss, parameters)
    logits = model(ids).logits[:, :-1]
    want = torch.autograd.grad(
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()), parameters
    )
    torch.testing.assert_close(got, want)


def test_targets_line_up_with_logits(device):
    model, ids = tiny_model().to(device), batch(device, length=18)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    want = F.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(inputs, targets=targets).loss, want)


def test_num_items_makes_accumulated_batches_one_batch(device):
    model, ids = tiny_model().to(device), batch(device, rows=4)
    labels = ids.clone()
    labels[:3, 5:] = -100
    whole = model(ids, labels=labels).loss
    items = (labels[:, 1:] != -100).sum()
    for count in (items, int(items)):
        parts = [
            model(x, labels=y, num_items=count).loss
            for x, y in zip(ids.split((1, 3)), labels.split((1, 3)), strict=True)
        ]
        torch.testing.assert_close(sum(parts), whole)


def test_a_batch_without_labels_counts_nothing(device):
    model, ids = tiny_model().to(device), batch(device)
    loss = model(ids, labels=torch.full_like(ids, -100), num_items=7).loss
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad.any() for p in model.parameters())


def test_later_tokens_change_nothing_before_them(device):
    model, ids = tiny_model().to(device), batch(device)
    other = ids.clone()
    other[:, 9:] = (other[:, 9:] + 1) % 320
    torch.testing.assert_close(model(ids).logits[:, :9], model(other).logits[:, :9])
    assert not torch.equal(model(ids).logits[:, 9], model(other).logits[:, 9])


def test_last_logits_alone(device):
    model, ids = tiny_model().to(device), batch(device)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, model(ids).logits[:, -3:])


@pytest.mark.parametrize("changes", VARIANTS)
def test_compiles_whole(changes, device):
    model, ids = tiny_model(**changes, num_hidden_layers=1).to(device), batch(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    parameters = list(model.parameters())
    want = torch.autograd.grad(model(ids, labels=ids).loss, parameters)
    got = torch.autograd.grad(compiled(ids, labels=ids).loss, parameters)
    torch.testing.assert_close(got, want)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


def test_angles_stay_exact_in_bfloat16(device):
    model = tiny_model().to(device)
    want = model.model.rotary(8)
    model.to(torch.bfloat16)
    got = model.model.rotary(8)
    assert all(map(torch.equal, got, want)) and got[0].dtype == torch.float32
    assert model(batch(device)).logits.dtype == torch.bfloat16


def test_autocast_gives_a_float32_loss_and_gradients(device):
    model, ids = tiny_model().to(device), batch(device)
    plain = model(ids, labels=ids).loss
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - plain.item()) < 0.02 * plain.item()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_initial_weights_have_their_width(device):
    model = fastlm.CausalLM(
        tiny_config(hidden_size=128, num_hidden_layers=8, initializer_range=0.1)
    )
    layer = model.model.layers[0]
    assert layer.mlp.up_proj.weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(0.1 / 4, rel=0.05)
    assert (layer.input_layernorm.weight == 1).all()
    logits = fastlm.CausalLM(tiny_config())(batch("cpu")).logits
    # close to uniform, as an untrained model should be
    assert logits.std() < 0.5


def test_attention_module_without_positions(device):
    attention = fastlm.nn.CausalSelfAttention(32, 4, 2, qk_norm=True).to(device)
    x = torch.randn(2, 5, 32, device=device)
    q = F.rms_norm(attention.q_proj(x).view(2, 5, 4, 8), (8,), eps=1e-6)
    k = F.rms_norm(attention.k_proj(x).view(2, 5, 2, 8), (8,), eps=1e-6)
    v = attention.v_proj(x).view(2, 5, 2, 8)
    want = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(attention(x), attention.o_proj(want.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, dtype=torch.long),), r"input_ids must be \(B, T\)"),
        ((torch.zeros(1, 3),), "input_ids must be .* got shape .* of torch.float32"),
        ((torch.zeros(1, 65, dtype=torch.long),), "context, 64 tokens, got 65"),
    ],
)
def test_wrong_ids_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(*arguments)


def test_wrong_labels_are_named():
    model, ids = tiny_model(), batch("cpu")
    with pytest.raises(ValueError, match=r"labels must have the shape of input_ids, \(2, 17\)"):
        model(ids, labels=ids[:, 1:])
    with pytest.raises(ValueError, match="labels must be None beside targets"):
        model(ids, labels=ids, targets=ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a whole number above 0, got 0"),
        ({"hidden_size": 32.0}, "hidden_size must be a whole number above 0, got 32.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number"),
        (
            {"num_key_value_heads": 3},
            "num_key_value_heads must divide num_attention_heads, 4, got 3",
        ),
        (
            {"head_dim": None, "num_attention_heads": 6},
            "num_attention_heads must divide hidden_size",
        ),
        ({"head_dim": 15}, "head_dim must be even and at most 512, got 15"),
        ({"head_dim": 514}, "head_dim must be even and at most 512, got 514"),
        ({"hidden_act": "tanh"}, "hidden_act must be one of .*, got 'tanh'"),
        ({"model_type": "gemma"}, "model_type must be one of qwen3, llama, .*, got 'gemma'"),
        ({"rope_theta": 0.0}, "rope_theta must be above 0, got 0.0"),
        ({"rope_theta": float("nan")}, "rope_theta must be above 0, got nan"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be at least 0, got -1.0"),
        ({"mlp_bias": True}, "mlp_bias must be False for model_type 'qwen3'"),
        ({"eos_token_id": 320}, r"eos_token_id must be in \[0, 320\), got 320"),
        ({"eos_token_id": (1, -1)}, r"eos_token_id must be in \[0, 320\), got -1"),
    ],
)
def test_impossible_configs_are_named(changes, message):
    with pytest.raises(ValueError, match=f"CausalLMConfig: {message}"):
        tiny_config(**changes)


def test_config_imports_no_torch():
    program = "import sys, fastlm; fastlm.CausalLMConfig; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
