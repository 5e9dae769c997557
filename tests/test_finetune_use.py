"""What becomes of a fine-tuned model: exported, evaluated, opened by others."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from support import hf_folders

import fastlm
from fastlm.cli import FAILED, USAGE, main
from fastlm.finetuning import export as exporting
from fastlm.finetuning.evaluate import evaluate_rows, evaluate_text
from fastlm.finetuning.export import ExportError, export

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, rows with columns of other names, an adapter trained on them, a model likewise."""
    folder = tmp_path_factory.mktemp("used")
    hf_folders.write_model(folder / "llama")
    rows = [(f"{i} cat", "animal") for i in range(12)] + [(f"{i} on", "tool") for i in range(12)]
    (folder / "rows.csv").write_text("said,kind\n" + "".join(f"{t},{n}\n" for t, n in rows))
    for method in ("lora", "head"):
        config = fastlm.FinetuneConfig(
            str(folder / "llama"), str(folder / "rows.csv"), str(folder / method), method=method,
            text_column="said", label_column="kind", label_prompt=" is", steps=6, lr=2e-2,
            validation_data=str(folder / "rows.csv"), device="cpu",
        )  # fmt: skip
        fastlm.finetune(config)
    return folder


def cli(capsys, *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(20)[None]).logits


def opened(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_a_merged_adapter_is_a_model_without_peft(folder, tmp_path, capsys, monkeypatch):
    code, said, _ = cli(capsys, "export", folder / "lora", "--merge", "--out", tmp_path / "merged")
    assert code == 0
    assert "merged in float32; opened again, log-probabilities differ" in said
    adapted = logits(peft.PeftModel.from_pretrained(opened(folder / "llama"), folder / "lora"))
    monkeypatch.setitem(sys.modules, "peft", None)
    merged = logits(opened(tmp_path / "merged"))
    assert not torch.equal(merged, logits(opened(folder / "llama")))
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-4)
    # and one that fastlm opens
    torch.testing.assert_close(
        fastlm.load(tmp_path / "merged").model(torch.arange(20)[None]).logits, merged,
        rtol=0, atol=1e-4,
    )  # fmt: skip
    assert not list((tmp_path / "merged").glob("adapter*"))


def test_merged_weights_are_of_the_dtype_that_is_asked_for(folder, tmp_path):
    done = export(folder / "lora", tmp_path / "narrow", merge=True, dtype="bfloat16")
    assert done.dtype == "bfloat16"
    assert 0 < done.error < 1
    assert json.loads((tmp_path / "narrow/config.json").read_text())["dtype"] == "bfloat16"


def test_a_folder_that_opens_as_something_else_is_noticed(folder, tmp_path, monkeypatch):
    def forgets_the_adapter(model, tokenizer, out):
        opened(folder / "llama").save_pretrained(out)
        tokenizer.save_pretrained(out)

    monkeypatch.setattr(exporting, "write_model", forgets_the_adapter)
    with pytest.raises(ExportError, match="is not the model that was written"):
        export(folder / "lora", tmp_path / "merged", merge=True)


def test_a_run_is_exported_without_what_it_was_trained_with(folder, capsys):
    assert cli(capsys, "export", folder / "head")[0] == 0
    names = {path.name for path in (folder / "head/export").iterdir()}
    assert names == {
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert torch.equal(logits(opened(folder / "head/export")), logits(opened(folder / "head")))
    assert cli(capsys, "export", folder / "lora")[0] == 0
    names = {path.name for path in (folder / "lora/export").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names


def test_what_cannot_be_exported_is_one_line(folder, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("keep me")
    for said, *words in (
        ("merge must have an adapter", folder / "head", "--merge", "--out", tmp_path / "out"),
        ("must be a new or an empty folder", folder / "head", "--out", tmp_path / "full"),
        ("out must be given for", folder / "llama"),
    ):
        code, _, err = cli(capsys, "export", *words)
        assert (code, len(err.splitlines())) == (USAGE, 1)
        assert said in err
    assert (tmp_path / "full/mine.txt").read_text() == "keep me"
    assert not (folder / "llama/export").exists()


def test_a_merged_model_that_overflows_is_no_success(folder, tmp_path, capsys):
    """A weight that float16 cannot hold."""
    base, lora = tmp_path / "base", tmp_path / "lora"
    model = opened(folder / "llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(1e5)
    model.save_pretrained(base)
    hf_folders.tokenizer().save_pretrained(base)
    lora.mkdir()
    for path in (folder / "lora").glob("adapter_*"):
        (lora / path.name).write_bytes(path.read_bytes())
    settings = json.loads((lora / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(base)
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    words = ("export", lora, "--merge", "--dtype", "float16", "--out", tmp_path / "out")
    code, _, err = cli(capsys, *words)
    assert code == FAILED
    assert f"{tmp_path / 'out'} gives log-probabilities that are not finite: float16" in err


def test_every_file_of_a_tokenizer_is_exported(folder, tmp_path):
    for name in ("vocab.json", "special_tokens_map.json", "additional_chat_templates/a.jinja"):
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "model" / name).write_text("{}")
    for path in (folder / "llama").iterdir():
        if path.is_file():
            (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    export(tmp_path / "model", tmp_path / "out")
    names = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")}
    assert {"vocab.json", "special_tokens_map.json", "additional_chat_templates/a.jinja"} <= names


def test_an_adapter_says_how_it_becomes_a_model(folder, capsys):
    lora = folder / "lora"
    code, _, err = cli(capsys, "next", lora, "a")
    assert (code, f"fastlm export {lora} --merge" in err) == (FAILED, True)
    words = ("finetune", lora, "--data", folder / "rows.csv", "--out", folder / "no")
    assert f"fastlm export {lora} --merge" in cli(capsys, *words)[2]


def test_rows_are_read_as_they_were_for_the_run(folder, capsys):
    code, said, _ = cli(capsys, "eval", folder / "lora", "--data", folder / "rows.csv", "--json")
    assert code == 0
    found, told = json.loads(said), json.loads((folder / "lora/finetune.json").read_text())
    for name in ("rows", "tokens", "accuracy"):
        assert found[name] == told["after"][name]
    assert found["loss"] == pytest.approx(told["after"]["loss"], rel=1e-5)
    assert found["labels"]["animal"]["rows"] == 12


def test_eval_tells_what_it_does_not_read(folder, tmp_path, capsys):
    rows = tmp_path / "rows.csv"
    rows.write_text("text,kind\nthe cat,animal\n")
    code, said, _ = cli(capsys, "eval", folder / "llama", "--data", rows)
    assert (code, "only the field text is read, not kind" in said) == (0, True)
    code, said, err = cli(capsys, "eval", folder / "llama", "--data", rows, "--label-column", "no")
    assert (code, said) == (FAILED, "")
    assert "must have the field 'no' of --label-column, got 'text', 'kind'" in err


def test_accuracy_is_by_the_likeliest_label(folder):
    """As one computes it by hand, row by row."""
    model = opened(folder / "llama").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "llama")
    right = 0
    with (folder / "rows.csv").open() as stream:
        for row in csv.DictReader(stream):
            prompt = tokenizer.encode(row["said"] + " is")
            scores = {}
            for label in ("animal", "tool"):
                ids = tokenizer.encode(f" {label}", add_special_tokens=False)
                with torch.no_grad():
                    logprobs = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
                at = range(len(prompt) - 1, len(prompt) + len(ids) - 1)
                scores[label] = sum(logprobs[i, id] for i, id in zip(at, ids, strict=True))
            right += max(scores, key=scores.get) == row["kind"]
    found = evaluate_rows(
        folder / "llama", folder / "rows.csv", text_column="said", label_column="kind",
        label_prompt=" is",
    )  # fmt: skip
    assert found.measured.accuracy == right / 24
    assert sum(right for _, right in found.labels.values()) == right
    assert found.guess == 0.5


def test_labels_of_the_run_count_where_a_file_has_fewer(folder, tmp_path):
    rows = (folder / "rows.csv").read_text().splitlines()
    (tmp_path / "few.csv").write_text("\n".join(rows[:5]) + "\n")
    found = evaluate_rows(folder / "lora", tmp_path / "few.csv")
    assert set(found.labels) == {"animal", "tool"}
    assert found.labels["tool"] == (0, 0)


def test_a_text_has_one_perplexity_whoever_reads_it(folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, then the cat sat again. " * 8)
    _, said, _ = cli(capsys, "eval", folder / "llama", text, "--window", 20, "--json")
    ours = json.loads(said)
    loss, tokens = evaluate_text(folder / "llama", text.read_text(), window=20)
    assert tokens == ours["tokens"]
    assert loss == pytest.approx(ours["loss"], rel=1e-5)
    # of an adapter, and of a type that fastlm.load does not open
    code, said, _ = cli(capsys, "eval", folder / "lora", text, "--json")
    assert code == 0
    assert json.loads(said)["loss"] != ours["loss"]
    hf_folders.write_model(tmp_path / "gemma", "gemma2")
    code, said, _ = cli(capsys, "eval", tmp_path / "gemma", text, "--json")
    assert code == 0
    assert json.loads(said)["perplexity"] > 1


def test_eval_is_of_a_text_or_of_rows(folder, tmp_path, capsys):
    lora, rows = folder / "lora", folder / "rows.csv"
    for said, *words in (
        ("text or --data must be given", lora),
        ("and not both", lora, rows, "--data", rows),
        ("weights and window are of a text", lora, "--data", rows, "--weights", "int8"),
        ("weights must be float for a model that", lora, rows, "--weights", "int8"),
        ("window must be in [1, 64]", lora, rows, "--window", 65),
    ):
        code, _, err = cli(capsys, "eval", *words)
        assert (code, len(err.splitlines())) == (USAGE, 1), err
        assert said in err
