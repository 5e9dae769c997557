"""Training that was stopped, in any way, goes on bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.children import start_child

import fastlm
from fastlm.training import loop
from fastlm.training.checkpoint import (
    MODEL,
    OPTIMIZER,
    CheckpointError,
    CheckpointWarning,
    load_latest,
)

STEPS = 12
TEXT = "".join(f"{n} times {n} is {n * n}, and {n} plus {n} is {2 * n}.\n" for n in range(400))


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A run of 12 tiny steps, three micro-batches each, saved at every other, without a report."""
    monkeypatch.setattr(loop, "write_report", lambda *_: [])
    (tmp_path / "corpus.txt").write_text(TEXT)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {
        "data": str(tmp_path / "corpus.txt"),
        "tokenizer": "char",
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "context": 16,
        "short_context": 8,
        "batch_size": 2,
        "grad_accumulation": 3,
        "steps": STEPS,
        "warmup": 3,
        "schedule": "cosine",
        "eval_every": 4,
        "eval_tokens": 64,
        "save_every": 2,
        "log_every": 1,
        "keep": 3,
        "weight_decay": 0.1,
        "device": "cpu",
    }
    torch.set_num_threads(threads)


class Crash(Exception):
    pass


def crash(step: int) -> Callable[[int], None]:
    def on_step(done: int) -> None:
        if done == step:
            raise Crash

    return on_step


def signalled(step: int, number: signal.Signals) -> Callable[[int], None]:
    def on_step(done: int) -> None:
        if done == step:
            os.kill(os.getpid(), number)

    return on_step


def outcome(out: Path) -> tuple[Any, ...]:
    """Everything that must not depend on an interruption, as bytes where it is a file."""
    final = out / "checkpoints" / f"step-{STEPS:06d}"
    timeless = [
        {k: v for k, v in json.loads(line).items() if k not in ("elapsed_s", "tok_per_sec")}
        for line in (out / "metrics.jsonl").read_text().splitlines()
    ]
    files = (final / MODEL, final / OPTIMIZER, out / MODEL, out / "config.json")
    return timeless, *(path.read_bytes() for path in files)


@pytest.fixture
def uninterrupted(settings: dict[str, Any], tmp_path: Path) -> tuple[Any, ...]:
    fastlm.train(fastlm.TrainConfig(**settings, out=str(tmp_path / "whole")))
    return outcome(tmp_path / "whole")


def start_and_resume(
    settings: dict[str, Any], out: Path, on_step: Callable[[int], None], ends: type[BaseException]
) -> None:
    with pytest.raises(ends):
        fastlm.train(fastlm.TrainConfig(**settings, out=str(out)), on_step=on_step)
    torch.manual_seed(random.randrange(2**31))
    fastlm.train(fastlm.TrainConfig(**settings, out=str(out), resume="latest"))


def check_crashes(settings: dict[str, Any], folder: Path, steps: Iterable[int]) -> None:
    fastlm.train(fastlm.TrainConfig(**settings, out=str(folder / "whole")))
    expected = outcome(folder / "whole")
    for step in steps:
        start_and_resume(settings, folder / f"crash{step}", crash(step), Crash)
        assert outcome(folder / f"crash{step}") == expected, f"after a crash at step {step}"


def check_sigterm(
    settings: dict[str, Any], folder: Path, expected: tuple[Any, ...], steps: Iterable[int]
) -> None:
    for step in steps:
        out = folder / f"term{step}"
        start_and_resume(settings, out, signalled(step, signal.SIGTERM), SystemExit)
        assert outcome(out) == expected, f"after SIGTERM at step {step}"


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resuming_after_a_crash_changes_no_bit(
    optimizer: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    # before the first checkpoint; in the short sequences; in the long ones
    check_crashes({**settings, "optimizer": optimizer}, tmp_path, (1, 5, 11))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resuming_after_a_crash_at_any_step_changes_no_bit(
    optimizer: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    check_crashes({**settings, "optimizer": optimizer}, tmp_path, range(1, STEPS + 1))


def test_resuming_after_sigterm_changes_no_bit(
    settings: dict[str, Any], tmp_path: Path, uninterrupted: tuple[Any, ...]
) -> None:
    check_sigterm(settings, tmp_path, uninterrupted, (3, 10))


@pytest.mark.slow
def test_resuming_after_sigterm_at_any_step_changes_no_bit(
    settings: dict[str, Any], tmp_path: Path, uninterrupted: tuple[Any, ...]
) -> None:
    check_sigterm(settings, tmp_path, uninterrupted, range(1, STEPS))


def test_signal_saves_this_step_and_says_how_to_go_on(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a folder"
    with pytest.raises(KeyboardInterrupt):
        config = fastlm.TrainConfig(**settings, out=str(out))
        fastlm.train(config, on_step=signalled(3, signal.SIGINT))
    said = capsys.readouterr()
    command = f"fastlm train --out '{out}' --resume latest"
    assert f"step 3; go on with: {command}" in said.out
    assert "SIGINT: saving after this step" in said.err
    assert load_latest(out / "checkpoints").step == 3


def test_resuming_after_sigkill_changes_no_bit(
    settings: dict[str, Any], tmp_path: Path, uninterrupted: tuple[Any, ...]
) -> None:
    for step in (2, 11):
        out = tmp_path / f"kill{step}"
        config = fastlm.TrainConfig(**settings, out=str(out))
        child = start_child(
            lambda c=config, s=step: fastlm.train(c, on_step=signalled(s, signal.SIGKILL))
        )
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        fastlm.train(fastlm.TrainConfig(**settings, out=str(out), resume="latest"))
        assert outcome(out) == uninterrupted, f"after SIGKILL at step {step}"


def test_resuming_twice_changes_no_bit(
    settings: dict[str, Any], tmp_path: Path, uninterrupted: tuple[Any, ...]
) -> None:
    out = tmp_path / "twice"
    with pytest.raises(Crash):
        fastlm.train(fastlm.TrainConfig(**settings, out=str(out)), on_step=crash(5))
    start_again = fastlm.TrainConfig(**settings, out=str(out), resume="latest")
    with pytest.raises(KeyboardInterrupt):
        fastlm.train(start_again, on_step=signalled(9, signal.SIGINT))
    fastlm.train(start_again)
    assert outcome(out) == uninterrupted
    # resuming what has ended trains nothing and says the same
    fastlm.train(start_again)
    assert outcome(out) == uninterrupted


def test_damaged_newest_is_named_and_the_one_before_goes_on(
    settings: dict[str, Any], tmp_path: Path, uninterrupted: tuple[Any, ...]
) -> None:
    out = tmp_path / "damaged"
    with pytest.raises(Crash):
        fastlm.train(fastlm.TrainConfig(**settings, out=str(out)), on_step=crash(9))
    weights = out / "checkpoints" / "step-000008" / MODEL
    weights.write_bytes(weights.read_bytes()[:-1])
    resumed = fastlm.TrainConfig(**settings, out=str(out), resume="latest")
    with pytest.warns(CheckpointWarning, match=r"step-000008: model.*using step-000006"):
        fastlm.train(resumed)
    assert outcome(out) == uninterrupted


def test_resuming_by_name(
    settings: dict[str, Any], tmp_path: Path, uninterrupted: tuple[Any, ...]
) -> None:
    out = tmp_path / "named"
    fastlm.train(fastlm.TrainConfig(**settings, out=str(out)))
    fastlm.train(fastlm.TrainConfig(**settings, out=str(out), resume="step-000010"))
    assert outcome(out) == uninterrupted
    with pytest.raises(CheckpointError, match=r"must hold step-000099 .*, got step-000012, step-"):
        fastlm.train(fastlm.TrainConfig(**settings, out=str(out), resume="step-000099"))


def test_tied_weights_stay_tied(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["tie_word_embeddings"] = True
    fastlm.train(fastlm.TrainConfig(**settings, out=str(tmp_path / "whole")))
    start_and_resume(settings, tmp_path / "crash", crash(7), Crash)
    assert outcome(tmp_path / "crash") == outcome(tmp_path / "whole")
    model = fastlm.load(tmp_path / "crash").model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_second_signal_stops_at_once(settings: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "twice"
    settings["save_every"] = 100

    def two_signals(done: int) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    config = fastlm.TrainConfig(**settings, out=str(out))
    _, status = os.waitpid(start_child(lambda: fastlm.train(config, on_step=two_signals)), 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
    assert not (out / "checkpoints").exists()


def test_a_bad_corpus_leaves_the_run_it_was_to_replace(tmp_path):
    out, good, bad = tmp_path / "run", tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("to be or not to be, that is the question. " * 60)
    bad.write_bytes(b"to be \xff not to be " * 60)
    sizes = dict(
        tokenizer="char", context=16, batch_size=2, num_hidden_layers=1, hidden_size=16,
        num_attention_heads=2, intermediate_size=16, steps=2, device="cpu",
    )  # fmt: skip
    fastlm.train(fastlm.TrainConfig(data=str(good), out=str(out), **sizes))
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="UTF-8"):
        fastlm.train(fastlm.TrainConfig(data=str(bad), out=str(out), overwrite=True, **sizes))
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_fewer_steps_than_the_run_has_are_refused(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 60)
    config = fastlm.TrainConfig(
        data=str(text), out=str(tmp_path / "run"), tokenizer="char", context=16, batch_size=2,
        num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16, steps=3,
        device="cpu",
    )  # fmt: skip
    fastlm.train(config)
    with pytest.raises(ValueError, match="steps must be at least 3, where the run is, got 2"):
        fastlm.train(dataclasses.replace(config, steps=2, warmup=1, resume="latest"))
    assert "steps: 3" in (tmp_path / "run" / "config.yaml").read_text()
