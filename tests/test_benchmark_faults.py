"""What a benchmark run survives and what it refuses: faults of providers, files of other runs."""

from __future__ import annotations

import functools
import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

import fastlm
from fastlm.cli import main

LOSS = ("cross_entropy", "--shapes", "N=768,V=65", "--mode", "fwd")
GATED = ("glu", "--shapes", "N=16,I=32", "--mode", "fwd")
COMMITTED = Path(__file__).parent.parent / "benchmarks" / "results" / "cpu-2-cores"


def bench(out: Path, *arguments: str) -> int:
    """The exit code of ``fastlm bench``."""
    return main(["bench", *arguments, "--device", "cpu", "--json", str(out / "rows.json")])


def rows_of(folder: Path, **wanted: str) -> list[dict]:
    rows = json.loads((folder / "rows.json").read_text())["rows"]
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def test_who_is_faster_than_the_machine_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr("fastlm.benchmarks._harness.percentiles", lambda samples: [1e-9] * 3)
    # no time on fresh numbers is too long for it
    monkeypatch.setattr("fastlm.benchmarks._judge.COLD_MS", 1e9)
    assert bench(tmp_path, *LOSS, "--only", "torch", "fastlm") == 1
    assert all("as fast as the machine" in row["wrong"] for row in rows_of(tmp_path))


@pytest.mark.parametrize("most", [2, 3, 6])
def test_who_fails_while_timed_does_not_end_the_run(tmp_path, monkeypatch, most):
    """Two calls are judged, one is measured by its memory, two are warming."""
    right, calls = fastlm.cross_entropy, []

    def failing(*args: torch.Tensor) -> torch.Tensor:
        calls.append(args)
        if len(calls) > most:
            raise MemoryError("none is left")
        return right(*args)

    monkeypatch.setattr(fastlm, "cross_entropy", failing)
    assert bench(tmp_path, *LOSS, "--only", "torch", "fastlm") == 1
    rows = {row["provider"]: row for row in rows_of(tmp_path)}
    assert rows["fastlm"]["failed"] == "MemoryError: none is left"
    assert rows["torch"]["ms_p50"] > 0


def altered(folder: Path, **env: object) -> None:
    content = json.loads((folder / "rows.json").read_text())
    content["env"].update(env)
    (folder / "rows.json").write_text(json.dumps(content))


def test_a_file_of_another_run_is_not_gone_on_with(tmp_path, capsys):
    assert bench(tmp_path, *GATED, "--only", "torch") == 0
    before = rows_of(tmp_path)
    altered(tmp_path, git="0123abc", threads=99)
    small = ("rms_norm", "--shapes", "N=16,C=32", "--mode", "fwd", "--only", "torch")
    assert bench(tmp_path, *small) == 1
    said = capsys.readouterr().err
    assert re.search("is of another run: threads 99 there, .* git 0123abc there, ", said)
    assert rows_of(tmp_path) == before
    assert bench(tmp_path, *small, "--fresh") == 0
    assert [row["op"] for row in rows_of(tmp_path)] == ["rms_norm"]
    with zipfile.ZipFile(tmp_path / "rows.samples.zip") as archive:
        (key,) = json.loads(archive.read("samples.json"))
    assert "rms_norm" in key


def test_rows_added_later_have_the_ceilings_of_their_own_run(tmp_path):
    bench(tmp_path, *GATED, "--only", "torch")
    old = {"gbps": 1.5, "tflops": {"float32": 0.5}}
    altered(tmp_path, ceilings=old)
    assert bench(tmp_path, *GATED, "--only", "torch", "fastlm") == 0
    assert json.loads((tmp_path / "rows.json").read_text())["env"]["ceilings"] == old
    first, second = rows_of(tmp_path)
    assert "ceilings" not in first
    assert second["ceilings"]["gbps"] != 1.5


def test_a_file_that_holds_no_results_is_named(tmp_path, capsys):
    path = tmp_path / "rows.json"
    for text in ("a,b\n1,2\n", "[]", "{}"):
        path.write_text(text)
        assert main(["bench", "--show", str(path)]) == 1
        assert bench(tmp_path, *GATED, "--only", "torch") == 1
        line = f"fastlm: bench: {path} holds no results of a benchmark\n"
        assert capsys.readouterr().err == 2 * line
        assert path.read_text() == text
    shutil.copy(COMMITTED / "cross_entropy.json", tmp_path)
    assert main(["bench", "--show", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["bench", "--show", str(tmp_path / "none.json")]) == 1
    assert "none.json cannot be read: No such file" in capsys.readouterr().err


def test_kernels_of_ours_that_fail_fail_the_run_and_those_that_refuse_do_not(tmp_path, monkeypatch):
    def faulty(*args: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("an illegal memory access was encountered")

    for function, code, word in (
        (functools.partial(fastlm.swiglu, backend="gluon"), 0, "absent"), (faulty, 1, "failed"),
    ):  # fmt: skip
        monkeypatch.setattr(
            "fastlm.benchmarks.pointwise.cuda_kernels", lambda *args, found=function: found
        )
        assert bench(tmp_path, *GATED, "--only", "torch", "cuda", "--fresh") == code
        (row,) = rows_of(tmp_path, provider="cuda")
        assert word in row
        assert word == "failed" or "glu has no gluon backend" in row["absent"]


def test_a_case_that_leaves_the_gpu_unusable_is_not_tried_again(tmp_path, monkeypatch):
    def breaks(*args: object) -> None:
        raise RuntimeError("unspecified launch failure")

    monkeypatch.setattr("fastlm.benchmarks._harness.speedups", breaks)
    with pytest.raises(RuntimeError, match="launch failure"):
        bench(tmp_path, *GATED, "--only", "torch", "fastlm")
    assert [row["failed"] for row in rows_of(tmp_path)] == ["ended the process"] * 2


def test_sizes_that_an_op_cannot_have_fail_in_its_rows(tmp_path):
    words = ("apply_rotary", "--shapes", "D=7,T=8", "--mode", "fwd", "--only", "torch", "fastlm")
    assert bench(tmp_path, *words) == 1
    assert len(rows_of(tmp_path)) == 2
    assert all(row["failed"] for row in rows_of(tmp_path))
