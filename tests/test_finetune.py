"""Fine-tuning runs of tiny models: what they learn, change and leave behind."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch
import transformers
from support import hf_folders, hf_zoo
from support.hf_zoo import OpLog

import fastlm
from fastlm.cli import FAILED, USAGE, main
from fastlm.finetuning import loop
from fastlm.finetuning import measure as measuring
from fastlm.finetuning.batches import Layout, chunks
from fastlm.finetuning.examples import Example
from fastlm.finetuning.folder import write_model
from fastlm.finetuning.measure import label_logprobs, loss_sum, measure, next_token
from fastlm.finetuning.methods import changes, fingerprints, prepare
from fastlm.training.checkpoint import load_latest
from fastlm.training.config import ConfigError
from fastlm.training.loop import NonFiniteError

pytestmark = pytest.mark.filterwarnings("ignore")

ANIMALS, TOOLS = ("cat", "mat", "sat"), ("on", "the", "then")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, and labelled rows that a model of one token of context can tell apart."""
    folder = tmp_path_factory.mktemp("finetune")
    hf_folders.write_model(folder / "llama")
    words = [(word, "animal") for word in ANIMALS] + [(word, "tool") for word in TOOLS]
    rows = [f"{number % 7} {word},{label}\n" for number in range(14) for word, label in words]
    (folder / "rows.csv").write_text("text,label\n" + "".join(rows))
    return folder


def tune(folder: Path, out: Path, *, on_step=None, **options):
    options = {
        "model": str(folder / "llama"), "data": str(folder / "rows.csv"), "out": str(out),
        "max_length": 32, "device": "cpu", "method": "full", **options,
    }  # fmt: skip
    return fastlm.finetune(fastlm.FinetuneConfig(**options), on_step=on_step)


def cli(capsys, *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_learns_labels_and_says_so(folder, tmp_path, capsys):
    out = tmp_path / "run"
    code, said, _ = cli(
        capsys, "finetune", folder / "llama", "--data", folder / "rows.csv", "--out", out,
        "--method", "full", "--epochs", 6, "--lr", 1e-2, "--max-length", 32,
    )  # fmt: skip
    assert code == 0
    summary = json.loads((out / "finetune.json").read_text())
    assert summary["after"]["accuracy"] == 1.0 > summary["before"]["accuracy"] + 0.3
    assert summary["after"]["loss"] < summary["before"]["loss"] / 4
    assert summary["labels"] == ["animal", "tool"]
    before, after = summary["next_token"]
    assert before["prompt"] == after["prompt"]
    assert before["top_logprobs"][0]["prob"] < after["top_logprobs"][0]["prob"]
    report = (out / "report.md").read_text()
    assert f"| accuracy | {summary['before']['accuracy']:.1%} | 100.0% |" in report
    assert "causal_attention in 2 layers; loss fused with the last layer" in report
    assert "examples packed into one row" in report
    assert "accuracy 100.0%" in said
    assert "fastlm eval" not in said  # of rows that it was trained on
    # a model folder like any other
    assert fastlm.load(out).next_token("1 cat\nlabel:", top_k=1).probs[0] > 0.5


@pytest.mark.parametrize(
    ("method", "trained"),
    [
        ("lora", "lora_"),
        ("last-n-layers", "model.layers.1."),
        ("head", "lm_head."),
        ("full", ""),
    ],
)
def test_changes_what_the_method_trains_and_nothing_else(folder, tmp_path, method, trained):
    options = {"last_n_layers": 1} if method == "last-n-layers" else {}
    result = tune(folder, tmp_path / "run", method=method, steps=3, lr=1e-2, **options)
    assert result.changes.changed
    assert all(trained in name for name in result.changes.changed)
    assert len(result.changes.changed) == result.changes.trained
    assert result.after.loss < result.before.loss
    assert (
        f"{result.changes.parameters:,} of {result.changes.total:,}"
        in (tmp_path / "run/report.md").read_text()
    )
    before = weights(folder / "llama")
    if method == "lora":
        inner = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama")
        adapted = peft.PeftModel.from_pretrained(inner, tmp_path / "run")
        assert not (tmp_path / "run/config.json").exists()
        config = json.loads((tmp_path / "run/adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str((folder / "llama").resolve())
        names = [n for n, p in adapted.named_parameters() if "lora_B" in n and p.abs().sum() > 0]
        assert len(names) == 14
    else:
        after = weights(tmp_path / "run")
        same = {name for name in before if torch.equal(before[name], after[name])}
        assert same == {name for name in before if trained not in name}


def test_parameters_that_did_not_move_are_not_said_to_have(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama")
    config = fastlm.FinetuneConfig("x", "y", method="head")
    prepare(model, config)
    before = fingerprints(model)
    assert not changes(model, before).changed
    with torch.no_grad():
        model.lm_head.weight[3, 3].mul_(1 + 1e-6)
    assert changes(model, before).changed == {"lm_head.weight": (320, 32)}


@pytest.mark.parametrize("stopped_at", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_a_stopped_run_is_saved_and_goes_on_to_the_same_weights(
    folder, tmp_path, capsys, stopped_at
):
    options = {"method": "lora", "steps": 8, "lora_dropout": 0.1, "lr": 1e-2}
    whole = tune(folder, tmp_path / "whole", **options)

    def stop(step: int) -> None:
        if step == stopped_at:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        tune(folder, tmp_path / "run", on_step=stop, **options)
    assert f"--out {tmp_path / 'run'} --resume" in capsys.readouterr().out
    assert load_latest(tmp_path / "run/checkpoints").step == stopped_at
    # what others open is there too
    inner = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama")
    peft.PeftModel.from_pretrained(inner, tmp_path / "run")

    assert cli(capsys, "finetune", "--out", tmp_path / "run", "--resume")[0] == 0
    one, other = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "run")
    )
    assert one == other
    summary = json.loads((tmp_path / "run/finetune.json").read_text())
    assert summary["after"]["loss"] == whole.after.loss
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows][-1] == 8


def test_a_run_that_was_killed_before_it_saved_begins_anew(folder, tmp_path):
    def killed(step: int) -> None:
        raise MemoryError

    options = {"steps": 2, "log_every": 1}
    with pytest.raises(MemoryError):
        tune(folder, tmp_path / "run", on_step=killed, **options)
    tune(folder, tmp_path / "run", resume=True, **options)
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]


@pytest.mark.parametrize("save_every", [None, 1])
def test_a_loss_that_is_not_finite_says_what_is_saved(folder, tmp_path, monkeypatch, save_every):
    def lost(step: int) -> None:
        monkeypatch.setattr(
            loop, "loss_sum", lambda *_: torch.tensor(torch.nan, requires_grad=True)
        )

    said = "nothing was saved before" if save_every is None else "what was saved before is in"
    with pytest.raises(NonFiniteError, match=f"step 2: the loss is nan; .*{said}"):
        tune(folder, tmp_path / "run", steps=3, save_every=save_every, on_step=lost)


def test_every_epoch_has_every_row_once_in_another_order(folder, tmp_path, monkeypatch):
    trained: list[Example] = []
    batch = Layout.batch

    def recorded(self, examples):
        if self.model.training:
            trained.extend(examples)
        return batch(self, examples)

    monkeypatch.setattr(Layout, "batch", recorded)
    tune(folder, tmp_path / "run", epochs=2, validation=0.8)
    first, second = trained[: len(trained) // 2], trained[len(trained) // 2 :]
    assert len(first) == 84 - 67
    assert first != second
    assert Counter(first) == Counter(second)


def test_a_run_is_resumed_with_its_own_data_only(folder, tmp_path):
    data = tmp_path / "rows.csv"
    data.write_text((folder / "rows.csv").read_text())
    options = {"data": str(data), "steps": 1, "lr": 1e-2}
    tune(folder, tmp_path / "run", **options)
    data.write_text(data.read_text().replace("animal", "beast"))
    with pytest.raises(ConfigError, match="data must be the same files"):
        tune(folder, tmp_path / "run", resume=True, **options)
    # and a refusal leaves the run as it was
    before = (tmp_path / "run/config.yaml").read_text()
    (tmp_path / "other.csv").write_text(data.read_text())
    with pytest.raises(ConfigError, match="data must be the same files"):
        tune(folder, tmp_path / "run", resume=True, **{**options, "data": f"{tmp_path}/other.csv"})
    assert (tmp_path / "run/config.yaml").read_text() == before
    with pytest.raises(ConfigError, match="steps must stay 1 to resume, got 2"):
        tune(folder, tmp_path / "run", resume=True, **{**options, "steps": 2})


def test_the_model_is_read_before_and_written_after_and_never_half(folder, tmp_path, monkeypatch):
    """A disk that fills while the tokenizer is written leaves the files that were there."""
    before = b""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def after_the_first_save(step: int) -> None:
        nonlocal before
        before = (tmp_path / "run/model.safetensors").read_bytes()
        monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", full)

    with pytest.raises(OSError, match="No space"):
        tune(folder, tmp_path / "run", steps=2, save_every=1, on_step=after_the_first_save)
    assert (tmp_path / "run/model.safetensors").read_bytes() == before
    assert not (tmp_path / "run/.new").exists()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "bloom", "mamba"])
def test_packed_and_padded_examples_are_as_alone(model_type):
    """Models that know no positions are padded; the loss and its gradient are those of examples
    read one by one."""
    model = hf_zoo.build(model_type)
    generator = torch.Generator().manual_seed(0)
    examples = []
    for length in (5, 9, 2):
        ids = torch.randint(3, hf_zoo.VOCABULARY, (length,), generator=generator)
        examples.append(Example(tuple(map(int, ids)), tuple(n >= 1 for n in range(length))))
    layout = Layout(model)
    assert (layout.why_padded is None) == (model_type not in ("bloom", "mamba"))

    def found(double: bool) -> tuple[torch.Tensor, ...]:
        inner = hf_zoo.in_double(model) if double else model
        alone = [inner(torch.tensor([e.ids]), use_cache=False).logits[0, :-1] for e in examples]
        loss = torch.nn.functional.cross_entropy(
            torch.cat(alone), torch.tensor([id for e in examples for id in e.ids[1:]]),
            reduction="sum",
        )  # fmt: skip
        return loss.detach(), *torch.autograd.grad(loss, [*inner.parameters()][:3])

    ours = loss_sum(layout, layout.batch(examples))
    got = (ours.detach(), *torch.autograd.grad(ours, [*model.parameters()][:3]))
    for actual, plain, truth in zip(got, found(False), found(True), strict=True):
        fastlm.testing.assert_as_accurate(model_type, actual, plain=plain, truth=truth, multiple=4)


def test_a_model_that_mixes_packed_examples_is_noticed(monkeypatch):
    model = hf_zoo.build("llama")
    forward = type(model).forward
    monkeypatch.setattr(
        type(model), "forward",
        lambda self, input_ids=None, position_ids=None, **rest: forward(self, input_ids, **rest),
    )  # fmt: skip
    assert "with the example before" in Layout(model).why_padded


def test_training_runs_our_operators(folder, tmp_path):
    log = OpLog()
    with log:
        tune(folder, tmp_path / "run", steps=2, batch_size=4, validation=0.05, lr=1e-2)
    ran = {name.removesuffix("_backward") for name in log.ran}
    assert {"causal_attention", "linear_cross_entropy"} <= {
        op for op in ("causal_attention", "linear_cross_entropy") if any(op in n for n in ran)
    }


@pytest.mark.parametrize("model_type", ["llama", "mamba"])
def test_labels_are_as_likely_as_their_tokens_one_by_one(model_type):
    model = hf_zoo.build(model_type)
    labels = [(7,), (8, 9), (8, 9, 10), (8, 11)]
    prompts = [(3, 4, 5), (6,), (3, 4, 5, 6, 7)]
    found = label_logprobs(Layout(model), prompts, labels)
    for row, prompt in enumerate(prompts):
        for column, label in enumerate(labels):
            ids = torch.tensor([[*prompt, *label]])
            with torch.no_grad():
                logprobs = model(ids).logits[0].double().log_softmax(-1)
            total = sum(logprobs[len(prompt) - 1 + i, id] for i, id in enumerate(label))
            torch.testing.assert_close(found[row, column], total, rtol=0, atol=1e-4)


def test_measuring_leaves_modes_and_gives_no_logits_but_those_asked_for(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama").train()
    fastlm.optimize(model)
    sizes = []
    model.lm_head.register_forward_hook(lambda m, args, out: sizes.append(out.shape))
    layout = Layout(model)
    sizes.clear()
    example = Example(tuple(range(3, 20)), (False,) * 16 + (True,), prompt=16, label=1)
    found = measure(layout, [example] * 3, labels=[(18,), (19,)])
    assert found.tokens == 3
    # of one last token each; and of the fused loss a number
    assert [tuple(size) for size in sizes] == [(), (1, 3, 320)]
    next_token(layout, hf_folders.tokenizer(), "x", [3, 4], 2)
    assert model.training
    assert model(torch.tensor([[3, 4]]), labels=torch.tensor([[3, 4]])).logits is None


def test_chunks_are_in_order_and_small():
    assert [list(c) for c in chunks("abcde", [3, 3, 9, 1, 1], 6)] == [["a", "b"], ["c"], ["d", "e"]]
    assert list(chunks([], [], 6)) == []
    # two ones beside the three are padded to it
    found = [list(c) for c in chunks("abcdef", [3, 1, 1, 1, 1, 9], 6, padded=True)]
    assert found == [["a", "b"], ["c", "d", "e"], ["f"]]


def test_what_is_padded_is_measured_in_parts_that_count_the_padding(monkeypatch):
    sizes = []
    layout = Layout(hf_zoo.build("mamba"))
    layout.model.register_forward_pre_hook(
        lambda m, args, given: sizes.append(given["input_ids"].numel()), with_kwargs=True
    )
    monkeypatch.setattr(measuring, "TOKENS", 24)
    lengths = (3, 3, 12, 3, 3, 3)
    examples = [
        Example(tuple(range(3, 3 + n)), (False,) + (True,) * (n - 1), n - 1, 0) for n in lengths
    ]
    measure(layout, examples, labels=[(7,), (8, 9, 10)])
    assert max(sizes) <= 24


@pytest.mark.slow
def test_accumulated_parts_are_one_step(folder, tmp_path):
    whole = tune(folder, tmp_path / "a", steps=2, lr=1e-2)
    parts = tune(folder, tmp_path / "b", steps=2, lr=1e-2, grad_accumulation=3)
    assert parts.after.loss == pytest.approx(whole.after.loss, rel=1e-4)


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_rows_without_labels_are_measured_by_perplexity(folder, tmp_path, kind):
    rows = {
        "text": {"text": "the cat sat on the mat " * 4},
        "messages": {"messages": [{"role": "user", "content": "who sat?"},
                                  {"role": "assistant", "content": "the cat"}]},
    }  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(10 * (json.dumps(rows[kind]) + "\n"))
    result = tune(
        folder, tmp_path / "run", data=str(tmp_path / "rows.jsonl"), steps=4, lr=1e-2,
        method="lora", max_length=16 if kind == "text" else 48,
    )  # fmt: skip
    assert result.before.accuracy is None
    assert result.after.perplexity < result.before.perplexity
    assert "| perplexity |" in (tmp_path / "run/report.md").read_text()


def test_what_a_user_can_put_right_is_one_line(folder, tmp_path, capsys):
    llama, rows = folder / "llama", folder / "rows.csv"
    (tmp_path / "one.csv").write_text("text,label\na,x\nb,x\n")
    (tmp_path / "few.csv").write_text("text,label\na,x\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/config.yaml").write_text("model: a\ndata: b\n")
    out = ("--out", tmp_path / "out")
    for code, said, *words in (
        (FAILED, "must have two labels, got only 'x'", llama, "--data", tmp_path / "one.csv", *out),
        (FAILED, "must have rows to train on beside", llama, "--data", tmp_path / "few.csv", *out),
        (FAILED, "config.json is missing", tmp_path / "empty", "--data", rows, *out),
        (FAILED, "no such folder", tmp_path / "absent", "--data", rows, *out),
        (FAILED, "cannot be read: No such file", llama, "--data", tmp_path / "absent.csv", *out),
        (USAGE, "a folder without a run", llama, "--data", rows, "--out", tmp_path / "taken"),
        (USAGE, "must be another folder than the model's", llama, "--data", rows, "--out", llama),
        (USAGE, "max_length must be at most 64", llama, "--data", rows, *out, "--max-length", 65),
        (USAGE, "last_n_layers must be at most 2, the model's blocks, got 3", llama, "--data", rows,
         *out, "--method", "last-n-layers", "--last-n-layers", 3),
        (USAGE, "device must be one of this machine's", llama, "--data", rows, *out, "--device",
         "cuda:99"),
        (USAGE, "did you mean --method?", llama, "--data", rows, "--metod", "lora"),
        (USAGE, "must hold the run to resume", "--out", tmp_path / "out", "--resume"),
    ):  # fmt: skip
        got, _, err = cli(capsys, "finetune", *words)
        lines = [line for line in err.splitlines() if line.startswith("fastlm: ")]
        assert (got, len(lines)) == (code, 1), (words, err)
        assert said in lines[0]
        # nothing was begun
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_no_run_are_not_replaced(folder, tmp_path, overwrite):
    """Another model, and a run of another program."""
    for name in ("config.json", "checkpoints/step-1.bin", "report.md", "tokenizer/mine.txt"):
        theirs = tmp_path / name
        theirs.parent.mkdir(exist_ok=True)
        theirs.write_text("mine")
        with pytest.raises(ConfigError, match=r"of the names that a run writes, got .* holds c"):
            tune(folder, tmp_path, steps=1, overwrite=overwrite)
        assert theirs.read_text() == "mine"
    if overwrite:
        (tmp_path / "config.yaml").write_text("layers: 3\n")
        with pytest.raises(ConfigError, match=r"holds checkpoints, config\.json, config\.yaml, \."):
            tune(folder, tmp_path, steps=1, overwrite=True)


def test_a_run_is_replaced_and_what_is_beside_it_stays(folder, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/mine.txt").write_text("mine")
    tune(folder, tmp_path, steps=1, method="lora")
    result = tune(folder, tmp_path, steps=1, overwrite=True, method="head")
    assert result.steps == 1
    assert not list(tmp_path.glob("adapter_*"))
    assert (tmp_path / "tokenizer/mine.txt").read_text() == "mine"


def test_a_tokenizer_with_several_chat_templates_is_saved_again(tmp_path):
    tokenizer = hf_folders.tokenizer({"default": hf_folders.TEMPLATE, "tools": "{{ messages }}"})
    model = hf_zoo.build("llama")
    for _ in range(2):
        write_model(model, tokenizer, tmp_path)
    assert [path.name for path in tmp_path.glob("additional_chat_templates/*")] == ["tools.jinja"]


def test_a_tokenizer_that_begins_and_ends_no_text(folder, tmp_path, capsys):
    import shutil

    model, rows = tmp_path / "llama", tmp_path / "rows.jsonl"
    shutil.copytree(folder / "llama", model)
    tokenizer = hf_folders.tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(model)
    words = ("finetune", model, "--data", rows, "--out", tmp_path / "run", "--steps", 1)
    rows.write_text(4 * '{"prompt": "", "completion": "the cat"}\n')
    code, _, err = cli(capsys, *words)
    assert code == FAILED
    assert "rows.jsonl:1: prompt must not be empty: the tokenizer has no token" in err
    rows.write_text(4 * '{"prompt": "on", "completion": "the cat"}\n')
    assert "finetune: prompt must not be empty" in cli(capsys, *words, "--prompt", "")[2]
    code, said, _ = cli(capsys, *words)
    assert code == 0
    assert "no end is learned" in said


def test_weights_that_a_file_lacks_are_not_made_up(folder, tmp_path, capsys):
    import safetensors.torch

    for path in (folder / "llama").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del state["model.norm.weight"]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    code, _, err = cli(capsys, "finetune", tmp_path, "--data", folder / "rows.csv")
    assert code == FAILED
    assert "the weights have no model.norm.weight" in err.splitlines()[-1]


def test_settings_in_a_file(folder, tmp_path, capsys):
    file = tmp_path / "settings.yaml"
    file.write_text(f"model: {folder / 'llama'}\ndata: {folder / 'rows.csv'}\nsteps: 1\nlr: 1e-2\n")
    out = tmp_path / "run"
    words = ("finetune", "--config", file, "--out", out, "--method", "head")
    validation = tmp_path / "other rows.csv"
    validation.write_text((folder / "rows.csv").read_text())
    code, said, _ = cli(capsys, *words, "--validation-data", validation)
    assert code == 0
    assert said.splitlines()[-2:] == ["go on with:", f"  fastlm eval {out} --data '{validation}'"]
    # a run that goes on takes from it what the file does not say
    file.write_text("log_every: 3\nlr: 2e-2\n")
    assert cli(capsys, "finetune", "--config", file, "--out", out, "--resume")[0] == 0
    settings = (out / "config.yaml").read_text()
    assert "log_every: 3\n" in settings
    assert "lr: 0.02\n" in settings
    assert "method: head\n" in settings
    file.write_text(f"out: {out}\nresume: true\nsteps: 2\n")
    said = cli(capsys, "finetune", "--config", file)[2]
    assert "steps must stay 1 to resume, got 2" in said
    file.write_text("data: x\n")
    assert "must name the model" in cli(capsys, "finetune", "--config", file)[2]
    file.write_text("model: x\ndata: x\nmetod: lora\n")
    assert "did you mean method?" in cli(capsys, "finetune", "--config", file)[2]
