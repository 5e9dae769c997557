"""fastlm._C as nvcc builds it: compiled for GPUs that are not here, linked to nothing of torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.cuda_host import CSRC, HOST, ROOT, build_py, missing, needed

import fastlm
from fastlm.ops.cuda import _extension

MOST_INSTANTIATIONS = 30
MOST_REGISTERS = 128  # two blocks of 256 threads share a multiprocessor
# sums of attention stay in registers: of blocks of 128 threads two share a multiprocessor, else one
MOST_OF_ATTENTION = 255
DESCRIBE = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
rows = module.LossRows(
    logits=0, targets=0, weight=0, weight_sum=0, rows=3, inner=1, stride_outer=0, stride_inner=0,
    stride_vocab=1, vocab_size=1, ignore_index=0, label_smoothing=0, softcap=0, logit_scale=1,
)
error = ""
try:
    module.cross_entropy_forward(
        dtype=module.Dtype.float32, rows=rows, losses=0, maximum=0, log_sum=0, logprobs=0,
        entropy=0, predictions=0, plan=module.LossPlan(threads=64, blocks_per_row=1), device=0,
        stream=0,
    )
except RuntimeError as failure:
    error = str(failure)
maps = open("/proc/self/maps").read()
print(json.dumps({"archs": module.archs, "host": module.host, "error": error, "maps": maps}))
"""


def build(folder: Path, archs: str | None) -> Path:
    """Build as setup.py does; returns the extension."""
    needed("nvcc"), needed("ninja"), needed("c++")
    try:
        import pybind11  # noqa: F401
    except ModuleNotFoundError:
        missing("pybind11")
    words = [] if archs is None else ["--archs", archs]
    environment = {k: v for k, v in os.environ.items() if k != "FASTLM_CUDA_ARCHS"}
    done = subprocess.run(
        [sys.executable, "-P", str(CSRC / "build.py"), str(folder), *words],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(done.stdout.splitlines()[-1])


@pytest.fixture(
    scope="module",
    params=["80;90a", pytest.param(None, marks=pytest.mark.slow)],
    ids=["two archs", "all archs"],
)
def built(request, tmp_path_factory) -> tuple[str, Path]:
    """What the extension is built for, and its path."""
    archs = request.param or build_py()["DEFAULT_ARCHS"]
    return archs, build(tmp_path_factory.mktemp("extension"), request.param)


def test_kernels_fit_without_spills_and_local_memory(built):
    archs, extension = built
    logs = "".join(path.read_text() for path in extension.parent.glob("*.o.log"))
    assert "warning" not in logs
    pattern = (
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    )
    kernels = Counter()
    for name, arch, *counts, rest in re.findall(pattern, logs, re.DOTALL):
        stack, stores, loads, registers = map(int, counts)
        assert stack == stores == loads == 0, f"{name} on {arch}"
        most = MOST_OF_ATTENTION if "attention" in name else MOST_REGISTERS
        assert registers <= most, f"{name} on {arch}"
        shared = re.search(r"(\d+) bytes smem", rest)
        assert shared is None or int(shared[1]) <= 48 * 1024, f"{name} on {arch}"
        kernels[arch] += 1
    assert set(kernels) == {f"sm_{arch.removesuffix('+PTX')}" for arch in archs.split(";")}
    assert 0 < max(kernels.values()) <= MOST_INSTANTIATIONS


def test_loads_without_torch_and_says_what_it_is(built):
    archs, extension = built
    done = subprocess.run(
        [sys.executable, "-P", "-c", DESCRIBE, str(extension)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["archs"], told["host"]) == (archs, False)
    assert not re.search(r"libtorch|libc10|libcudart", told["maps"])
    if not Path("/proc/driver/nvidia").exists():
        assert re.match(
            r"cross_entropy_forward did not start: .*driver.* \(grid \(3, 1\), 64 threads and "
            r"0 bytes of shared memory a block, device 0\)",
            told["error"],
        ), told["error"]


@pytest.mark.parametrize("source", sorted(HOST.glob("check_*.cpp")), ids=lambda path: path.stem)
def test_the_programs_that_check_kernels_are_cuda(source, tmp_path):
    """What g++ builds for a CPU, nvcc builds for the sanitizers of a GPU."""
    command = [needed("nvcc"), "-std=c++17", "-arch=sm_80", "-Werror", "all-warnings",
               "-I", str(CSRC), "-I", str(HOST), "-x", "cu", "-c", str(source),
               "-o", str(tmp_path / "program.o")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_setup_py_builds_it_on_request_alone(tmp_path):
    needed("nvcc"), needed("ninja")
    command = [sys.executable, str(ROOT / "setup.py"), "-q", "build", "-b", str(tmp_path / "build")]
    for value, found in (("0", 0), ("1", 1)):
        environment = {**os.environ, "FASTLM_BUILD_CUDA": value, "FASTLM_CUDA_ARCHS": "80"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert len(list((tmp_path / "build").glob("lib*/fastlm/_C*.so"))) == found


@pytest.mark.parametrize("archs, flags", [
    ("80", "arch=compute_80,code=sm_80"),
    ("75;90a", "arch=compute_75,code=sm_75 -gencode arch=compute_90a,code=sm_90a"),
    ("100+PTX", "arch=compute_100,code=[sm_100,compute_100]"),
])  # fmt: skip
def test_an_arch_becomes_flags(archs, flags):
    assert " ".join(build_py()["gencodes"](archs)) == f"-gencode {flags}"


@pytest.mark.parametrize("archs", ["", "8.0", "sm_80", "80,90", "90a+PTX", "80;"])
def test_an_arch_it_does_not_know_is_refused(archs):
    build = build_py()
    with pytest.raises(build["BuildError"], match="FASTLM_CUDA_ARCHS must be like 75;80"):
        build["gencodes"](archs)


@pytest.mark.parametrize("archs, served, others", [
    ("80", (80, 86, 89), (75, 90, 100)),
    ("90a", (90,), (80, 100)),
    ("75;80;90a;100+PTX", (75, 80, 86, 89, 90, 100, 103, 120), (70, 72)),
])  # fmt: skip
def test_an_arch_serves_its_generation_and_ptx_what_is_newer(archs, served, others):
    assert all(_extension.serves(archs, arch) for arch in served)
    assert not any(_extension.serves(archs, arch) for arch in others)


@pytest.mark.parametrize("module, message", [
    (None, r"fastlm._C is not built \(FASTLM_BUILD_CUDA=1 builds it"),
    (SimpleNamespace(host=False, archs="80"), "input is on cpu: fastlm._C needs a CUDA device"),
])  # fmt: skip
def test_refuses_what_the_extension_cannot_serve(module, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastlm._C", module)
    logits, targets = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match=f"cuda refused: {message}"):
        fastlm.cross_entropy(logits, targets, backend="cuda")
