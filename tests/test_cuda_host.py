"""The host shim, which runs CUDA C++ on a CPU: it computes, and it names planted bugs."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import pytest
from support.cuda_host import (
    CSRC,
    HOST,
    compiled,
    cuda_headers,
    linked,
    needed,
    program,
    run,
    shim,
    sources_in,
)

PLANTED = HOST / "planted.cu"


def floats(text: str) -> list[float]:
    return [float(word) for word in text.split()[:4]]


def line_of(bug: str) -> int:
    lines = PLANTED.read_text().splitlines()
    (found,) = [at for at, line in enumerate(lines, 1) if line.endswith(f"// bug: {bug}")]
    return found


SLOW = pytest.param("tsan", marks=pytest.mark.slow)
SUMS = [float(sum(i % 7 for i in range(64 * block, 64 * block + 64))) for block in range(4)]
# the first half of a warp stages 16 bytes each, the second zeros; all are read once
STAGED = float(sum(i % 7 for i in range(128)))
# of a product of matrices: element (m, n) counts 8 m + n + 1 times
PRODUCT = float(sum(
    (8 * m + n + 1) * ((16 * m + k) % 64 % 7) * ((8 * k + n) % 64 % 7)
    for m in range(16) for k in range(16) for n in range(8)
))  # fmt: skip


@pytest.mark.parametrize("variant", ["plain", "asan", SLOW])
@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_runs_correct_kernels(order, variant):
    planted = program(PLANTED, variant)
    for name, want in (
        ("block_sums", SUMS),
        ("dynamic_sums", SUMS),
        ("staged", [STAGED] * 4),
        ("halves_apart", [4.0] * 4),
        ("matrix_products", [PRODUCT] * 4),
    ):
        done = run(planted, name, order)
        assert (done.returncode, done.stderr) == (0, "")
        assert floats(done.stdout) == want, name
    done = run(planted, "atomics", order)
    assert (done.returncode, done.stderr) == (0, "")
    words = done.stdout.split()
    assert float(words[0]) == sum(SUMS)
    assert [int(word) for word in words[5:]] == [3, -3, 9]


@pytest.mark.parametrize("bug, message", [
    ("divergent_barrier", "divergent __syncthreads: other threads of the block wait at .*:{other}"),
    ("barrier_for_some", "a thread of the block ended while others wait in __syncthreads"),
    ("deadlock", "deadlock: no thread of the block can go on; this one waits in __syncthreads"),
    ("caller_not_in_mask", "the mask of a warp's function leaves out the lane that calls it"),
    ("source_not_in_mask", "a shuffle reads lane 20, which does not take part"),
    ("two_masks", "lanes of a warp disagree on the mask, others at .*:{line}"),
    ("two_functions", "lanes of a warp meet in different functions, others at"),
    ("too_much_shared", "more than 48 KiB of static shared memory"),
])  # fmt: skip
def test_names_a_bug_and_its_line(bug, message):
    line = line_of(bug)
    message = message.format(line=line, other=line - 2)
    done = run(program(PLANTED, "plain"), bug)
    assert done.returncode == 3
    assert re.search(rf"planted\.cu:{line}: {message}.* \[{bug}, block \(0, 0, 0\)", done.stderr)


@pytest.mark.parametrize("bug, message", [
    ("copies_never_waited_for", "the thread ended before it had waited for this copy"),
    ("misaligned_copy", "cp.async at an address that is no multiple of its size"),
])  # fmt: skip
def test_names_a_bug_of_an_asynchronous_copy(bug, message):
    done = run(program(PLANTED, "plain"), bug)
    assert done.returncode == 3
    assert re.search(rf"async_copy\.cuh:\d+: {message} \[{bug}, ", done.stderr)


@pytest.mark.parametrize("bug, message", [
    ("product_of_some_lanes",
     "a function of matrices needs all lanes of the warp, and some have ended"),
    ("product_on_two_ways", r"lanes of a warp meet in different functions, others at .*mma\.cuh"),
    ("misaligned_matrix", "ldmatrix at an address that is no multiple of 16"),
    ("matrix_beyond", "ldmatrix beyond the block's shared memory"),
    ("matrix_in_global_memory", "ldmatrix beyond the block's shared memory"),
])  # fmt: skip
def test_names_a_bug_of_a_product_of_matrices(bug, message):
    done = run(program(PLANTED, "plain"), bug)
    assert done.returncode == 3
    assert re.search(rf"mma\.cuh:\d+: {message}.* \[{bug}, ", done.stderr), done.stderr


@pytest.mark.parametrize("bug", ["wrong_leading_dimension", "wrong_fragment"])
def test_a_product_of_the_wrong_elements_is_another(bug):
    results = floats(run(program(PLANTED, "plain"), bug).stdout)
    assert len(results) == 4
    assert PRODUCT not in results


@pytest.mark.parametrize("bug", ["waits_for_too_few", "reads_shared_unwritten", "no_barrier"])
def test_memory_that_nothing_was_written_to_is_nan(bug):
    done = run(program(PLANTED, "plain"), bug)
    words = done.stdout.split()[4:]
    assert [struct.pack("i", int(word)) for word in words] == [b"\xff" * 4] * 4


def test_blocks_that_rely_on_each_other_show_in_another_order():
    planted = program(PLANTED, "plain")
    assert floats(run(planted, "reads_another_block", "forward").stdout) == [1, 2, 3, 4]
    assert floats(run(planted, "reads_another_block", "reverse").stdout) == [1, 1, 1, 1]


@pytest.mark.parametrize("name, message", [
    ("grid_too_wide", r"grid is too large \(grid \(2147483648, 1\), 64 threads"),
    ("grid_too_high", r"grid is too large \(grid \(1, 65536\), 64 threads"),
    ("block_too_large", r"invalid configuration argument \(grid \(1, 1\), 1056 threads"),
    ("no_threads", r"invalid configuration argument \(grid \(1, 1\), 0 threads"),
    ("shared_beyond",
     r"invalid argument .* 232449 bytes of shared memory a block, device 0\)"),
])  # fmt: skip
def test_a_launch_beyond_the_limits_says_what_and_which(name, message):
    done = run(program(PLANTED, "plain"), name)
    assert done.returncode == 3
    assert re.match(f"{name} did not start: {message}", done.stderr)


def test_shared_memory_up_to_227_kib_is_asked_for_by_name():
    assert floats(run(program(PLANTED, "plain"), "shared_by_name").stdout) == SUMS
    done = run(program(PLANTED, "plain"), "shared_not_asked_for")
    assert "dynamic shared memory that the launch did not ask for" in done.stderr


@pytest.mark.parametrize("bug, message", [
    ("reads_past_the_end", "AddressSanitizer: heap-buffer-overflow"),
    ("writes_past_shared", "AddressSanitizer: heap-buffer-overflow"),
    ("past_dynamic_shared", "AddressSanitizer: heap-buffer-overflow"),
    ("index_past_shared", r"index 64 out of bounds for type 'float \[64\]'"),
    ("misaligned_vector", "misaligned address .* which requires 16 byte alignment"),
])  # fmt: skip
def test_address_sanitizer_names_the_line(bug, message):
    done = run(program(PLANTED, "asan"), bug)
    assert done.returncode not in (0, 3)
    assert re.search(message, done.stderr)
    assert re.search(rf"planted\.cu:{line_of(bug)}\b", done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("bug", ["no_barrier", "reused_too_early", "blocks_add"])
def test_thread_sanitizer_names_the_line(bug):
    done = run(program(PLANTED, "tsan"), bug)
    assert done.returncode == 66
    assert re.search(rf"data race .*planted\.cu:{line_of(bug)} in {bug}", done.stderr)


@pytest.mark.slow
def test_runs_without_a_switch_of_its_own(tmp_path):
    """On machines for which fiber.cpp has no assembly, the C library switches stacks."""
    fiber = compiled(
        HOST / "shim" / "fiber.cpp", "-O2", "-DSHIM_UCONTEXT", reads=sources_in(HOST / "shim")
    )
    others = [path for path in shim() if path.name != "fiber.o"]
    planted = linked("planted-ucontext", [compiled(PLANTED, "-O2"), fiber, *others])
    assert floats(run(planted, "block_sums").stdout) == SUMS
    assert run(planted, "deadlock").returncode == 3


@pytest.mark.parametrize("code", ["__shared__ float x[3];"])
def test_refuses_what_it_cannot_run(code, tmp_path):
    source = tmp_path / "kernel.cu"
    source.write_text(f'#include "device.cuh"\n__global__ void kernel() {{ {code} }}\n')
    done = subprocess.run(
        [needed("g++"), "-std=c++17", "-I", str(CSRC), "-I", str(HOST), "-isystem",
         str(cuda_headers()), "-x", "c++", "-fsyntax-only", str(source)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode
    assert "shared memory is declared by FASTLM_SHARED" in done.stderr


def test_the_planted_kernels_are_cuda():
    """What g++ runs here, nvcc compiles for a GPU."""
    nvcc = needed("nvcc")
    command = [nvcc, "-std=c++17", "-arch=sm_80", "-I", str(CSRC), "-I", str(HOST), "-ptx",
               "-o", str(Path("/dev/null")), str(PLANTED)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
