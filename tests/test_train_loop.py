"""Training runs: settings, losses, gradients, bad numbers, and what a run leaves behind."""

from __future__ import annotations

import copy
import json
import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fastlm
from fastlm.training import loop
from fastlm.training.checkpoint import load_latest
from fastlm.training.config import ConfigError, TrainConfig
from fastlm.training.config_file import read_config, write_config
from fastlm.training.data import DataError
from fastlm.training.loop import IGNORE_INDEX, NonFiniteError, accumulate_gradients

TEXT = "".join(f"{n} times {n} is {n * n}, and {n} plus {n} is {2 * n}.\n" for n in range(400))
TINY: dict[str, Any] = {
    "tokenizer": "char",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "context": 32,
    "short_context": 16,
    "batch_size": 8,
    "steps": 8,
    "eval_tokens": 256,
    "log_every": 1,
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "write_report", lambda *_: [])


def tiny(folder: Path, text: str = TEXT, **changes: Any) -> TrainConfig:
    (folder / "corpus.txt").write_text(text, "utf-8")
    settings = {"data": str(folder / "corpus.txt"), "out": str(folder / "run"), **TINY, **changes}
    return TrainConfig(**settings)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


# ---- settings


@pytest.mark.parametrize(
    ("name", "value", "requirement"),
    [
        ("lr", -1.0, "be above 0 and at most 10"),
        ("lr", math.nan, "be above 0 and at most 10"),
        ("lr", "fast", "be a number"),
        ("embedding_lr", 0, "be above 0 and at most 10"),
        ("weight_decay", -0.1, "be at least 0 and at most 10"),
        ("steps", 0, "be at least 1"),
        ("steps", 1.5, "be a whole number"),
        ("steps", True, "be a whole number"),
        ("steps", None, "be a whole number"),
        ("warmup", 421, "be at most steps 420"),
        ("decay", 1.1, "be at least 0 and at most 1"),
        ("schedule", "square", "be one of linear, cosine"),
        ("tokenizer", "words", "be one of bpe, char"),
        ("size", "huge", "be one of nano, micro, mini, small"),
        ("optimizer", "sgd", "be one of muon, adamw"),
        ("dtype", "float16", "be one of auto, float32, bfloat16"),
        ("vocab_size", 256, "be at least 257 for byte-level BPE"),
        ("validation", 0.0, "be above 0 and at most 0.5"),
        ("validation", math.inf, "be above 0 and at most 0.5"),
        ("num_attention_heads", 3, "divide hidden_size 128"),
        ("resume", "newest", "be latest or a checkpoint such as step-000500"),
        ("resume", "../step-000500", "be latest or a checkpoint such as step-000500"),
        ("num_key_value_heads", 3, "divide num_attention_heads"),
        ("context", 0, "be at least 1"),
        ("short_context", 7, "divide context"),
        ("batch_size", -4, "be at least 1"),
        ("grad_accumulation", 0, "be at least 1"),
        ("grad_clip", -1.0, "be at least 0"),
        ("keep", 0, "be at least 1"),
        ("seed", -1, "be at least 0"),
        ("device", "tpu", "be auto, cpu, cuda or cuda:N"),
        ("compile", "yes", "be true or false"),
        ("out", "", "name a folder"),
        ("data", 3, "be text"),
    ],
)
def test_bad_setting_is_named_with_its_range(name: str, value: Any, requirement: str) -> None:
    with pytest.raises(ConfigError, match=rf"^train: {name} must {requirement}.*, got {value!r}$"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 2048}, "num_attention_heads must .* heads of even width, 512 at most"),
        ({"resume": "latest", "overwrite": True}, "overwrite must be false to resume, got True"),
        ({"prompt": "a\udcffb"}, r"prompt must be text that UTF-8 can hold, got '\\udcff' at .* 1"),
    ],
)
def test_settings_that_contradict_each_other_are_named(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^train: {message}"):
        TrainConfig(**settings)


@pytest.mark.parametrize("size", ["nano", "micro", "mini", "small"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resolved_settings_are_complete_and_stay_the_same(size: Any, optimizer: Any) -> None:
    resolved = TrainConfig(size=size, optimizer=optimizer).resolved()
    free = {name for name, value in resolved.to_dict().items() if value is None}
    assert free == {"data", "resume", "prompt"}
    assert resolved.resolved() == resolved


def test_explicit_shapes_win_over_the_preset() -> None:
    resolved = TrainConfig(size="small", hidden_size=96, num_attention_heads=6).resolved()
    assert (resolved.hidden_size, resolved.num_attention_heads) == (96, 6)
    assert (resolved.num_hidden_layers, resolved.num_key_value_heads) == (12, 6)


@pytest.mark.parametrize(("context", "short"), [(256, 64), (100, 25), (30, 6), (1, 1), (97, 97)])
def test_any_context_has_a_short_one(context: int, short: int) -> None:
    assert TrainConfig(context=context).resolved().short_context == short


def test_file_gives_back_the_settings(tmp_path: Path) -> None:
    config = TrainConfig(lr=3e-4, data="a: b.txt", seed=7).resolved()
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml").resolved() == config


def test_number_without_a_point_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("lr: 1e-3\n")
    assert read_config(tmp_path / "c.yaml").lr == 0.001


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"learning_rat: 1", "'learning_rat' is no setting"),
        (b"step: 1", r"'step' is no setting \(did you mean steps\?\)"),
        (b"lr: 1\nsteps: 2\nlr: 3", "'lr' appears twice, again on line 3"),
        (b"lr: [", "is not YAML"),
        (b"- lr", "must hold 'name: value' lines"),
        (b"", "must hold 'name: value' lines"),
        (b"lr: \xff", "is not UTF-8 at byte 4"),
        (b"lr: fast", "lr must be a number, got 'fast'"),
        (b"steps: 1e3", "steps must be a whole number"),
        (b"!!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_bad_file_is_refused_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as raised:
        read_config(tmp_path / "c.yaml")
    assert "\n" not in str(raised.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read: No such file"):
        read_config(tmp_path / "none.yaml")


def test_settings_load_without_torch() -> None:
    code = "import sys, fastlm; fastlm.TrainConfig(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- gradients


def ragged() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Micro-batches with 3, 1, 7 and no targets."""
    batches = []
    for rows_, length, counted in ((2, 4, 3), (1, 2, 1), (3, 5, 7), (2, 3, 0)):
        ids = torch.randint(19, (rows_, length))
        targets = torch.full_like(ids, IGNORE_INDEX)
        chosen = torch.randperm(ids.numel())[:counted]
        targets.view(-1)[chosen] = torch.randint(19, (counted,))
        batches.append((ids, targets))
    return batches


def small_model() -> fastlm.CausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    model = fastlm.CausalLM(fastlm.CausalLMConfig(vocab_size=19, num_hidden_layers=2, **sizes))
    return model.double()


def test_ragged_micro_batches_give_the_mean_over_all_targets() -> None:
    model = small_model()
    batches = ragged()
    loss = accumulate_gradients(model, batches)

    whole = copy.deepcopy(model)
    whole.zero_grad()
    logits = torch.cat([whole(ids).logits.flatten(0, 1) for ids, _ in batches])
    targets = torch.cat([targets.flatten() for _, targets in batches])
    expected = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-14)


def test_no_targets_at_all_give_zero_and_not_nan() -> None:
    model = small_model()
    ids = torch.randint(19, (2, 3))
    assert accumulate_gradients(model, [(ids, torch.full_like(ids, IGNORE_INDEX))]) == 0
    assert all((p.grad == 0).all() for p in model.parameters())


def test_accumulation_trains_as_the_larger_batch_does(tmp_path: Path, no_report: None) -> None:
    losses = []
    for name, batch_size, accumulation in (("a", 8, 1), ("b", 2, 4)):
        (tmp_path / name).mkdir()
        fastlm.train(tiny(tmp_path / name, batch_size=batch_size, grad_accumulation=accumulation))
        losses.append([row["loss"] for row in rows(tmp_path / name) if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# ---- learning


def unigram_entropy(text: str) -> float:
    counts = Counter(text)
    return -sum(n / len(text) * math.log(n / len(text)) for n in counts.values())


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_model_learns_what_text_has_and_noise_has_not(
    optimizer: str, tmp_path: Path, no_report: None
) -> None:
    noise = "".join(random.Random(0).sample(TEXT, len(TEXT)))
    losses = {}
    for name, text in (("text", TEXT), ("noise", noise)):
        (tmp_path / name).mkdir()
        lr = 0.02 if optimizer == "muon" else 0.01
        result = fastlm.train(tiny(tmp_path / name, text, steps=60, optimizer=optimizer, lr=lr))
        losses[name] = result.val_loss
    floor = unigram_entropy(TEXT)
    assert losses["text"] < 0.6 * floor
    assert losses["noise"] > 0.97 * floor


def test_bits_per_byte_counts_bytes_and_not_tokens(tmp_path: Path, no_report: None) -> None:
    text = TEXT.replace("times", "\u00d7\u6f22")
    result = fastlm.train(tiny(tmp_path, text))
    # evaluated over the whole held-out end: every target is a character but the last, end of text
    held_out = text[-(int((len(text) + 1) * 0.1) - 1) :]
    bytes_per_token = len(held_out.encode()) / (len(held_out) + 1)
    assert bytes_per_token > 1.05
    expected = result.val_loss / math.log(2) / bytes_per_token
    assert result.val_bpb == pytest.approx(expected, rel=0.01)


# ---- numbers that are not finite


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_weight_stops_the_run_and_keeps_the_last_checkpoint(
    value: float, tmp_path: Path, no_report: None
) -> None:
    def poison(step: int) -> None:
        if step == 4:
            with torch.no_grad():
                runs[0].model.model.norm.weight[0] = value

    runs: list[Any] = []
    original = loop._Run.advance

    def advance(run: Any, *args: Any) -> None:
        runs.append(run)
        original(run, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "advance", advance)
        with pytest.raises(NonFiniteError, match=r"step 5: the loss is nan; .*step-000004"):
            fastlm.train(tiny(tmp_path, save_every=2), on_step=poison)
    found = load_latest(tmp_path / "run/checkpoints")
    assert found.step == 4
    assert all(tensor.isfinite().all() for tensor in found.model.values())
    assert math.isfinite(fastlm.load(tmp_path / "run").score("1", " times").logprob)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_gradient_changes_no_weight(
    value: float, tmp_path: Path, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: list[dict[str, torch.Tensor]] = []
    original = loop.accumulate_gradients

    def spoiled(model: Any, micro_batches: Any) -> torch.Tensor:
        loss = original(model, micro_batches)
        before.append({n: p.detach().clone() for n, p in model.named_parameters()})
        models[:] = [model]
        if len(before) == 3:
            model.lm_head.weight.grad[1, 2] = value
        return loss

    models: list[Any] = []
    monkeypatch.setattr(loop, "accumulate_gradients", spoiled)
    with pytest.raises(NonFiniteError, match=r"step 3: the gradient norm is (nan|inf); .*no check"):
        fastlm.train(tiny(tmp_path, save_every=100))
    for name, parameter in models[0].named_parameters():
        assert torch.equal(parameter, before[2][name]), name


# ---- what a run leaves behind


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, loop.TrainResult]:
    folder = tmp_path_factory.mktemp("finished")
    return folder, fastlm.train(tiny(folder, prompt="7 times `7` is"))


def test_run_folder_is_complete(finished: tuple[Path, loop.TrainResult]) -> None:
    folder, result = finished
    assert result.out == folder / "run"
    assert {path.name for path in result.out.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "config.yaml", "env.json"),
        *("metrics.jsonl", "loss.png", "report.md", "checkpoints", "tokens"),
    }
    assert (result.out / "loss.png").read_bytes().startswith(b"\x89PNG")
    config = yaml.safe_load((result.out / "config.yaml").read_text())
    assert TrainConfig(**config).resolved().to_dict() == config


def test_rows_tell_the_run(finished: tuple[Path, loop.TrainResult]) -> None:
    folder, result = finished
    *steps, last = rows(folder)
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert [row["tokens"] for row in steps] == [256 * n for n in range(1, 9)]
    wanted = {"step", "tokens", "loss", "lr", "grad_norm", "tok_per_sec", "elapsed_s"}
    assert all(wanted <= row.keys() for row in steps)
    assert last["val_loss"] == result.val_loss
    assert (result.steps, result.tokens) == (8, 2048)
    seconds = [row["elapsed_s"] for row in rows(folder)]
    assert seconds == sorted(seconds)


def test_report_shows_settings_samples_and_next_tokens(
    finished: tuple[Path, loop.TrainResult],
) -> None:
    report = (finished[0] / "run/report.md").read_text()
    assert f"{finished[1].val_loss:.4f}" in report
    for part in ("## Samples", "## Next token", "| token | probability |", "num_hidden_layers: 2"):
        assert part in report


def test_report_of_a_run_in_this_folder_is_named_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fastlm.train(tiny(tmp_path, out=".", steps=1))
    assert (tmp_path / "report.md").read_text().startswith(f"# {tmp_path.name}\n")


def test_others_open_the_run_with_the_same_logits(finished: tuple[Path, loop.TrainResult]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = finished[0] / "run"
    theirs = AutoModelForCausalLM.from_pretrained(out)
    mine = fastlm.load(out)
    ids = AutoTokenizer.from_pretrained(out)("7 times 7 is", return_tensors="pt").input_ids
    assert ids.tolist() == [mine.encode("7 times 7 is")]
    with torch.no_grad():
        torch.testing.assert_close(mine.model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)


def test_random_numbers_of_the_caller_stay(tmp_path: Path, no_report: None) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fastlm.train(tiny(tmp_path, steps=2))
    assert torch.equal(torch.rand(3), expected)


def test_same_seed_same_run_other_seed_other_run(tmp_path: Path, no_report: None) -> None:
    losses = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        losses.append(fastlm.train(tiny(tmp_path / name, seed=seed, steps=3)).val_loss)
    assert losses[0] == losses[1] != losses[2]


def test_run_that_is_there_is_not_overwritten(tmp_path: Path, no_report: None) -> None:
    fastlm.train(tiny(tmp_path, steps=2))
    before = (tmp_path / "run/model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="out must be a folder without a run"):
        fastlm.train(tiny(tmp_path, steps=2, seed=9))
    assert (tmp_path / "run/model.safetensors").read_bytes() == before
    (tmp_path / "run/notes.txt").write_text("mine")
    fastlm.train(tiny(tmp_path, steps=2, seed=9, overwrite=True))
    assert (tmp_path / "run/model.safetensors").read_bytes() != before
    assert (tmp_path / "run/notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 64}, "hidden_size must stay 32 to resume, got 64"),
        ({"optimizer": "adamw"}, "optimizer must stay 'muon' to resume, got 'adamw'"),
        ({"qk_norm": False}, "qk_norm must stay True to resume, got False"),
        ({"data": None}, r"data must stay '.*corpus.txt' to resume, got None"),
        ({"data": "other.txt"}, r"data must stay '.*corpus.txt' to resume, got 'other.txt'"),
        ({"validation": 0.2}, r"validation must stay 0.1 to resume, got 0.2"),
        ({"batch_size": 4}, "batch_size must stay 8 to resume, got 4"),
        ({"grad_accumulation": 2}, "grad_accumulation must stay 1 to resume, got 2"),
        ({"short_context": 8}, "short_context must stay 16 to resume, got 8"),
        ({"seed": 2}, "seed must stay 1337 to resume, got 2"),
        ({"size": "micro"}, "size must stay 'nano' to resume, got 'micro'"),
    ],
)
def test_resuming_another_shape_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path, no_report: None
) -> None:
    fastlm.train(tiny(tmp_path, steps=2))
    with pytest.raises(ConfigError, match=message):
        fastlm.train(tiny(tmp_path, steps=2, resume="latest", **change))


def test_another_way_to_the_same_corpus_is_no_other_corpus(
    tmp_path: Path, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastlm.train(tiny(tmp_path, steps=2))
    monkeypatch.chdir(tmp_path)
    fastlm.train(tiny(tmp_path, steps=3, resume="latest", data="./corpus.txt"))


def test_damaged_metrics_are_named(tmp_path: Path, no_report: None) -> None:
    fastlm.train(tiny(tmp_path, steps=2))
    metrics = tmp_path / "run/metrics.jsonl"
    for damage in (b"\xff\n", b"{\n", b"3\n", b"{}\n"):
        metrics.write_bytes(metrics.read_bytes() + damage)
        with pytest.raises(DataError, match=r"metrics\.jsonl is damaged"):
            fastlm.train(tiny(tmp_path, steps=3, resume="latest"))
    metrics.unlink()
    fastlm.train(tiny(tmp_path, steps=3, resume="latest"))
    assert rows(tmp_path)[-1]["step"] == 3


@pytest.mark.parametrize("resume", [None, "latest"])
def test_prompt_longer_than_the_context_is_refused_before_training(
    resume: str | None, tmp_path: Path, no_report: None
) -> None:
    if resume:
        fastlm.train(tiny(tmp_path, steps=2))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="prompt must fit in the context of 32 tokens, got 33"):
        fastlm.train(tiny(tmp_path, prompt="7" * 33, resume=resume))
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert after == before | {tmp_path / "corpus.txt": TEXT.encode()}


def test_resuming_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"out must hold the run to resume, got .*run without one"
    ):
        fastlm.train(tiny(tmp_path, resume="latest"))


def test_bad_data_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must be a file or a folder"):
        fastlm.train(tiny(tmp_path, data=str(tmp_path / "none")))
    assert not (tmp_path / "run").exists()


def test_too_many_characters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"vocab_size must be at least .* characters .*, got 5"):
        fastlm.train(tiny(tmp_path, vocab_size=5))


def test_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="out must be a folder, got the file"):
        fastlm.train(tiny(tmp_path))


def test_folder_that_cannot_be_made_says_which(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="/proc/none"):
        fastlm.train(tiny(tmp_path, out="/proc/none/run"))


def test_missing_gpu_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device must be one of this machine's"):
        fastlm.train(tiny(tmp_path, device=f"cuda:{torch.cuda.device_count()}"))


def test_plain_lines_when_not_a_terminal(
    tmp_path: Path, no_report: None, capsys: pytest.CaptureFixture[str]
) -> None:
    fastlm.train(tiny(tmp_path))
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\r" not in said
    lines = said.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["corpus", "model", "train"]
    assert sum(line.startswith("step ") for line in lines) >= 5
    assert "s left" in said


def test_bfloat16_trains_too(tmp_path: Path, no_report: None) -> None:
    result = fastlm.train(tiny(tmp_path, dtype="bfloat16"))
    exact = fastlm.train(tiny(tmp_path, dtype="float32", overwrite=True))
    assert result.val_loss != exact.val_loss
    assert result.val_loss == pytest.approx(exact.val_loss, rel=0.02)


@pytest.mark.slow
# torch's own, on importing its compiler
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_compiled_model_trains_the_same(tmp_path: Path, no_report: None) -> None:
    eager = fastlm.train(tiny(tmp_path))
    compiled = fastlm.train(tiny(tmp_path, compile=True, overwrite=True))
    assert compiled.val_loss == pytest.approx(eager.val_loss, rel=1e-4)
