"""What the README shows works: its Python runs, its commands and flags exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastlm.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
COMMAND_FILES = [ROOT / "README.md", ROOT / "docs" / "benchmarking.md"]


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [
        line.partition("#")[0].strip()
        for path in COMMAND_FILES
        for block in blocks("bash", path.read_text())
        for line in block.splitlines()
    ]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """Where runs/demo holds a model, as after make demo."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "corpus.txt").write_text("import os\ndef main():\n    return 0\n" * 400)
    data = ["--data", str(folder / "corpus.txt"), "--out", str(folder / "runs/demo")]
    small = ["--steps", "1", "--tokenizer", "char", "--num-hidden-layers", "1"]
    assert main(["train", *data, *small]) == 0
    return folder


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code, run_folder, monkeypatch, capsys):
    monkeypatch.chdir(run_folder)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("fastlm ")])
def test_flags_of_fastlm_exist(command, capsys):
    _, name, *words = command.split()
    assert name in COMMANDS
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    offered = capsys.readouterr().out
    for flag in re.findall(r"--[\w-]+", " ".join(words)):
        assert flag in offered, command


@pytest.mark.parametrize("command", [c for c in commands() if re.search(r"benchmarks/\w+\.", c)])
def test_flags_of_benchmarks_exist(command):
    words = command.split()
    script = ROOT / next(word for word in words if word.startswith("benchmarks/"))
    assert script.exists()
    # run.py hands over; the help of the others would take seconds to import torch
    offered = script.read_text()
    if script.name == "run.py":
        offered += script.with_name("_options.py").read_text()
    for flag in re.findall(r"--[\w-]+", command):
        assert flag in offered, command


def test_targets_of_make_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = {word for word in re.findall(r"make (?:PYTHON=\S+ )?([a-z-]+)", TEXT)}
    assert {"demo", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_begins_with_the_two_commands():
    assert [line.split("#")[0].strip() for line in blocks("bash")[0].splitlines()] == [
        "make demo", "make test",
    ]  # fmt: skip


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), target
