"""The benchmark commands, seen from outside: rows, resuming, and no speed for a wrong result."""

from __future__ import annotations

import csv
import json
import operator
import os
import re
import shutil
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fastlm.cli import main

ROOT = Path(__file__).parent.parent
# real kernels and real speed: the interpreter is for the tests around this one
PLAIN = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

FIELDS = {
    "op", "mode", "provider", "shape", "dtype", "ms_p50", "ms_p20", "ms_p80", "tflops", "gbps",
    "fraction_of_peak", "peak_mib", "max_rel_err", "inputs", "baseline", "speedup",
}  # fmt: skip
LOSS = ("cross_entropy", "--shapes", "N=768,V=65")
ALL_MODES = ("--mode", "fwd", "bwd", "fwd_bwd")
HEADS = ("--shapes", "T=48,H=4,G=2,D=16", *ALL_MODES)


def run(*command: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **kwargs)


def bench(out: Path, *arguments: str) -> int:
    """The exit code of ``fastlm bench``."""
    return main(["bench", *arguments, "--device", "cpu", "--json", str(out / "rows.json")])


def planted(out: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same after ``code`` has run in the process."""
    words = [*arguments, "--device", "cpu", "--json", str(out / "rows.json")]
    rest = f"\nimport sys\nfrom fastlm.benchmarks.__main__ import main\nsys.exit(main({words!r}))"
    return run(sys.executable, "-P", "-c", code + rest, env=PLAIN)


def test_rows_have_the_fields_readers_rely_on_and_a_second_call_adds_none(tmp_path):
    assert bench(tmp_path, *LOSS, "--only", "torch", "fastlm") == 0
    content = json.loads((tmp_path / "rows.json").read_text())
    assert {"device", "torch", "triton", "git", "date", "ceilings"} <= content["env"].keys()
    assert {(r["mode"], r["provider"]) for r in content["rows"]} == {
        (mode, provider) for mode in ("fwd", "fwd_bwd") for provider in ("torch", "fastlm")
    }
    for row in content["rows"]:
        assert row.keys() == FIELDS
        assert row["inputs"] == "random"
        assert row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert 0 < row["max_rel_err"] < 1e-3
        assert (row["speedup"] == 1) == (row["provider"] == row["baseline"] == "torch")
    assert bench(tmp_path, *LOSS, "--only", "fastlm,torch") == 0
    assert rows_of(tmp_path) == content["rows"]


def test_every_call_behind_a_row_is_kept(tmp_path):
    bench(tmp_path, *LOSS, "--mode", "fwd", "--only", "torch", "fastlm")
    rows = rows_of(tmp_path)
    assert [row["mode"] for row in rows] == ["fwd", "fwd"]
    with zipfile.ZipFile(tmp_path / "rows.samples.zip") as archive:
        samples = json.loads(archive.read("samples.json"))
    for row, (key, times) in zip(rows, samples.items(), strict=True):
        assert json.loads(key)[-1] == row["provider"]
        assert statistics.median(times) == row["ms_p50"]
        assert len(times) >= 5
    ratios = map(operator.truediv, *samples.values())
    assert statistics.median(ratios) == rows[1]["speedup"]


def test_what_is_measured_anew_leaves_other_ops_as_they_are(tmp_path):
    loss, glu = (*LOSS, "--only", "fastlm"), ("glu", "--shapes", "N=16,I=32", "--only", "fastlm")
    bench(tmp_path, *loss)
    bench(tmp_path, *glu)
    before = rows_of(tmp_path)
    assert bench(tmp_path, *glu, "--fresh") == 0
    after = rows_of(tmp_path)
    assert after[:2] == before[:2]
    assert [row["op"] for row in after] == ["cross_entropy"] * 2 + ["glu"] * 2
    assert after[2:] != before[2:]


def test_a_call_for_a_few_leaves_the_others_to_the_next(tmp_path):
    bench(tmp_path, *LOSS, "--only", "fastlm")
    before = rows_of(tmp_path)
    assert bench(tmp_path, *LOSS, "--only", "torch", "fastlm") == 0
    rows = rows_of(tmp_path)
    assert rows[: len(before)] == before
    assert [(row["mode"], row["provider"]) for row in rows] == [
        ("fwd", "fastlm"), ("fwd_bwd", "fastlm"), ("fwd", "torch"), ("fwd_bwd", "torch"),
    ]  # fmt: skip


DIES = """
import os
import fastlm
fastlm.cross_entropy = lambda *args: os._exit(9)
"""


def test_who_ran_when_the_process_ended_is_not_tried_again_and_others_are(tmp_path):
    assert planted(tmp_path, DIES, *LOSS, "--only", "fastlm").returncode == 9
    assert bench(tmp_path, *LOSS, "--only", "torch", "fastlm") == 1
    rows = rows_of(tmp_path)
    assert [(row["mode"], row["provider"], row.get("failed")) for row in rows] == [
        ("fwd", "fastlm", "ended the process"), ("fwd_bwd", "fastlm", "ended the process"),
        ("fwd", "torch", None), ("fwd_bwd", "torch", None),
    ]  # fmt: skip


OFF_BY_A_THOUSANDTH = """
from fastlm.ops.eager import cross_entropy
right = cross_entropy.backward
cross_entropy.backward = lambda *args: right(*args) * 1.001
"""


# Each of these would be the fastest of all.
CHEATS = """
import dataclasses
import time
import torch
import torch.nn.functional as F
from fastlm.benchmarks import _providers, loss
from fastlm.benchmarks._harness import REGISTRY

class Cheat(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, kind, state):
        with torch.enable_grad():
            x = logits.detach().requires_grad_()
            honest = F.cross_entropy(x, target)
        result = honest.detach(), torch.autograd.grad(honest, x)[0]
        state["calls"] = state.get("calls", 0) + 1
        if kind == "zeros":
            result = tuple(torch.zeros_like(y) for y in result)
        if kind == "sloppy":
            result = tuple(y * 1.01 for y in result)
        if kind == "short":
            result = tuple(y * 0.95 for y in result)
        if kind == "skips":
            result = result[0], torch.zeros_like(x)
        if kind == "cached":
            result = state.setdefault("kept", result)
        if kind == "stale":
            # as a graph that was recorded once it was warm
            result = state.setdefault("kept", result) if state["calls"] > 4 else result
        if kind == "remembers":
            # an entry for each of the inputs that it is shown
            seen = state.setdefault("seen", {})
            first = float(x[0, 0])
            if first not in seen:
                time.sleep(0.05)
                seen[first] = result
            result = seen[first]
        if kind == "two":
            # right for what is shown before the timing, and nothing else
            seen = state.setdefault("seen", {})
            first = float(x[0, 0])
            if len(seen) < 2:
                seen[first] = result
            result = seen.get(first, next(iter(seen.values())))
        ctx.save_for_backward(result[1])
        return result[0].clone()

    @staticmethod
    def backward(ctx, dloss):
        return dloss * ctx.saved_tensors[0], None, None, None

def planted(kind):
    state = {}
    return lambda device: lambda logits, target: Cheat.apply(logits, target, kind, state)

kinds = ("honest", "sloppy", "short", "zeros", "skips", "cached", "stale", "remembers", "two")
for kind in kinds:
    _providers.PROVIDERS[kind] = _providers.Source(kind)
    loss.LOGITS_PROVIDERS[kind] = planted(kind)
loss.LOGITS_PROVIDERS["detaches"] = lambda device: lambda x, y: F.cross_entropy(x.detach(), y)
_providers.PROVIDERS["detaches"] = _providers.Source("no gradient at all")
bench = REGISTRY["cross_entropy"]
REGISTRY["cross_entropy"] = dataclasses.replace(
    bench, providers=(*bench.providers, *kinds, "detaches")
)
"""


def test_a_wrong_result_has_no_speed_beside_whom_ever(tmp_path):
    wrong = CHEATS + OFF_BY_A_THOUSANDTH
    done = planted(tmp_path, wrong, *LOSS, "--only", "sloppy", "fastlm")
    assert done.returncode == 1, done.stdout + done.stderr
    for row in rows_of(tmp_path, provider="sloppy"):
        assert 0.005 < row["max_rel_err"] < 0.02
    forward, backward = rows_of(tmp_path, provider="fastlm")
    assert "ms_p50" in forward
    assert "ms_p50" not in backward
    assert backward["wrong"].startswith("fastlm fwd_bwd, output 1: error ")


def test_cheats_are_marked_wrong_and_have_no_speed(tmp_path):
    cheats = "honest,short,zeros,skips,cached,stale,remembers,two,detaches"
    done = planted(tmp_path, CHEATS, *LOSS, "--only", cheats)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {(row["provider"], row["mode"]): row for row in rows_of(tmp_path)}
    for mode in ("fwd", "fwd_bwd"):
        assert "ms_p50" in rows["honest", mode]
        for kind in ("short", "zeros", "cached", "stale", "remembers", "two"):
            assert "wrong" in rows[kind, mode], rows[kind, mode]
    assert "ms_p50" in rows["skips", "fwd"]
    assert "output 1" in rows["skips", "fwd_bwd"]["wrong"]
    assert "does not require grad" in rows["detaches", "fwd_bwd"]["failed"]
    assert "result of another call" in rows["stale", "fwd"]["wrong"]
    assert "may be results kept" in rows["remembers", "fwd"]["wrong"]
    assert "of numbers never seen before" in rows["two", "fwd_bwd"]["wrong"]
    assert all("ms_p50" not in row for row in rows.values() if row.keys() & {"wrong", "failed"})


NO_CCE = "import sys; sys.modules['cut_cross_entropy'] = None"


def test_the_linear_loss_is_measured_beside_its_products_and_names_who_is_absent(tmp_path):
    providers = ["--only", "torch", "fastlm", "products", "cce", "cuda"]
    small = ["linear_cross_entropy", "--shapes", "N=64,C=32,V=65"]
    done = planted(tmp_path, NO_CCE, *small, *providers)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path, mode="fwd_bwd", inputs="random")
    by_provider = {row["provider"]: row for row in rows}
    assert by_provider.keys() == {"torch", "fastlm", "products", "cce", "cuda"}
    assert by_provider["products"]["ms_p50"] > 0
    assert by_provider["products"]["max_rel_err"] is None
    assert "cut_cross_entropy" in by_provider["cce"]["absent"]
    assert "fastlm._C" in by_provider["cuda"]["absent"]
    assert "absent: import of cut_cross_entropy halted" in done.stdout


NO_FLASH = "import sys; sys.modules['flash_attn'] = None"


@pytest.mark.slow
def test_attention_is_measured_with_every_option_and_names_who_cannot(tmp_path):
    providers = ["--only", "sdpa.mask", "sdpa.cudnn", "varlen", "flash-attn", "torch", "fastlm"]
    ops = ["--op", "attention", "attention_options"]
    done = planted(tmp_path, NO_FLASH, *ops, *HEADS, *providers)
    assert done.returncode == 0, done.stdout + done.stderr
    (causal,) = rows_of(tmp_path, op="attention", mode="bwd", provider="fastlm")
    assert causal.keys() == FIELDS
    forced = rows_of(tmp_path, provider="sdpa.cudnn")
    assert [row["mode"] for row in forced] == ["fwd", "bwd", "fwd_bwd"]
    assert all("RuntimeError" in row["failed"] for row in forced)
    for kind in ("window", "packed", "padded", "prefix", "softcap", "sinks"):
        (row,) = rows_of(tmp_path, inputs=kind, mode="bwd", provider="fastlm")
        assert row["tflops"] > 0
        found = rows_of(tmp_path, inputs=kind, mode="fwd")
        by_provider = {row["provider"]: row for row in found}
        assert by_provider.keys() >= {"varlen", "flash-attn", "torch", "fastlm", "sdpa.mask"}
        takes_mask = kind not in ("softcap", "sinks")
        assert ("ms_p50" in by_provider["sdpa.mask"]) == takes_mask
        assert "failed" in by_provider["varlen"] or "varlen_attn" in by_provider["varlen"]["absent"]
        assert "flash_attn" in by_provider["flash-attn"]["absent"]


def test_small_ops_are_measured_beside_torch_and_transformers(tmp_path):
    sizes = {"rms_norm": "N=16,C=32", "glu": "N=16,I=32", "apply_rotary": "T=16,D=16"}
    for op, shape in sizes.items():
        others = ("torch",) if op == "glu" else ("torch", "transformers")
        chosen = ("--shapes", shape, "--only", *others, "fastlm")
        assert bench(tmp_path, op, *chosen) == 0
        rows = rows_of(tmp_path, op=op)
        assert {row["provider"] for row in rows} == {"fastlm", *others}
        assert {row["mode"] for row in rows} == {"fwd", "fwd_bwd"}
        assert all(row["max_rel_err"] < 1e-6 for row in rows)


def test_a_quick_run_with_few_others_fails(tmp_path, monkeypatch, capsys):
    few = {"glu": "pointwise"}
    # in this order: importing the one takes the table of the other
    monkeypatch.setattr("fastlm.benchmarks._suite.OPS", few)
    monkeypatch.setattr("fastlm.benchmarks._options.OPS", few)
    monkeypatch.setattr("fastlm.benchmarks._suite._models", lambda options: [])
    monkeypatch.setattr("fastlm.benchmarks.pointwise.compiled", lambda function: "not here")
    assert bench(tmp_path, "--shapes", "N=16,I=32") == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "only 1 providers of others ran, of 4: torch"
    assert any("torch.compile" in line and "absent: not here" in line for line in said)


def rows_of(folder: Path, **wanted: str) -> list[dict]:
    rows = json.loads((folder / "rows.json").read_text())["rows"]
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


WRONG_GRADIENT = """
import torch
from fastlm.ops import attention
right = attention.with_torchs_graph
class Wrong(torch.autograd.Function):
    forward = staticmethod(lambda ctx, out: out.clone())
    backward = staticmethod(lambda ctx, dout: dout * 1.001)
attention.with_torchs_graph = lambda *args: Wrong.apply(right(*args))
"""


def test_a_wrong_gradient_of_attention_has_no_speed(tmp_path):
    done = planted(tmp_path, WRONG_GRADIENT, "attention", *HEADS, "--only", "fastlm")
    assert done.returncode == 1, done.stdout + done.stderr
    assert [("ms_p50" in row, row["mode"]) for row in rows_of(tmp_path)] == [
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
    # 512 queries of which the first 63 see fewer than 64 keys; 64 after 448 keys; triangles
    assert int(seen["window"]) == 512 * 64 - 63 * 64 // 2
    assert int(seen["prefix"]) == 64 * 448 + 64 * 65 // 2
    assert int(seen["causal"]) == 12 * 64 * 65 // 2
    assert int(seen["packed"]) < 512 * 513 // 2


PEAKS = """
import torch
from fastlm.benchmarks._memory import extra_peak_mib

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


def test_mistakes_are_usage_errors_that_name_what_there_is(tmp_path, capsys):
    for words, message in (
        (["atention"], "there is no benchmark 'atention': attention, "),
        (["attention", "--only", "sdpa,liger"], "no provider 'liger' here: sdpa, "),
        (["glu", "--shapes", "V=8"], "glu has the sizes N, I, not V"),
        (["glu", "--shapes", "many"], "must be like N=1024,V=32000, each 1 at least, got many"),
        (["glu", "--shapes", "N=-3,I=16"], "each 1 at least, got N=-3,I=16"),
        (["glu", "--only", "fastlm", "--baseline", "torch"], "torch must be one of --only: fastlm"),
        (["glu", "--suit", "full"], "unrecognized options: --suit full, did you mean --suite?"),
        (["glu", "--suite", "gpu"], "--suite gpu needs a GPU that torch sees"),
    ):
        assert bench(tmp_path, *words) == 2
        said = capsys.readouterr().err
        assert message in said
        assert len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_without_results_is_said_to_have_none(tmp_path, capsys):
    assert main(["bench", "--show", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"fastlm: bench: no results in {tmp_path}\n"


COMMITTED = ROOT / "benchmarks" / "results" / "cpu-2-cores"


def test_the_committed_tables_can_be_shown(capsys):
    assert main(["bench", "--show", str(COMMITTED)]) == 0
    lines = capsys.readouterr().out.splitlines()
    titles = [line for line in lines if line in {path.stem for path in COMMITTED.iterdir()}]
    assert list(dict.fromkeys(titles)) == [
        "attention", "attention_options", "cross_entropy", "linear_cross_entropy",
    ]  # fmt: skip
    assert max(map(len, lines)) < 250


def test_in_a_terminal_the_fastest_of_a_case_comes_first(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["bench", "--show", str(COMMITTED / "cross_entropy.json")]) == 0
    text = capsys.readouterr().out
    largest = text[text.index("N1024 V50304") :]
    assert largest.split()[4:6] == ["fwd", "torch.compile"]
    assert "liger" in largest and "absent: No module named" in largest


def test_results_become_pictures_a_page_and_the_columns_of_liger(tmp_path, capsys):
    table = tmp_path / "rows.csv"
    for name in ("cross_entropy.json", "decode.json"):
        shutil.copy(COMMITTED / name, tmp_path)
    options = ["--plot", str(tmp_path / "pictures"), "--csv", str(table)]
    assert main(["bench", "--show", str(tmp_path), *options]) == 0
    for name in (
        "cross_entropy/speed_cross_entropy", "cross_entropy/memory_cross_entropy",
        "cross_entropy/roofline_cross_entropy", "decode/tokens_per_second",
    ):  # fmt: skip
        data = (tmp_path / "pictures" / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 10_000
    page = (tmp_path / "pictures" / "report.html").read_text()
    assert set(re.findall(r"(?:src|href)='(.{5})", page)) == {"data:"}
    assert page.count("<img") == len(list((tmp_path / "pictures").rglob("*.png")))
    assert "quack" in page and "No module named" in page
    with table.open() as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0])[:8] == [
        "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit",
        "x_name", "x_label", "x_value",
    ]  # fmt: skip
    committed = json.loads((COMMITTED / "cross_entropy.json").read_text())["rows"]
    (row,) = (
        row for row in committed
        if (row["provider"], row["mode"], row["shape"]["V"]) == ("fastlm", "fwd_bwd", 50_304)
    )  # fmt: skip
    wanted = ("cross_entropy", "fastlm", "full", "speed", "50304")
    names = ("kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "x_value")
    (line,) = (line for line in lines if tuple(line[name] for name in names) == wanted)
    assert float(line["y_value_50"]) == row["ms_p50"]
    assert "written" in capsys.readouterr().out


# The forward takes four times as long, with the backward all takes about twice.
SLOWED = """
import time
import fastlm
right = fastlm.swiglu
def slowed(*args):
    start = time.perf_counter()
    out = right(*args)
    end = time.perf_counter()
    while time.perf_counter() < end + 3 * (end - start):
        pass
    return out
fastlm.swiglu = slowed
"""


@pytest.mark.slow
def test_an_op_that_became_slower_fails_the_comparison_with_stored_ratios(tmp_path):
    pytest.importorskip("pytest_benchmark")
    words = [str(ROOT / "benchmarks/regression"), "-k", "glu", "--ratios", f"{tmp_path}/r.json"]

    def check(code: str, *more: str) -> subprocess.CompletedProcess[str]:
        rest = f"\nimport sys, pytest\nsys.exit(pytest.main({[*words, *more]!r}))"
        return run(sys.executable, "-P", "-c", code + rest, env=PLAIN | {"OMP_NUM_THREADS": "1"})

    nothing = check("")
    assert nothing.returncode == 1
    assert "no ratio of glu is stored" in nothing.stdout
    assert check("", "--store").returncode == 0
    assert check("").returncode == 0
    slow = check(SLOWED)
    assert slow.returncode == 1
    assert "when it was stored" in slow.stdout


def test_agreement_compares_speedups_and_says_where_two_runs_differ(tmp_path):
    for name, last in (("a", 2.0), ("b", 2.2), ("c", 3.0)):
        rows = [
            {
                "op": "glu", "shape": {"N": n}, "mode": "fwd", "provider": provider,
                "baseline": "torch", "speedup": speedup,
            }
            for n in range(5)
            for provider, speedup in (("torch", 1.0), ("fastlm", last if n == 4 else 2.0))
        ]  # fmt: skip
        rows.append({**rows[0], "speedup": None, "provider": "products"})
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows}))
    script = ROOT / "benchmarks" / "agreement.py"
    near = run(sys.executable, script, tmp_path / "a.json", tmp_path / "b.json")
    assert near.returncode == 0
    assert near.stdout.startswith("100.0% of 5 speedups within 15%")
    far = run(sys.executable, script, tmp_path / "a.json", tmp_path / "c.json")
    assert far.returncode == 1
    assert far.stdout.splitlines()[:2] == [
        "80.0% of 5 speedups within 15%; furthest apart:", "  50.0%  glu N4 fwd fastlm",
    ]  # fmt: skip


# Whole models


@pytest.mark.slow
def test_whole_models_are_part_of_the_suite(tmp_path):
    assert bench(tmp_path, "--op", "train_step", "generate") == 0
    steps, tokens = rows_of(tmp_path, op="train_step"), rows_of(tmp_path, op="generate")
    assert {row["provider"] for row in steps} == {"fastlm", "transformers"}
    assert all(row["ms_p50"] > 0 and row["mode"] == "step" for row in steps)
    assert {row["provider"] for row in tokens} == {"fastlm", "transformers", "products"}
    assert all(row["tokens_per_second_p50"] > 0 and row["mode"] == "decode" for row in tokens)
    before = rows_of(tmp_path)
    assert bench(tmp_path, "--mode", "step", "decode") == 0
    assert rows_of(tmp_path) == before


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
