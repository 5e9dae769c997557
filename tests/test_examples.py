"""What stands in examples/ runs, and finds what it says it does."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from support import hf_folders

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def example() -> ModuleType:
    path = ROOT / "examples" / "classify_modules.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_snippets_to_train_on_and_held_out_share_no_file_and_name_no_package(example, tmp_path):
    trained, held_out = map(rows, example.write_rows(tmp_path))
    for found, most in ((trained, example.TRAINED), (held_out, example.HELD_OUT)):
        assert Counter(row["label"] for row in found) == dict.fromkeys(example.PACKAGES, most)
        assert all(row["label"] not in row["text"] for row in found)
    # licence headers and the like may be in both
    seen = {row["text"] for row in trained}
    assert sum(row["text"] in seen for row in held_out) <= len(held_out) // 50


def test_runs_as_it_is_documented(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "TRAINED", 6)
    monkeypatch.setattr(example, "HELD_OUT", 2)
    model = hf_folders.write_model(tmp_path / "model", max_position_embeddings=256)
    words = ["--model", model, "--out", tmp_path / "run", "--epochs", 1, "--method", "head"]
    monkeypatch.setattr(sys, "argv", ["classify_modules.py", *map(str, words)])
    example.main()
    said = capsys.readouterr().out
    assert "of the held-out snippets before" in said
    assert (tmp_path / "run/tuned/report.md").exists()


@pytest.mark.slow
def test_it_learns(example, tmp_path, monkeypatch):
    """Of four packages, each as frequent: a guess is right in a quarter."""
    monkeypatch.setattr(sys, "argv", ["classify_modules.py", "--out", str(tmp_path)])
    example.main()
    found = json.loads((tmp_path / "tuned/finetune.json").read_text())
    assert found["after"]["accuracy"] > max(0.5, found["before"]["accuracy"] + 0.2)
