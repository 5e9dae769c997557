"""Every tuning row compiles for every GPU we name, fits it, and has nothing forbidden in it.

The interpreter runs what hardware refuses; these tests close that gap without a GPU.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from support import ahead
from support.lint import chained_dots, float_atomics, narrow_products

from fastlm.kernels import _ahead, _runtime

KERNELS = Path(__file__).parents[1] / "kernels"
# bfloat16 and float16 differ in the names of a few instructions; the second is for test-all
QUICK_TYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((90, False), id="sm_90"),
        *(
            pytest.param((arch, True), id=f"sm_{arch}-thorough", marks=pytest.mark.slow)
            for arch in ahead.ARCHES
        ),
    ],
)
def binaries(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    arch, thorough = request.param
    dtypes = ahead.DTYPES if thorough else QUICK_TYPES
    return ahead.compile_all(arch, dtypes=dtypes, thorough=thorough)


def shown(binary: dict[str, Any]) -> str:
    constants = ", ".join(f"{name}={value}" for name, value in binary["constants"].items())
    return f"{binary['op']} {binary['kernel']} {binary['dtype']} ({constants}) {binary['options']}"


def failing(binaries: list[dict[str, Any]], broken: Any) -> list[str]:
    return [f"{shown(binary)}: {found}" for binary in binaries if (found := broken(binary))]


def test_every_op_with_a_tuning_table_is_compiled():
    assert {path.parent.name for path in KERNELS.glob("*/tuning.py")} == set(ahead.LAUNCHES)


@pytest.mark.parametrize("op", ahead.LAUNCHES)
def test_every_row_is_reached(op):
    assert ahead.rows(op)
    assert ahead.unreached(op) == []


def test_a_row_that_no_launch_reaches_is_named(monkeypatch):
    from fastlm.kernels.cross_entropy import tuning

    monkeypatch.setattr(tuning, "SPARE", (tuning.Plan(block_v=64, num_warps=2),), raising=False)
    assert ahead.unreached("cross_entropy") == ["SPARE[0]"]


def test_shared_memory_fits(binaries):
    assert binaries
    over = failing(
        binaries,
        lambda b: b["shared_memory"] > _runtime.SHARED_MEMORY[b["arch"]] and b["shared_memory"],
    )
    assert over == []


def test_attention_takes_no_more_shared_memory_than_its_plan_counts_on(binaries):
    def over(binary: dict[str, Any]) -> str | None:
        counted = ahead.counted_shared_memory(binary)
        more = binary["shared_memory"] > counted
        return f"{binary['shared_memory']} bytes, {counted} counted" if more else None

    assert failing([b for b in binaries if b["op"] == "attention"], over) == []


def test_registers_do_not_spill(binaries):
    def spilled(binary: dict[str, Any]) -> str | None:
        allowed = ahead.most_stack(binary)
        return f"{binary['stack']} bytes, {allowed} allowed" if binary["stack"] > allowed else None

    assert failing(binaries, spilled) == []


def test_products_of_narrow_types_run_on_tensor_cores(binaries):
    def missing(binary: dict[str, Any]) -> str | None:
        wanted = {90: "HGMMA", 100: "UTCHMMA"}.get(binary["arch"], "HMMA")
        units = {wanted, "HMMA"} if ahead.has_small_tiles(binary) else {wanted}
        is_narrow = binary["dtype"] != "float32" or ahead.is_tf32(binary)
        used = any(binary["instructions"][unit] for unit in units)
        return f"no {wanted}" if binary["has_dot"] and is_narrow and not used else None

    assert failing(binaries, missing) == []


def test_no_address_comes_from_a_32_bit_product(binaries):
    assert failing(binaries, lambda binary: binary["narrow_products"]) == []


def test_no_float_is_added_atomically(binaries):
    assert failing(binaries, lambda binary: binary["float_atomics"]) == []


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda path: path.stem)
def test_source_of_kernels(path):
    source = path.read_text()
    assert chained_dots(source) == []
    assert not re.search(r"\bautotune\b|\btl\.atomic_", source)


# The lint and the compiler itself, with planted faults.  A child runs them: here kernels are
# interpreted.

PLANTED = """
import sys
import torch, triton, triton.language as tl
from support.lint import float_atomics, narrow_products
from fastlm.kernels import _ahead
from fastlm.kernels._launch import launch, recorded

@triton.jit
def rows(x_ptr, out_ptr, stride, size, BLOCK: tl.constexpr, KIND: tl.constexpr):
    row = tl.program_id(0)
    if KIND == "wide":
        row = row.to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    if KIND == "late":
        start = (row * stride).to(tl.int64)
    elif KIND == "index":
        start = (row * size).to(tl.int64) * stride
    else:
        start = row * stride
    total = tl.zeros((BLOCK,), tl.float32)
    if KIND == "loop":
        for step in range(0, size):
            total += tl.load(x_ptr + step * stride + offsets)
    else:
        total += tl.load(x_ptr + start + offsets, mask=offsets < size, other=0.0)
    if KIND == "atomic":
        tl.atomic_add(out_ptr, tl.sum(total, 0))
    else:
        tl.store(out_ptr + tl.program_id(0).to(tl.int64) * BLOCK + offsets, total)

@triton.jit
def too_much(x_ptr, BLOCK: tl.constexpr):
    rows, cols = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    a = tl.load(x_ptr + rows * BLOCK + cols)
    b = tl.load(x_ptr + cols * BLOCK + rows)
    tl.store(x_ptr + rows * BLOCK + cols, tl.dot(a, b) + tl.dot(b, a))

x = torch.empty(4096, device="meta")
for kind in ("wide", "narrow", "late", "index", "loop", "atomic"):
    with recorded(run=False) as log:
        launch(rows, (4,), x, x, 1000, 50, BLOCK=64, KIND=kind, num_warps=1, num_stages=1)
    made = _ahead.compile_launch(log[0], 80)
    print(kind, len(narrow_products(made.ttir)), len(float_atomics(made.ttir)))
with recorded(run=False) as log:
    launch(too_much, (4,), x, BLOCK=128, num_warps=1, num_stages=1)
made = _ahead.compile_launch(log[0], 80)
print("spill", made.stack > 0, made.instructions["STL"] > 0)
with recorded(run=False) as log:
    for stride in (16, 17, 1, 2**31):
        launch(rows, (4,), x, x, stride, 50, BLOCK=64, KIND="wide", num_warps=1, num_stages=1)
print("keys", len({_ahead.specialize(call, 80).key for call in log}))
"""


def test_lint_and_compiler_see_planted_faults(tmp_path):
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    environment = ahead.compiling_environment()
    run = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "wide 0 0", "narrow 1 0", "late 1 0", "index 0 0", "loop 1 0", "atomic 1 1",
        "spill True True",
        # divisible by 16, not, one, and 64 bits wide
        "keys 4",
    ]  # fmt: skip


def test_two_dots_into_one_accumulator_are_seen():
    chained = "for i in range(4):\n    acc = tl.dot(a, b, acc)\n    acc += tl.dot(c, d)\n"
    assert chained_dots(chained) == ["line 1: acc"]
    apart = "for i in range(4):\n    s = tl.dot(a, b)\n    acc = tl.dot(s, v, acc)\n"
    nested = "for j in x:\n    for i in y:\n        acc += tl.dot(a, b)\n    dq += tl.dot(a, b)\n"
    assert chained_dots(apart) == chained_dots(nested) == []


def test_only_additions_of_floats_count_as_float_atomics():
    assert float_atomics("tt.atomic_rmw add, relaxed, gpu, %1") == []
    assert narrow_products("") == []


@pytest.mark.skipif(not _runtime.INTERPRETED, reason="needs Triton's interpreter")
def test_compiling_in_an_interpreting_process_is_refused():
    launch = ahead.launches("cross_entropy", torch.float32, 90)[0]
    with pytest.raises(RuntimeError, match="without TRITON_INTERPRET"):
        _ahead.specialize(launch, 90)


def test_triton_is_one_we_support():
    assert tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)
