"""How many kernels a training run compiles, and that ``fastlm doctor --warm`` compiles the same."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest
from support.ahead import compiling_environment
from support.models import tiny_config

from fastlm.cli import FAILED, USAGE, _warm, main
from fastlm.kernels import _runtime

# Kernels here are interpreted, so a child counts those that a GPU would be given: every launch of a
# real model is recorded, none runs, and Triton's runtime tells which are alike.
COUNT = """
import functools, json, sys
import torch, fastlm
from support.models import tiny_config
from support.poison import poisoned
from fastlm.cli import _warm
from fastlm.kernels import (
    attention, attention_with_kv_cache, cross_entropy, linear_cross_entropy
)
from fastlm.kernels._ahead import distinct
from fastlm.kernels._launch import recorded
from fastlm.kernels._runtime import modelled
from fastlm.model import decode_step, generate
from fastlm.model.kv_cache import KVCache
from fastlm.ops import _dispatch

_dispatch._KERNELS = ()  # auto asks kernels on CPU too
for op in (attention, attention_with_kv_cache, cross_entropy, linear_cross_entropy):
    sys.modules[f"{op.__name__}.launch"].refuses_device = lambda *_: None
# a GPU decodes by the modules, and finds lengths on the device
KVCache._known_lengths = lambda cache: cache.seqlens
def new_step(model, batch, max_length, dtype):
    cache = model.new_cache(batch, max_length, dtype=dtype)
    return functools.partial(decode_step._by_modules, model, cache), cache
generate.new_step = new_step

def keys(call):
    with poisoned(0), recorded(run=False) as log:
        call()
    found = distinct(log, 90)
    return {key: launch.name for key, (launch, _) in found.items()}

config = tiny_config(max_position_embeddings=2048)
model = fastlm.CausalLM(config)

def step(batch, length, train=True):
    ids = torch.zeros(batch, length, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(train):
        loss = model(ids, labels=ids).loss
    if train:
        loss.backward()

narrow = fastlm.CausalLM(config).bfloat16()

def generates(model, batch, length):
    model.generate(torch.zeros(batch, length, dtype=torch.int64), max_new_tokens=3)

def run(shapes):
    for shape in shapes:
        step(*shape)
        step(*shape, train=False)
        generates(model, *shape)

def packed(length, num_keys, documents):
    query, key = (torch.zeros(1, n, h, 16, requires_grad=True)
                  for n, h in ((length, 4), (num_keys, 2)))
    ends = [torch.linspace(0, n, documents + 1).int() for n in (length, num_keys)]
    fastlm.causal_attention(
        query, key, key, cu_seqlens_q=ends[0], cu_seqlens_k=ends[1], window_size=length,
        backend="triton",
    ).sum().backward()

def padded(batch, length):
    query = torch.zeros(batch, length, 4, 16, requires_grad=True)
    start = torch.zeros(batch, dtype=torch.int32)
    fastlm.causal_attention(
        query, query, query, key_start=start, key_end=start + length, backend="triton"
    ).sum().backward()

def losses(batch, length):
    hidden = torch.zeros(batch, length, 32, requires_grad=True)
    weight, bias = (torch.zeros(*s, requires_grad=True) for s in ((320, 32), (320,)))
    targets = torch.zeros(batch, length, dtype=torch.int64)
    fastlm.linear_cross_entropy(
        hidden, weight, targets, linear_bias=bias, reduction="none", backend="triton"
    ).sum().backward()
    logits = torch.zeros(batch, length + 1, 320, requires_grad=True)
    fastlm.cross_entropy(
        logits[:, :-1].flatten(0, 1) if batch == 1 else logits[:, :-1], targets, backend="triton"
    ).backward()

# batches and lengths: 1, what 16 divides, what nothing divides, and two chunks of 2,501 rows
SHAPES = [(1, 1), (1, 16), (2, 33), (3, 48), (4, 7), (6, 1667)]
PACKED = [(1, 1, 1), (16, 33, 2), (33, 48, 17), (50, 16, 16)]  # lengths, documents
warm = distinct(_warm.launches(config, "bfloat16", modelled(90)), 90)
print(json.dumps({
    "one": keys(lambda: run([(2, 32)])),
    "many": keys(lambda: [run(SHAPES), *(generates(narrow, *shape) for shape in SHAPES)]),
    "warm": {key: launch.name for key, (launch, _) in warm.items()},
    "packed": keys(lambda: [packed(*x) for x in PACKED]),
    "padded": keys(lambda: [padded(*x) for x in SHAPES[:5]]),
    "losses": keys(lambda: [losses(*x) for x in ((2, 3), (4, 16), (3, 1667), (16, 1))]),
}))
"""
STEP = ["delta_kernel", "dkdv_kernel", "dq_kernel", "forward_kernel"]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    script = tmp_path_factory.mktemp("count") / "count.py"
    script.write_text(COUNT)
    child = subprocess.run(
        [sys.executable, "-P", str(script)],
        env=compiling_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def test_a_training_run_compiles_nine_kernels(counted):
    # of attention once more forward, for generation in float32, and two over a cache
    decoding = ["append_kernel", "decode_kernel", "forward_kernel"]
    names = sorted([*STEP, *decoding, "gradient_kernel", "loss_kernel"])
    assert sorted(counted["one"].values()) == names


def test_other_batches_and_lengths_compile_only_long_caches_and_another_dtype(counted):
    more = sorted(name for key, name in counted["many"].items() if key not in counted["one"])
    # keys divided among programs in float32; in bfloat16 both ways and the append
    long = ["combine_kernel", "decode_kernel"]
    assert more == sorted([*long, *long, "append_kernel", "decode_kernel"])
    assert counted["one"].keys() < counted["many"].keys()


def test_warm_compiles_what_the_model_launches(counted):
    assert counted["warm"] == counted["many"]


@pytest.mark.parametrize("sequences", ["packed", "padded"])
def test_documents_and_padding_have_one_set_of_kernels(counted, sequences):
    assert sorted(counted[sequences].values()) == STEP


def test_losses_of_any_number_of_rows_have_one_set_of_kernels(counted):
    names = ["backward_kernel", "bias_gradient_kernel", "forward_kernel"]
    assert sorted(counted["losses"].values()) == [*names, "gradient_kernel", "loss_kernel"]


def test_layers_with_and_without_a_window_are_warmed():
    kinds = ("sliding_attention", "full_attention")
    config = tiny_config(model_type="qwen2", sliding_window=7, layer_types=kinds)
    made = _warm.launches(config, "bfloat16", _runtime.modelled(90))
    attended = [launch for launch in made if "HAS_WINDOW" in launch.constants]
    assert {(launch.name, launch.constants["HAS_WINDOW"]) for launch in attended} == {
        (name, has_window)
        for name in ("forward_kernel", "dkdv_kernel", "dq_kernel")
        for has_window in (False, True)
    }


# ---- the command


def test_warm_without_a_gpu_says_that_there_is_nothing_to_do(monkeypatch, capsys):
    monkeypatch.setattr(_runtime, "present", lambda: None)
    assert main(["doctor", "--warm"]) == 0
    assert "nothing to warm: torch sees no GPU here" in capsys.readouterr().out


def test_warm_takes_the_gpu_of_this_machine(monkeypatch, capsys):
    seen = []

    def compiled(config: Any, dtype: str, device: Any) -> list[dict[str, Any]]:
        seen.append((config.vocab_size, dtype, device))
        return [
            {"kernel": "attention dq", "seconds": s, "registers": 9, "stack": 0, "shared": 64}
            for s in (1.0, 2.5)
        ]

    here = _runtime.Device(arch=103, num_sms=148, shared_memory=227 * 1024)
    monkeypatch.setattr(_runtime, "present", lambda: here)
    monkeypatch.setattr(_warm, "compile_all", compiled)
    assert main(["doctor", "--warm", "--vocab-size", "777", "--dtype", "float16"]) == 0
    assert seen == [(777, "float16", here)]
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split() == ["attention", "dq", "2", "3.5", "9", "0", "64"]
    assert printed[-1].startswith("2 kernels for sm_103 in ")


@pytest.mark.slow
def test_warm_compiles_for_a_gpu_that_is_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert main(["doctor", "--warm", "--arch", "sm_80"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("7 kernels for sm_80 in ")
    binaries = list((tmp_path / "cache").rglob("*.cubin"))
    assert len(binaries) == 7
    # the second time they are all there
    assert main(["doctor", "--warm", "--arch", "sm_80"]) == 0
    assert list((tmp_path / "cache").rglob("*.cubin")) == binaries


@pytest.mark.parametrize(
    ("flags", "message", "code"),
    [
        (["--arch", "sm_75"], "arch must be one of sm_80, .*, got 'sm_75'", USAGE),
        (["--dtyp", "float16"], "did you mean --dtype", USAGE),
        (["--model", "nowhere"], "nowhere", FAILED),
    ],
)
def test_wrong_flags_are_named(flags, message, code, monkeypatch, capsys):
    monkeypatch.setattr(_runtime, "present", lambda: _runtime.modelled(90))
    assert main(["doctor", "--warm", *flags]) == code
    assert re.search(message, capsys.readouterr().err)
