"""fastlm.optimize: what it promises of the loss, of what it leaves alone, and of undoing it."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from support import hf_zoo
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

import fastlm
import fastlm.hf
from fastlm.hf import layers
from fastlm.hf import loss as fused
from fastlm.hf.report import KINDS
from fastlm.hf.verify import agree
from fastlm.kernels._launch import recorded
from fastlm.ops import _dispatch

pytestmark = pytest.mark.filterwarnings("ignore")
SCALED = ["gemma2", "cohere", "granite", "hyperclovax"]  # capped, multiplied, divided, multiplied


def both(model_type: str) -> tuple[nn.Module, nn.Module]:
    """The untouched model and an optimized one, in training mode."""
    theirs = hf_zoo.build(model_type).train()
    ours = copy.deepcopy(theirs)
    fastlm.optimize(ours)
    return theirs, ours


@pytest.fixture(scope="module")
def llama():
    return both("llama")


def assert_same_training(ours, theirs, **inputs):
    truth = hf_zoo.loss_and_gradients(hf_zoo.in_double(theirs), **inputs)
    plain = hf_zoo.loss_and_gradients(theirs, **inputs)
    assert hf_zoo.first_wrong(hf_zoo.loss_and_gradients(ours, **inputs), plain, truth) is None


NUMBERS = [None, 7, torch.tensor(7), 7.5]


@pytest.mark.parametrize("num_items", NUMBERS)
@pytest.mark.parametrize("shifted", [False, True])
def test_takes_labels_shifted_or_not_and_their_number(llama, num_items, shifted):
    inputs = hf_zoo.batch()
    if shifted:
        inputs["shift_labels"] = inputs["labels"].roll(-1, 1)
    assert_same_training(llama[1], llama[0], **inputs, num_items_in_batch=num_items)


def test_gives_no_logits_in_training_and_all_of_them_otherwise(llama):
    theirs, ours = llama
    inputs = hf_zoo.batch()
    assert ours(**inputs).logits is None
    positional = list(inputs.values())[:2]
    assert ours(*positional).logits.shape == (2, hf_zoo.LENGTH, hf_zoo.VOCABULARY)
    with torch.no_grad():
        ours.eval(), theirs.eval()
        for more in ({}, {"labels": None}):
            torch.testing.assert_close(ours(**inputs | more).logits, theirs(**inputs | more).logits)
        ours.train(), theirs.train()
    as_tuple = ours(**inputs, return_dict=False)
    assert as_tuple[1].shape == (2, hf_zoo.LENGTH, hf_zoo.VOCABULARY)


def test_smoothed_losses_of_the_trainer_have_their_logits(llama):
    """Its LabelSmoother takes the labels away and asks for logits."""
    theirs, ours = llama
    smoother = transformers.trainer_pt_utils.LabelSmoother(epsilon=0.1)
    inputs = hf_zoo.batch()
    labels = inputs.pop("labels")
    got, want = (smoother(model(**inputs), labels, shift_labels=True) for model in (ours, theirs))
    torch.testing.assert_close(got, want)


def test_gradients_accumulate(llama):
    theirs, ours = llama
    inputs = hf_zoo.batch()
    count = int((inputs["labels"][:, 1:] != -100).sum())
    for model in llama:
        model.zero_grad()
        for at in range(2):
            micro = {name: x[at : at + 1] for name, x in inputs.items()}
            model(**micro, num_items_in_batch=count).loss.backward()
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    got, usual = zip(*[(a.grad, b.grad) for a, b in pairs], strict=True)
    whole = hf_zoo.loss_and_gradients(hf_zoo.in_double(theirs), **inputs)
    truth = [whole[name] for name, _ in theirs.named_parameters()]
    assert agree(got, usual, truth).why is None
    for model in llama:
        model.zero_grad()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(llama, reentrant):
    theirs, ours = llama
    for model in llama:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    try:
        assert_same_training(ours, theirs, **hf_zoo.batch())
    finally:
        for model in llama:
            model.gradient_checkpointing_disable()


@pytest.mark.parametrize("model_type", SCALED)
def test_logits_far_apart_do_not_hide_what_the_model_does_to_them(model_type):
    theirs = hf_zoo.build(model_type).train()
    with torch.no_grad():
        theirs.lm_head.weight.mul_(300 if model_type == "gemma2" else 30)
    ours = copy.deepcopy(theirs)
    report = fastlm.optimize(ours)
    assert report.replaced["loss"] == 1
    assert_same_training(ours, theirs, **hf_zoo.batch())


@pytest.mark.parametrize("model_type", SCALED)
def test_a_scale_that_is_left_out_is_refused(model_type, monkeypatch):
    monkeypatch.setattr(fused, "EPILOGUES", ())
    report = fastlm.optimize(hf_zoo.build(model_type))
    assert report.replaced["loss"] == 0
    assert "logits" in next(iter(report["loss"].reasons))


def test_a_model_that_begins_to_change_its_logits_raises():
    _, ours = both("gemma2")
    state = fused.state_of(ours)
    state.epilogues = ()
    with pytest.raises(RuntimeError, match="changes its logits before the loss"):
        ours(**hf_zoo.batch())
    with torch.no_grad():  # and is itself again
        assert ours(hf_zoo.batch()["input_ids"]).logits is not None


def test_statistics_without_logits(llama):
    theirs, ours = llama
    inputs = hf_zoo.batch()
    with fastlm.hf.loss_statistics(ours) as told:
        ours(**inputs)
        ours(**inputs)
    logits = theirs(**inputs).logits[:, :-1].double()
    labels = inputs["labels"][:, 1:]
    counted = labels != -100
    logprobs = logits.log_softmax(-1)[counted]
    assert float(told.num_items) == 2 * counted.sum()
    hits = (logprobs.argmax(-1) == labels[counted]).double().mean()
    assert told.accuracy == pytest.approx(float(hits))
    entropy = -(logprobs.exp() * logprobs).sum(-1).mean()
    assert told.entropy == pytest.approx(float(entropy.detach()), rel=1e-5)
    assert told.perplexity == pytest.approx(
        float(F.nll_loss(logprobs, labels[counted]).exp().detach()), rel=1e-5
    )
    with pytest.raises(ValueError, match="loss_statistics: model must be one whose loss"):
        fastlm.hf.loss_statistics(theirs).__enter__()


def test_the_report_is_a_table_and_an_object(capsys):
    model = hf_zoo.build("qwen3")
    report = fastlm.optimize(model)
    assert str(report) == capsys.readouterr().out.rstrip()
    assert report
    assert report.replaced == {"attention": 2, "loss": 1, "norm": 9, "rope": 2, "mlp": 2}
    assert all(0 <= row.error < 1e-5 for row in report.rows)
    lines = str(report).splitlines()
    assert lines[0] == "fastlm.optimize: Qwen3ForCausalLM"
    assert lines[2].split()[:5] == ["attention", "2", "of", "2", "causal_attention"]
    for kind in report.replaced:
        one = fastlm.optimize(model, **{other: other == kind for other in report.replaced})
        assert one.replaced == {kind: report.replaced[kind]}


def test_layers_run_by_kernels_on_a_gpu(device, monkeypatch):
    """Away from one, tensors of a CPU are taken for a GPU's, and the kernels are interpreted."""
    if device == "cpu":
        monkeypatch.setattr(_dispatch, "_on_gpu", lambda args: True)
    theirs = hf_zoo.build("llama").train().to(device)
    ours = copy.deepcopy(theirs)
    report = fastlm.optimize(ours, attention=False, loss=False)
    assert {row.kind: row.backend for row in report.rows} == dict.fromkeys(KINDS[2:], "triton")
    inputs = {name: x.to(device) for name, x in hf_zoo.batch().items()}
    with recorded() as log:
        assert_same_training(ours, theirs, **inputs)
    kernels = Counter((call.kernel.fn.__module__.split(".")[2], call.name) for call in log)
    depth = ours.config.num_hidden_layers
    norms = 2 * depth + 1
    assert kernels == {
        ("rms_norm", "forward_kernel"): norms,
        ("rms_norm", "backward_kernel"): norms,
        ("rms_norm", "weight_kernel"): norms,
        ("rotary", "rotate_kernel"): 4 * depth,  # queries and keys, there and back
        ("glu", "forward_kernel"): depth,
        ("glu", "backward_kernel"): depth,
    }


def test_nothing_to_replace_warns_or_raises():
    model = hf_zoo.build("xlnet")
    with pytest.warns(UserWarning, match="replaced nothing in XLNetLMHeadModel"):
        assert not fastlm.optimize(model)
    with pytest.raises(RuntimeError, match="it computes attention itself"):
        fastlm.optimize(model, strict=True)
    with pytest.raises(TypeError, match="optimize: model must be a PreTrainedModel"):
        fastlm.optimize(nn.Linear(2, 2))


def test_restore_gives_the_same_model_to_the_last_bit():
    model = hf_zoo.build("gemma2").train()
    inputs = hf_zoo.batch()
    was, wanted = pickle.dumps(model), hf_zoo.loss_and_gradients(model, **inputs)
    names = [type(module).__name__ for module in model.modules()]
    state, config = copy.deepcopy(model.state_dict()), model.config
    with fastlm.optimized(model) as report:
        assert report
        assert [type(module).__name__ for module in model.modules()] == names
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
        assert model.loss_function is not ForCausalLMLoss
    assert model.config is config and model.loss_function is ForCausalLMLoss
    assert pickle.dumps(model) == was
    got = hf_zoo.loss_and_gradients(model, **inputs)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    fastlm.restore(model)  # of a model as it came: nothing


def test_copies_and_pickles_work_alone():
    _, ours = both("qwen3")
    inputs = hf_zoo.batch()
    loss = ours(**inputs).loss
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(**inputs).loss, loss) and other(**inputs).logits is None
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert torch.equal(ours(**inputs).loss, loss)
        fastlm.restore(other)
        assert other(**inputs).logits is not None and ours(**inputs).logits is None


def test_of_two_models_with_one_config_the_other_stays_as_it_was():
    config = hf_zoo.build("llama").config
    one, other = (transformers.LlamaForCausalLM(config).train() for _ in range(2))
    before = pickle.dumps(other)
    fastlm.optimize(one)
    assert pickle.dumps(other) == before
    assert other.config._attn_implementation == "sdpa"
    assert other(**hf_zoo.batch()).logits is not None


def test_saves_what_opens_without_fastlm(tmp_path):
    theirs, ours = both("llama")
    ours.save_pretrained(tmp_path)
    assert "fastlm" not in (tmp_path / "config.json").read_text()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again).__name__ == "LlamaForCausalLM"
    assert again.config.architectures == ["LlamaForCausalLM"]
    inputs = hf_zoo.batch()
    assert torch.equal(again.train()(**inputs).loss, theirs(**inputs).loss)


@torch.no_grad()
def test_generates_the_same_text(llama):
    theirs, ours = llama
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    ids = hf_zoo.batch()["input_ids"]
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))


@pytest.mark.parametrize("model_type", ["gemma2", pytest.param("granite", marks=pytest.mark.slow)])
def test_compiles_to_one_graph(model_type):
    theirs, ours = both(model_type)
    for model in (theirs, ours):
        model.model.layers = model.model.layers[:1]
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    inputs = hf_zoo.batch()
    wanted = hf_zoo.loss_and_gradients(hf_zoo.in_double(theirs), **inputs)
    plain = hf_zoo.loss_and_gradients(theirs, **inputs)
    got = hf_zoo.loss_and_gradients(compiled, **inputs)
    got = {name.removeprefix("_orig_mod."): x for name, x in got.items()}
    assert hf_zoo.first_wrong(got, plain, wanted) is None
    assert compiled(**inputs).logits is None


def lora(model: nn.Module, targets: list[str]) -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(0)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["q_proj", "lm_head"]])
@pytest.mark.parametrize("first", ["adapters", "optimize"])
def test_with_adapters(targets, first):
    theirs = hf_zoo.build("llama").train()
    ours = copy.deepcopy(theirs)
    if first == "optimize":
        fastlm.optimize(ours)
    theirs, ours = lora(theirs, targets).train(), lora(ours, targets).train()
    if first == "adapters":
        report = fastlm.optimize(ours)
        assert report.replaced["loss"] == ("lm_head" not in targets)
        assert report.replaced["attention"] == 2
    assert_same_training(ours, theirs, **hf_zoo.batch())


def test_outputs_have_no_logits_by_any_name(llama):
    out = llama[1](**hf_zoo.batch())
    assert "logits" not in out and len(out.to_tuple()) == len(out.keys())
    assert all(x is not out.loss for x in out.to_tuple()[1:])


def test_of_what_a_model_holds_nothing_is_changed_between_its_passes_or_by_an_interruption():
    _, ours = both("gemma2")
    head = ours.get_output_embeddings()
    forward = head.__dict__["forward"]

    def interrupted(input):
        assert ours.config.final_logit_softcapping is not None
        raise KeyboardInterrupt

    head.__dict__["forward"] = interrupted
    with pytest.raises(KeyboardInterrupt):
        ours(**hf_zoo.batch())
    head.__dict__["forward"] = forward
    assert ours.config.final_logit_softcapping is not None


def test_what_is_changed_in_a_config_meanwhile_stays():
    model = hf_zoo.build("llama")
    config = model.config
    fastlm.optimize(model)
    model.resize_token_embeddings(40)
    fastlm.restore(model)
    assert model.config is config and config.vocab_size == 40
    assert config._attn_implementation == "sdpa"


class Clamped(nn.Module):
    """A gated unit that may do more, by a number of its own."""

    def __init__(self, limit):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(8, 12, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(12, 8, bias=False), nn.SiLU()
        self.limit = limit

    def forward(self, x):
        gate = self.act_fn(self.gate_proj(x))
        return self.down_proj(
            (gate if self.limit is None else gate.clamp(max=0.1)) * self.up_proj(x)
        )


def test_layers_of_a_class_are_judged_by_their_own_settings():
    found = list(layers.swaps(nn.ModuleList([Clamped(None), Clamped(1.0), Clamped(None)]), "mlp"))
    assert [swap.forward is None for swap in found] == [False, True, False]


def test_norms_are_compared_whatever_is_asked_for():
    theirs = hf_zoo.build("gemma2").train()
    ours = copy.deepcopy(theirs)
    fastlm.optimize(ours, verify=False)
    assert_same_training(ours, theirs, **hf_zoo.batch())


def test_copies_of_layers_are_restored_too():
    model = hf_zoo.build("llama").train()
    fastlm.optimize(model)
    model.other = nn.ModuleList([copy.deepcopy(model.lm_head), copy.deepcopy(model.model.norm)])
    fastlm.restore(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_trainer_in_mixed_precision(tmp_path):
    rows = [{"input_ids": x, "labels": x} for x in hf_zoo.batch()["input_ids"]] * 4
    callback = fastlm.hf.TrainerCallback()
    trainer = transformers.Trainer(
        hf_zoo.build("llama"),
        transformers.TrainingArguments(
            str(tmp_path), max_steps=1, logging_steps=1, report_to=[], save_strategy="no",
            use_cpu=True, bf16=True, disable_tqdm=True,
        ),
        train_dataset=rows, callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    assert {row.kind: row.replaced for row in callback.report.rows}["loss"] == 1
    assert "perplexity" in trainer.state.log_history[0]


def test_trainer_leaves_alone_what_its_caller_optimized(tmp_path):
    model = hf_zoo.build("llama").train()
    fastlm.optimize(model, attention=False)
    callback = fastlm.hf.TrainerCallback()
    callback.on_train_begin(transformers.TrainingArguments(str(tmp_path)), None, None, model=model)
    assert model.config._attn_implementation == "sdpa"
    callback.on_train_end(None, None, None)
    assert fused.state_of(model) is not None
    fastlm.restore(model)


def test_trainer_logs_what_the_loss_knows(tmp_path):
    rows = [{"input_ids": x, "labels": x} for x in hf_zoo.batch()["input_ids"]] * 4
    logged = []
    for callbacks in ([], [fastlm.hf.TrainerCallback()]):
        model = hf_zoo.build("llama")
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                str(tmp_path), max_steps=3, logging_steps=1, per_device_train_batch_size=2,
                gradient_accumulation_steps=2, report_to=[], save_strategy="no", use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=rows, callbacks=callbacks,
        )  # fmt: skip
        trainer.train()
        assert "_fastlm_changes" not in model.__dict__
        logged.append([x for x in trainer.state.log_history if "loss" in x])
    for usual, ours in zip(*logged, strict=True):
        assert ours["loss"] == pytest.approx(usual["loss"], rel=1e-5)
        assert 0 <= ours["token_accuracy"] <= 1 and ours["entropy"] > 0 and ours["perplexity"] > 1
