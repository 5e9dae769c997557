"""``fastlm train`` as a user runs it: going on with a run, a closed pipe, a full disk."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.disk import files_of_at_most

import fastlm
from fastlm.cli import FAILED, PIPE_CLOSED, USAGE, main
from fastlm.training import loop
from fastlm.training.checkpoint import load_latest
from fastlm.training.config_file import read_config

TEXT = "the cat sat on the mat and the dog sat on the log\n" * 400
TINY = ("--tokenizer", "char", "--steps", "4", "--context", "16", "--batch-size", "2",
        "--num-hidden-layers", "1", "--hidden-size", "32", "--num-attention-heads", "2",
        "--intermediate-size", "32", "--eval-tokens", "64", "--save-every", "2",
        "--device", "cpu")  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a corpus and, in run, four steps of a run."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "corpus.txt").write_text(TEXT)
    assert train("--data", folder / "corpus.txt", "--out", folder / "run", *TINY) == 0
    return folder


@pytest.fixture
def out(trained, tmp_path, monkeypatch) -> Path:
    """A copy of the run, so that the config in it names another folder."""
    monkeypatch.setattr(loop, "write_report", lambda *_: [])
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path / "run"


def train(*words: object) -> int:
    return main(["train", *map(str, words)])


def step(out: Path) -> int:
    return load_latest(out / "checkpoints").step


def failure(capsys, *words: object) -> tuple[int, str]:
    """Exit code and the one line on stderr."""
    capsys.readouterr()
    code = train(*words)
    (line,) = capsys.readouterr().err.splitlines()
    return code, line


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- going on


def test_resuming_keeps_the_settings_of_the_run(out):
    before = read_config(out / "config.yaml")
    assert train("--out", out, "--resume", "latest", "--steps", "6", "--eval-every=3") == 0
    after = read_config(out / "config.yaml")
    changed = {k for k, v in before.to_dict().items() if v != after.to_dict()[k]}
    assert changed == {"out", "steps", "eval_every"}
    assert (after.out, after.steps, after.eval_every) == (str(out), 6, 3)
    assert step(out) == 6


def test_a_copied_run_goes_on_where_it_lies(out, trained):
    original = contents(trained / "run")
    assert train("--config", out / "config.yaml", "--resume", "latest", "--steps", "5") == 0
    assert step(out) == 5
    assert contents(trained / "run") == original


def test_the_run_of_the_folder_one_stands_in_goes_on(out, monkeypatch):
    monkeypatch.chdir(out)
    assert train("--config", "config.yaml", "--resume", "latest", "--steps", "5") == 0
    assert step(out) == 5


def test_a_settings_file_stands_between_the_run_and_the_flags(out, tmp_path):
    (tmp_path / "more.yaml").write_text(f"out: {out}\nresume: latest\nsteps: 9\nlr: 0.5\n")
    assert train("--config", tmp_path / "more.yaml", "--steps", "5") == 0
    after = read_config(out / "config.yaml")
    assert (after.steps, after.lr, after.hidden_size) == (5, 0.5, 32)
    assert step(out) == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hidden-size", "64"], "hidden_size must stay 32 to resume, got 64"),
        (["--size", "micro"], "size must stay 'nano' to resume, got 'micro'"),
        (["--tokenizer", "bpe"], "tokenizer must stay 'char' to resume, got 'bpe'"),
        (["--data", "other.txt"], "to resume, got 'other.txt'"),
        (["--batch-size", "3"], "batch_size must stay 2 to resume, got 3"),
        (["--seed", "1"], "seed must stay 1337 to resume, got 1"),
        (["--steps", "3"], "steps must be at least 4, where the run is, got 3"),
        (["--overwrite"], "overwrite must be false to resume, got True"),
    ],
)
def test_what_a_run_cannot_change_is_refused_by_name(flags, message, out, capsys):
    before = contents(out)
    code, line = failure(capsys, "--out", out, "--resume", "latest", *flags)
    assert code == USAGE
    assert message in line
    assert contents(out) == before


def test_what_cannot_be_resumed_is_named(out, tmp_path, capsys):
    code, line = failure(capsys, "--out", tmp_path / "none", "--resume", "latest")
    assert (code, line) == (
        USAGE, f"fastlm: train: out must hold the run to resume, got {tmp_path}/none without one"
    )  # fmt: skip
    code, line = failure(capsys, "--out", out, "--resume", "step-000003")
    assert code == FAILED
    assert line.endswith("must hold step-000003 to resume it, got step-000004, step-000002")
    code, line = failure(capsys, "--out", out, "--resume", "newest")
    assert code == USAGE
    assert "resume must be latest or a checkpoint such as step-000500, got 'newest'" in line


def test_help_names_the_flags_of_every_field_and_config(capsys):
    with pytest.raises(SystemExit):
        train("--help")
    printed = capsys.readouterr().out
    assert "--config FILE" in printed and "--grad-accumulation" in printed
    assert "Raises" not in printed


# ---- a closed pipe


@pytest.mark.parametrize("both", [False, True], ids=["stdout", "stdout and stderr"])
def test_closed_pipe_saves_and_stops(both, out):
    flags = ["--out", str(out), "--resume", "latest", "--steps", "100000", "--eval-every", "1"]
    command = [sys.executable, "-P", "-m", "fastlm", "train", *flags]
    stderr = subprocess.STDOUT if both else subprocess.PIPE
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        while not process.stdout.readline().startswith("step"):
            assert process.poll() is None
        process.stdout.close()
        said = "" if both else process.stderr.read()
        assert process.wait(60) == PIPE_CLOSED
    if not both:
        assert said == "nobody reads the output any more: saving after this step\n"
    assert 4 < step(out) < 100_000
    assert not list((out / "checkpoints").glob(".*"))


# ---- a full disk


@pytest.mark.parametrize("most", [1000, 8000, 30_000])
def test_full_disk_keeps_the_checkpoints(most, out, capsys):
    before = contents(out / "checkpoints")
    resumed = ("--out", out, "--resume", "latest", "--steps", "6")
    with files_of_at_most(most):
        code, line = failure(capsys, *resumed)
    assert code == FAILED
    assert "File too large" in line
    assert contents(out / "checkpoints").items() >= before.items()
    assert fastlm.load(out).generate("the ", 3)
    assert train(*resumed) == 0
    assert step(out) == 6


def test_full_disk_keeps_the_run_that_was_to_be_replaced(out, trained, capsys):
    before = contents(out)
    data = ("--data", trained / "corpus.txt", "--out", out, "--overwrite")
    with files_of_at_most(8000):
        code, line = failure(capsys, *data, *TINY)
    assert (code, line) == (FAILED, "fastlm: File too large")
    assert contents(out) == before
