"""The benchmark commands, seen from outside: rows, resuming, and no speed for a wrong result."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
GPU_SCRIPT = ROOT / "benchmarks" / "gpu.sh"
# real kernels and real speed: the interpreter is for the tests around this one
PLAIN = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

FIELDS = {
    "op", "mode", "provider", "shape", "dtype", "ms_p50", "ms_p20", "ms_p80", "tflops", "gbps",
    "fraction_of_peak", "peak_mib", "max_rel_err", "inputs",
}  # fmt: skip

# As long as the plan, with every way a stage can end.
STAGES = """
good  | 1   | 9   | echo fine
bad   | 1   | 9   | echo broken; test -e "$out/mended"
slow  | 1   | 1   | sleep 30
lacks | 1   | 9   | echo "pytest is missing"; exit 77
large | 500 | 600 | echo never
"""


def run(*command: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **kwargs)


def benchmark(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "benchmarks" / "run.py"
    return run(
        sys.executable, script, *arguments, "--device", "cpu", "--quick", "--out", out, env=PLAIN
    )


def test_rows_have_the_fields_readers_rely_on_and_a_second_call_adds_none(tmp_path):
    first = benchmark(tmp_path, "cross_entropy", "--only", "torch", "fastlm")
    assert first.returncode == 0, first.stdout + first.stderr
    content = json.loads((tmp_path / "cross_entropy.quick.json").read_text())
    assert {"device", "torch", "triton", "git", "date", "ceilings"} <= content["env"].keys()
    assert {(r["mode"], r["provider"]) for r in content["rows"]} == {
        (mode, provider) for mode in ("fwd", "fwd_bwd") for provider in ("torch", "fastlm")
    }
    for row in content["rows"]:
        assert row.keys() == FIELDS
        assert row["inputs"] == "random"
        assert row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert 0 < row["max_rel_err"] < 1e-3
    benchmark(tmp_path, "cross_entropy", "--only", "fastlm", "torch")
    assert rows_of(tmp_path, "cross_entropy") == content["rows"]


def test_a_call_for_a_few_leaves_the_others_to_the_next(tmp_path):
    benchmark(tmp_path, "cross_entropy", "--only", "fastlm")
    before = rows_of(tmp_path, "cross_entropy")
    later = benchmark(tmp_path, "cross_entropy", "--only", "torch", "fastlm")
    assert later.returncode == 0, later.stdout + later.stderr
    rows = rows_of(tmp_path, "cross_entropy")
    assert rows[: len(before)] == before
    assert [(row["mode"], row["provider"]) for row in rows] == [
        ("fwd", "fastlm"), ("fwd_bwd", "fastlm"), ("fwd", "torch"), ("fwd_bwd", "torch"),
    ]  # fmt: skip


def test_who_ran_when_the_process_ended_is_not_tried_again_and_others_are(tmp_path):
    planted = f"""
import os
import fastlm
fastlm.cross_entropy = lambda *args: os._exit(9)
from fastlm.benchmarks.__main__ import main
options = ["--device", "cpu", "--quick", "--only", "fastlm", "--out", {str(tmp_path)!r}]
main(["cross_entropy", *options])
"""
    assert run(sys.executable, "-P", "-c", planted, env=PLAIN).returncode == 9
    done = benchmark(tmp_path, "cross_entropy", "--only", "torch", "fastlm")
    assert done.returncode == 1, done.stdout + done.stderr
    rows = rows_of(tmp_path, "cross_entropy")
    assert [(row["mode"], row["provider"], row.get("failed")) for row in rows] == [
        ("fwd", "fastlm", "ended the process"), ("fwd_bwd", "fastlm", "ended the process"),
        ("fwd", "torch", None), ("fwd_bwd", "torch", None),
    ]  # fmt: skip


def test_a_wrong_result_has_no_speed(tmp_path):
    planted = f"""
import torch
from fastlm.ops.eager import cross_entropy
right = cross_entropy.backward
cross_entropy.backward = lambda *args: right(*args) * 1.001
from fastlm.benchmarks.__main__ import main
options = ["--device", "cpu", "--quick", "--only", "fastlm", "--out", {str(tmp_path)!r}]
raise SystemExit(main(["cross_entropy", *options]))
"""
    done = run(sys.executable, "-P", "-c", planted, env=PLAIN)
    assert done.returncode == 1, done.stdout + done.stderr
    forward, backward = json.loads((tmp_path / "cross_entropy.quick.json").read_text())["rows"]
    assert "ms_p50" in forward
    assert "ms_p50" not in backward
    assert "AssertionError" in backward["failed"]


def test_the_linear_loss_is_measured_beside_its_products_and_names_who_is_absent(tmp_path):
    without_a_peer = f"""
import runpy, sys
sys.modules["cut_cross_entropy"] = None
script = {str(ROOT / "benchmarks" / "loss.py")!r}
providers = ["--only", "torch", "fastlm", "products", "cce", "cuda"]
sys.argv = [script, "--device", "cpu", "--quick", *providers, "--out", {str(tmp_path)!r}]
runpy.run_path(script, run_name="__main__")
"""
    done = run(sys.executable, "-P", "-c", without_a_peer, env=PLAIN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "cross_entropy.quick.json").exists()
    content = json.loads((tmp_path / "linear_cross_entropy.quick.json").read_text())
    rows = [row for row in content["rows"] if row["mode"] == "fwd_bwd"]
    by_provider = {row["provider"]: row for row in rows}
    assert by_provider.keys() == {"torch", "fastlm", "products", "cce", "cuda"}
    assert by_provider["products"]["ms_p50"] > 0
    assert by_provider["products"]["max_rel_err"] is None
    assert "cut_cross_entropy" in by_provider["cce"]["absent"]
    assert "fastlm._C" in by_provider["cuda"]["absent"]
    assert "absent: import of cut_cross_entropy halted" in done.stdout


def test_attention_is_measured_with_every_option_and_names_who_cannot(tmp_path):
    without_a_peer = f"""
import runpy, sys
sys.modules["flash_attn"] = None
script = {str(ROOT / "benchmarks" / "attention.py")!r}
providers = ["--only", "sdpa.mask", "sdpa.cudnn", "varlen", "flash-attn", "torch", "fastlm"]
sys.argv = [script, "--device", "cpu", "--quick", *providers, "--out", {str(tmp_path)!r}]
runpy.run_path(script, run_name="__main__")
"""
    done = run(sys.executable, "-P", "-c", without_a_peer, env=PLAIN)
    assert done.returncode == 0, done.stdout + done.stderr
    (causal,) = rows_of(tmp_path, "attention", mode="bwd", provider="fastlm")
    assert causal.keys() == FIELDS
    forced = rows_of(tmp_path, "attention", provider="sdpa.cudnn")
    assert [row["mode"] for row in forced] == ["fwd", "bwd", "fwd_bwd"]
    assert all("RuntimeError" in row["failed"] for row in forced)
    for kind in ("window", "packed", "padded", "prefix", "softcap", "sinks"):
        (row,) = rows_of(tmp_path, "attention_options", inputs=kind, mode="bwd", provider="fastlm")
        assert row["tflops"] > 0
        found = rows_of(tmp_path, "attention_options", inputs=kind, mode="fwd")
        by_provider = {row["provider"]: row for row in found}
        assert by_provider.keys() >= {"varlen", "flash-attn", "torch", "fastlm", "sdpa.mask"}
        takes_mask = kind not in ("softcap", "sinks")
        assert ("ms_p50" in by_provider["sdpa.mask"]) == takes_mask
        assert "failed" in by_provider["varlen"] or "varlen_attn" in by_provider["varlen"]["absent"]
        assert "flash_attn" in by_provider["flash-attn"]["absent"]


def rows_of(folder: Path, op: str, **wanted: str) -> list[dict]:
    rows = json.loads((folder / f"{op}.quick.json").read_text())["rows"]
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def test_a_wrong_gradient_of_attention_has_no_speed(tmp_path):
    planted = f"""
import torch
from fastlm.ops import attention
right = attention.with_torchs_graph
class Wrong(torch.autograd.Function):
    forward = staticmethod(lambda ctx, out: out.clone())
    backward = staticmethod(lambda ctx, dout: dout * 1.001)
attention.with_torchs_graph = lambda *args: Wrong.apply(right(*args))
from fastlm.benchmarks.__main__ import main
options = ["--device", "cpu", "--quick", "--only", "fastlm", "--out", {str(tmp_path)!r}]
raise SystemExit(main(["attention", *options]))
"""
    done = run(sys.executable, "-P", "-c", planted, env=PLAIN)
    assert done.returncode == 1, done.stdout + done.stderr
    assert [("ms_p50" in row, row["mode"]) for row in rows_of(tmp_path, "attention")] == [
        (True, "fwd"), (False, "bwd"), (False, "fwd_bwd"),
    ]  # fmt: skip


PAIRS = """
import torch
from fastlm.benchmarks import attention
for problem in attention.QUICK_OPTIONS + attention.CPU[:1]:
    call = attention._call(problem, torch.float32, "cpu")
    seen = call.mask().expand(call.shape[0], -1, -1, -1).sum().item()
    assert call.flops(3, 5) == 4 * 3 * 5 * seen, problem
    print(problem.inputs, seen)
"""


def test_work_of_attention_is_counted_over_pairs_that_see_each_other():
    done = run(sys.executable, "-P", "-c", PAIRS, env=PLAIN)
    assert done.returncode == 0, done.stderr
    seen = dict(line.split() for line in done.stdout.splitlines())
    # 48 queries of which the first 15 see fewer than 16 keys; 16 after 32 keys; triangles
    assert int(seen["window"]) == 2 * (48 * 16 - 15 * 16 // 2)
    assert int(seen["prefix"]) == 16 * 32 + 16 * 17 // 2
    assert int(seen["causal"]) == 12 * 64 * 65 // 2
    assert int(seen["packed"]) < 96 * 97 // 2


PEAKS = """
import torch
from fastlm.benchmarks._harness import extra_peak_mib

def call():
    scratch = torch.ones(64 << 20)
    return scratch[: 16 << 20] + 1, torch.ones(0)

call()  # what it frees must count again
print(extra_peak_mib(lambda: None, "cpu"), extra_peak_mib(call, "cpu"))
"""


def test_the_peak_on_a_cpu_is_what_a_call_holds_beside_its_results():
    done = run(sys.executable, "-P", "-c", PEAKS, env=PLAIN)
    assert done.returncode == 0, done.stderr
    nothing, scratch = map(float, done.stdout.split())
    assert nothing < 2
    assert 254 < scratch < 260


def test_unknown_benchmark_is_a_usage_error(tmp_path):
    done = benchmark(tmp_path, "atention")
    assert done.returncode == 2
    assert "'atention'" in done.stderr


def test_an_unknown_provider_is_a_usage_error(tmp_path):
    done = benchmark(tmp_path, "attention", "attention_options", "--only", "sdpa.mask", "liger")
    assert done.returncode == 2
    assert "no provider 'liger' here: sdpa, " in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_without_results_is_said_to_have_none(tmp_path):
    done = run(sys.executable, ROOT / "benchmarks" / "run.py", "--show", tmp_path, env=PLAIN)
    assert done.returncode == 1
    assert done.stderr == f"no results in {tmp_path}\n"


def test_the_committed_tables_can_be_shown():
    folder = ROOT / "benchmarks" / "results" / "cpu-2-cores"
    done = run(sys.executable, ROOT / "benchmarks" / "run.py", "--show", folder, env=PLAIN)
    assert done.returncode == 0, done.stderr
    files = {path.stem for path in folder.iterdir()}
    titles = [line for line in done.stdout.splitlines() if line in files]
    assert titles == ["attention", "attention_options", "cross_entropy", "linear_cross_entropy"]
    assert max(map(len, done.stdout.splitlines())) < 250


def test_every_stage_of_the_plan_finds_its_function():
    script = GPU_SCRIPT.read_text()
    plan = script.partition("<<'PLAN'\n")[2].partition("\nPLAN\n")[0]
    named = {line.rpartition("| ")[2].split()[0] for line in plan.splitlines()}
    exported = re.search(r"export -f (.+)", script)
    assert named == set(exported[1].split())
    assert all(f"\n{name}() {{" in script for name in named)


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
    assert "runs" in done.stdout
    assert "does not fit any more" in done.stdout


def test_gpu_script_explains_itself_when_called_wrongly():
    for arguments in ([], ["--seconds", "many", "--out", "x"], ["--nonsense"], ["--seconds"]):
        done = run(GPU_SCRIPT, *arguments)
        assert done.returncode == 2
        assert "--seconds N --out DIR" in done.stderr


# The tables of the documentation

TABLES = ROOT / "benchmarks" / "tables.py"


@pytest.fixture(scope="module")
def tables() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(TABLES)))


def test_documents_show_the_committed_results():
    done = run(sys.executable, TABLES, "--check")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


ROWS = [
    {
        "shape": {"N": 8},
        "inputs": "peaked",
        "mode": "fwd",
        "peak_mib": mib,
        "provider": name,
        **ms,
    }
    for name, ms, mib in (
        ("torch", {"ms_p50": 4.0}, 12.4),
        ("torch.compile", {"ms_p50": 3.0}, 15.6),
        ("liger", {"absent": "no module"}, None),
        ("fastlm", {"ms_p50": 1234.5}, 2.0),
        ("fastlm.int8", {"ms_p50": 0.5}, 1.0),
        ("products", {"ms_p50": 1.0}, 0.0),
    )
]


def test_a_case_knows_what_others_offer(tables):
    (case,) = tables.cases(ROWS)
    assert (case.name, case.mode) == ("N8 peaked", "fwd")
    assert set(case.others) == {"torch", "torch.compile"}
    found = case.fastest_other()
    assert found is not None and found[0] == "torch.compile"


def test_a_table_says_who_was_not_measured(tables):
    table = list(tables._milliseconds(ROWS))
    assert table[2].split(" | ")[2:8] == [
        "fastlm", "fastlm.int8", "torch", "torch.compile", "products", "gain",
    ]  # fmt: skip
    assert table[4] == "| N8 peaked | fwd | 1,234 | 0.5 | 4 | 3 | 1 | 0.00 | 2 | 16 |"
    assert table[-1] == "Not measured: `liger`: no module."


def test_a_case_without_others_has_no_gain(tables):
    (case,) = tables.cases(ROWS[3:])
    assert tables._comparison(case) == ("", "", "")


# Decoding


@pytest.mark.slow
def test_what_decoding_cannot_be_measured_on_is_listed_with_the_reason(tmp_path):
    path = tmp_path / "decode.json"
    done = run(
        sys.executable, ROOT / "benchmarks" / "decode.py", "--device", "cpu", "--size", "1M",
        "--batch", 1, 64, 4096, "--cache", 131_072, "--rounds", 2, "--most-seconds", 0,
        "--only", "fastlm", "fastlm.ragged", "products", "--json", path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    # of one prompt none is shorter than the others
    providers = ["fastlm", "products", *["fastlm", "fastlm.ragged", "products"] * 2]
    assert [row["provider"] for row in rows] == providers
    assert [row["shape"]["B"] for row in rows] == [1] * 2 + [64] * 3 + [4096] * 3
    assert all(row["shape"]["prompt"] == 131_072 for row in rows)
    assert rows[0]["absent"].startswith("time: the prompts alone would take ")
    # 4 layers of two times 128 numbers for a token, in twice the memory
    assert rows[-1]["absent"].startswith("memory: weights and caches are 4102.")
    assert done.stdout.count("not run: ") == 3
