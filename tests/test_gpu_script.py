"""The plan of ``benchmarks/gpu.sh`` without a GPU: how stages end, what is gone on with."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GPU_SCRIPT = ROOT / "benchmarks" / "gpu.sh"

# As long as the plan, with every way a stage can end.
STAGES = """
good  | 1   | 9   | echo fine
bad   | 1   | 9   | echo broken; test -e "$out/mended"
slow  | 1   | 1   | sleep 30
lacks | 1   | 9   | echo "pytest is missing"; exit 77
large | 500 | 600 | echo never
"""


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def test_every_stage_of_the_plan_finds_its_function():
    script = GPU_SCRIPT.read_text()
    plan = script.partition("<<'PLAN'\n")[2].partition("\nPLAN\n")[0]
    named = {line.rpartition("| ")[2].split()[0] for line in plan.splitlines()}
    exported = re.search(r"export -f (.+)", script)
    assert named == set(exported[1].split())
    assert all(f"\n{name}() {{" in script for name in named)


def test_the_plan_leaves_eight_files_at_most():
    named = set(re.findall(r'"?\$out"?/([\w.]+)', GPU_SCRIPT.read_text()))
    assert {"stages.tsv", "log.txt", "gpu.json", "decode.json", "report.html"} <= named
    # and the archive beside gpu.json
    assert len(named | {"gpu.samples.zip"}) <= 8


@pytest.fixture
def gpu(tmp_path):
    """Run gpu.sh on the stages above; returns the exit code, what it printed and the table."""
    (tmp_path / "stages").write_text(STAGES)
    out = tmp_path / "out"

    def call(*arguments: object, seconds: int = 60) -> tuple[int, str, dict[str, str]]:
        done = run(
            GPU_SCRIPT,
            "--seconds",
            seconds,
            "--out",
            out,
            "--stages",
            tmp_path / "stages",
            *arguments,
        )
        state = out / "stages.tsv"
        lines = state.read_text().splitlines()[1:] if state.exists() else []
        return done.returncode, done.stdout, dict(line.split("\t")[:2] for line in lines)

    call.out = out
    return call


def test_gpu_script_never_calls_passed_what_was_not_run(gpu):
    code, printed, results = gpu()
    assert code == 1
    assert results == {
        "good": "passed", "bad": "failed", "slow": "timed out", "lacks": "not run",
        "large": "not run",
    }  # fmt: skip
    table = printed[printed.rindex("stage ") :]
    assert "needs 500 s" in table
    assert "pytest is missing" in table
    assert len(list(gpu.out.iterdir())) <= 8


def test_gpu_script_resumes_with_what_was_never_tried(gpu):
    gpu()
    (gpu.out / "mended").touch()
    _, printed, results = gpu()
    begun = [line.split()[1].rstrip(",") for line in printed.splitlines() if line.startswith("==")]
    assert begun == ["lacks", "bad", "slow"]
    assert results["good"] == results["bad"] == "passed"


def test_gpu_script_starts_over_when_the_source_changes(gpu, tmp_path):
    gpu()
    (tmp_path / "stages").write_text("good | 1 | 9 | echo again\n")
    code, printed, results = gpu()
    assert "== good" in printed
    assert (code, results) == (0, {"good": "passed"})


def test_gpu_script_takes_up_a_call_that_was_cut_off(gpu, tmp_path):
    stages = "first | 1 | 9 | kill -9 $PPID; sleep 2\nsecond | 1 | 9 | true\n"
    (tmp_path / "stages").write_text(stages.replace("$PPID", '"$script"'))
    script = run("bash", "-c", f'export script=$$; exec "{GPU_SCRIPT}" --seconds 60 '
                 f'--out "{gpu.out}" --stages "{tmp_path / "stages"}"')  # fmt: skip
    assert script.returncode == -9
    assert "first\ttimed out" in (gpu.out / "stages.tsv").read_text()
    _, _, results = gpu("--dry-run")
    assert results == {"first": "timed out", "second": "not run"}


def test_gpu_script_dry_run_prints_the_plan_and_touches_nothing(tmp_path):
    done = run(GPU_SCRIPT, "--seconds", 200, "--out", tmp_path / "out", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out").exists()
    for op in ("attention", "cross_entropy", "linear_cross_entropy"):
        assert f"test-{op} " in done.stdout
        assert f"time-{op} " in done.stdout
    assert "test-attention_with_kv_cache " in done.stdout
    assert "time-attention_options " in done.stdout
    assert "time-pointwise " in done.stdout
    assert "runs" in done.stdout
    assert "does not fit any more" in done.stdout


def test_gpu_script_explains_itself_when_called_wrongly():
    for arguments in ([], ["--seconds", "many", "--out", "x"], ["--nonsense"], ["--seconds"]):
        done = run(GPU_SCRIPT, *arguments)
        assert done.returncode == 2
        assert "--seconds N --out DIR" in done.stderr
