"""The command line: what it prints and returns, and one clear line for what users get wrong."""

from __future__ import annotations

import importlib
import inspect
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.models import tiny_config

import fastlm
from fastlm.cli import COMMANDS, FAILED, INTERRUPTED, PIPE_CLOSED, USAGE, doctor, main
from fastlm.cli.generate import GenerateOptions
from fastlm.inference import language_model, next_token
from fastlm.inference.language_model import LanguageModel
from fastlm.training.config_file import read_config

TEXT = "the cat sat on the mat and the dog sat on the log\n" * 400
TINY = ("--tokenizer", "char", "--steps", "2", "--context", "16", "--batch-size", "2",
        "--num-hidden-layers", "1", "--hidden-size", "32", "--num-attention-heads", "2",
        "--intermediate-size", "32", "--eval-tokens", "64")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a corpus and, in run, a model trained on it for two steps."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "corpus.txt").write_text(TEXT)
    data = ("--data", str(folder / "corpus.txt"), "--out", str(folder / "run"))
    assert main(["train", *data, *TINY]) == 0
    return folder


@pytest.fixture
def run(folder) -> str:
    return str(folder / "run")


def failure(capsys, *argv: object) -> tuple[int, str]:
    """Exit code and the one line on stderr."""
    code = main([str(word) for word in argv])
    error = capsys.readouterr().err
    lines = error.splitlines()
    assert [line for line in lines if line.startswith("fastlm: ")] == lines[-1:], error
    assert "Traceback" not in error
    return code, lines[-1]


# ---- the command itself


@pytest.mark.parametrize("flag", ["--help", "-h", "help"])
def test_help_lists_the_commands(flag, capsys):
    assert main([flag]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastlm {fastlm.__version__}\n"


def test_no_command_shows_the_help_and_is_a_usage_error(capsys):
    assert main([]) == USAGE
    assert "usage: fastlm COMMAND" in capsys.readouterr().out


def test_unknown_command_names_the_nearest(capsys):
    assert failure(capsys, "trian") == (
        USAGE, "fastlm: there is no command 'trian', did you mean 'train'?"
    )  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_loads_no_torch(command):
    script = f"""
import sys
from fastlm.cli import main
try:
    main([{command!r}, "--help"])
except SystemExit as stop:
    assert stop.code == 0
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"usage: fastlm {command}" in done.stdout


# ---- flags


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--stpes", "3"], "did you mean --steps?"),
        (["train", "--steps", "many"], "invalid literal for int() with base 10: 'many'"),
        (["train", "--steps", "0"], "steps must be at least 1, got 0"),
        (["train", "--lr", "nan"], "lr must be above 0"),
        (["train", "--vocab-size", "100"], "vocab_size must be at least 257"),
        (["train", "--tokenizer", "words"], "'words'"),
        (["train", "--config"], "--config needs a value"),
        (["generate", "x"], "--prompt"),
        (["generate", "x", "--prompt", "y", "--temperature", "nan"], "temperature must be finite"),
        (["next", "x"], "STR"),
        (["next", "x", "y", "--plot", "z.foo"], "path must end in .png, .svg, .pdf, .jpg, got"),
        (["next", "x", "y", "--plto", "z.png"], "did you mean --plot?"),
        (["train", "--resume", "latest", "--out", "nowhere"], "out must hold the run to resume"),
        (["train", "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["train", "--steps", "-3"], "steps must be at least 1, got -3"),
        (["train", "--prompt", "\udcff"], "prompt must be text that UTF-8 can hold"),
        (["demo", "--steps", "0"], "steps must be at least 1, got 0"),
        (["doctor", "--jsn"], "did you mean --json?"),
    ],
)
def test_wrong_flags_are_one_line_and_code_2(argv, message, capsys):
    code, line = failure(capsys, *argv)
    assert code == USAGE
    assert message in line


def test_generate_offers_what_the_python_api_does():
    flags = {name: p.default for name, p in inspect.signature(GenerateOptions).parameters.items()}
    del flags["run"], flags["weights"], flags["group_size"]
    api = inspect.signature(LanguageModel.generate).parameters
    assert list(flags) == [name for name in api if name != "self"]
    assert flags.pop("stop") == ()
    assert all(api[name].default == default for name, default in flags.items())


def test_flags_override_the_config_file_and_all_values_are_saved(folder, capsys):
    settings = f"data: {folder / 'corpus.txt'}\nsteps: 1\nbatch_size: 3\nlr: 1e-3\n"
    (folder / "settings.yaml").write_text(settings)
    out = folder / "configured"
    command = ["train", "--config", str(folder / "settings.yaml"), "--out", str(out)]
    assert main([*command, *drop(TINY)]) == 0
    saved = read_config(out / "config.yaml")
    assert (saved.steps, saved.batch_size, saved.lr) == (2, 3, 1e-3)


def drop(flags: tuple[str, ...]) -> list[str]:
    """The flags without --batch-size and its value."""
    at = flags.index("--batch-size")
    return [*flags[:at], *flags[at + 2 :]]


def test_unknown_name_in_the_config_file_names_the_nearest(tmp_path, capsys):
    (tmp_path / "settings.yaml").write_text("stepz: 3\n")
    code, line = failure(capsys, "train", "--config", tmp_path / "settings.yaml")
    assert code == USAGE
    assert "did you mean steps?" in line


# ---- bad input


def test_bad_corpora_are_one_line(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("Ünicode\n".encode("latin-1") * 50)
    out = ("--out", tmp_path / "run")
    for name, message in {
        "missing.txt": "missing.txt",
        "empty.txt": "empty",
        "latin.txt": "UTF-8",
    }.items():
        code, line = failure(capsys, "train", "--data", tmp_path / name, *out)
        assert code == FAILED
        assert message in line


def test_out_that_is_a_file_is_one_line(folder, capsys):
    text = folder / "corpus.txt"
    assert failure(capsys, "train", "--data", text, "--out", text, *TINY) == (
        USAGE, f"fastlm: train: out must be a folder, got the file {text}"
    )  # fmt: skip
    assert text.read_text() == TEXT


def test_unwritable_run_folder_is_one_line(folder, capsys):
    blocked = folder / "corpus.txt" / "run"
    data = ("--data", folder / "corpus.txt")
    code, line = failure(capsys, "train", *data, "--out", blocked, *TINY)
    assert code == FAILED
    assert "corpus.txt" in line


def test_an_existing_run_is_never_overwritten(folder, run, capsys):
    before = {path: path.read_bytes() for path in Path(run).glob("*.*")}
    code, line = failure(capsys, "train", "--data", folder / "corpus.txt", "--out", run, *TINY)
    assert code == USAGE
    assert "run" in line
    assert {path: path.read_bytes() for path in Path(run).glob("*.*")} == before


@pytest.mark.parametrize("command", [["generate", "--prompt"], ["next"]])
def test_missing_model_is_one_line(command, tmp_path, capsys):
    name, *flag = command
    code, line = failure(capsys, name, tmp_path / "nothing", *flag, "x")
    assert code == FAILED
    assert "nothing" in line


def test_damaged_weights_are_one_line(folder, run, tmp_path, capsys):
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", run, copy], check=True)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, line = failure(capsys, "next", copy, "the ")
    assert code == FAILED
    assert "model.safetensors" in line


def test_prompt_longer_than_the_context_is_one_line(run, capsys):
    code, line = failure(capsys, "generate", run, "--prompt", "the cat sat on the mat")
    assert code == USAGE
    assert "context of 16 tokens, got 22" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "temperature must be a number of at least 0, got -1.0"),
        (["--max-new-tokens", "-1"], "max_new_tokens must be a whole number of at least 0, got -1"),
        (["--stop", ""], "stop must be strings that are not empty"),
        (["--seed", str(2**64)], "seed must be a whole number of 64 bits"),
        (["--prompt", "\udcff"], "text must be text that UTF-8 can hold"),
        (["--prompt", "☃"], "prompt must have at least one token, got none"),
    ],
)
def test_wrong_values_are_one_line_and_code_2(flags, message, run, capsys):
    code, line = failure(capsys, "generate", run, "--prompt", "the ", *flags)
    assert code == USAGE
    assert message in line


def test_an_unusable_picture_is_refused_before_the_model_is_read(run, monkeypatch, capsys):
    def read(*args, **kwargs):
        raise AssertionError("the model was read")

    monkeypatch.setattr(language_model, "load", read)
    assert failure(capsys, "next", run, "the ", "--plot", "x.foo")[0] == USAGE
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, line = failure(capsys, "next", run, "the ", "--plot", "x.png")
    assert (code, line) == (FAILED, "fastlm: plot needs matplotlib: pip install 'fastlm[plot]'")


def test_demo_refuses_a_long_prompt_before_training(folder, tmp_path, capsys):
    out = tmp_path / "demo"
    flags = ("--data", folder / "corpus.txt", "--out", out, "--prompt", "cat dog " * 300)
    code, line = failure(capsys, "demo", *flags)
    assert code == USAGE
    assert "prompt must fit in the context of 256 tokens, got " in line
    assert list(out.iterdir()) == []


# ---- commands


def test_generate_streams_what_the_python_api_returns(run, capsys):
    flags = ["--prompt", "the ", "--max-new-tokens", "5", "--temperature", "1", "--seed", "3"]
    assert main(["generate", run, *flags]) == 0
    wanted = fastlm.load(run).generate("the ", 5, temperature=1.0, seed=3)
    assert capsys.readouterr().out == f"the {wanted}\n"


def test_next_prints_bars_and_draws_them(run, tmp_path, capsys):
    picture = tmp_path / "next.png"
    assert main(["next", run, "the ", "--top-k", "3", "--plot", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "next token after 'the '"
    assert len(lines) == 5
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_next_as_json_holds_the_distribution(run, capsys):
    assert main(["next", run, "the ", "--top-k", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    probabilities = [row["prob"] for row in found["top_logprobs"]]
    assert len(probabilities) == 4
    assert probabilities == sorted(probabilities, reverse=True)


def test_output_survives_a_terminal_with_few_characters(run, monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    assert main(["next", run, "the "]) == 0


def test_demo_trains_samples_and_draws(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        # a second demo replaces the first
        assert main(["demo", "--steps", "1", "--data", str(folder / "corpus.txt")]) == 0
    printed = capsys.readouterr().out
    assert "next token after" in printed
    for name in ("model.safetensors", "loss.png", "next.png", "report.md"):
        assert (tmp_path / "runs" / "demo" / name).exists(), name


def test_demo_writes_over_no_run_but_its_own(run, capsys):
    code, _ = failure(capsys, "demo", "--out", run, "--steps", "2")
    assert code == USAGE


# ---- how a command ends


def test_ctrl_c_is_130(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupted)
    assert failure(capsys, "doctor") == (INTERRUPTED, "fastlm: interrupted")


BUGS = {
    json.JSONDecodeError: lambda: json.loads("{"),
    # raised by our own lines
    KeyError: lambda: doctor.example("no op", "cpu"),
    TypeError: lambda: next_token._bar(None, 3),
    AttributeError: lambda: fastlm.nothing,
    ValueError: lambda: fastlm.CausalLM(tiny_config())(torch.zeros(3)),
    RuntimeError: lambda: torch.ones(2) @ torch.ones(3),
}


@pytest.mark.parametrize("error", BUGS)
def test_a_bug_keeps_its_traceback(error, monkeypatch):
    monkeypatch.setattr(doctor, "run", lambda argv: BUGS[error]())
    with pytest.raises(error):
        main(["doctor"])


def test_a_missing_package_is_one_line(monkeypatch, capsys):
    def needy(argv):
        import a_package_that_is_not_there  # noqa: F401

    monkeypatch.setattr(doctor, "run", needy)
    assert failure(capsys, "doctor") == (
        FAILED,
        "fastlm: No module named 'a_package_that_is_not_there'; fastlm doctor says what is missing",
    )
    monkeypatch.setattr(doctor, "run", lambda argv: importlib.import_module("fastlm.nothing"))
    with pytest.raises(ModuleNotFoundError):
        main(["doctor"])


def test_closed_pipe_ends_quietly(run):
    command = [sys.executable, "-P", "-m", "fastlm", "generate", run, "--prompt", "the "]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (PIPE_CLOSED, "")


# ---- doctor


@pytest.fixture
def quick_doctor(monkeypatch):
    """Doctor with one op: the others take the same way."""
    functional = fastlm.functional
    monkeypatch.setattr(functional, "OPS", {"cross_entropy": fastlm.cross_entropy})


def test_doctor_finds_nothing_broken(quick_doctor, capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "nothing is broken" in printed
    assert "torch 2." in printed
    assert "extension fastlm._C is not built" in printed


def test_doctor_as_json_says_which_backend_serves_and_why_not_the_others(quick_doctor, capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    forward = report["backends"]["cpu"]["cross_entropy"]["forward"]
    assert forward["backend"] == "torch"
    assert "auto runs kernels on CUDA only" in forward["refusals"]["triton"]
    tested = {(row["backend"], row["device"]): row["result"] for row in report["self_test"]}
    assert tested["torch", "cpu"] == "ok"
    if os.environ.get("TRITON_INTERPRET") == "1":
        assert tested["triton", "cpu"] == "ok"


@pytest.mark.parametrize("step", ["forward", "backward"])
@pytest.mark.parametrize("backend", ["eager", "kernels"])
def test_doctor_finds_a_planted_wrong_kernel(backend, step, quick_doctor, monkeypatch, capsys):
    from fastlm.kernels import cross_entropy as kernels
    from fastlm.ops.eager import cross_entropy as eager

    module = {"eager": eager, "kernels": kernels}[backend]
    right = getattr(module, step)

    def wrong(*args):
        result = right(*args)
        (result[0] if isinstance(result, tuple) else result).mul_(1.0001)
        return result

    monkeypatch.setattr(module, step, wrong)
    assert main(["doctor"]) == FAILED
    printed = capsys.readouterr().out
    assert "KernelMismatch" in printed
    assert "BROKEN: cross_entropy on" in printed


def test_doctor_reports_a_crash_instead_of_crashing(quick_doctor, monkeypatch, capsys):
    from fastlm.ops.eager import cross_entropy as eager

    def crash(*args):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(eager, "forward", crash)
    assert main(["doctor"]) == FAILED
    assert "ZeroDivisionError: planted" in capsys.readouterr().out


def test_doctor_knows_an_example_of_every_op():
    for name in fastlm.functional.OPS:
        inputs, _ = doctor.example(name, "cpu")
        assert inputs
