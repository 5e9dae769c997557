"""The CUDA C++ kernels of cross_entropy, run on a CPU: addresses, races, bits.

What they compute is tested with the other backends, in test_cross_entropy.py.
"""

from __future__ import annotations

import pytest
from support.cuda_host import HOST, program, run

DRIVER = HOST / "check_cross_entropy.cpp"


@pytest.mark.parametrize("variant", ["plain", "asan"])
@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_stays_inside_its_blocks_of_memory(order, variant):
    done = run(program(DRIVER, variant), order)
    assert (done.returncode, done.stderr) == (0, "")
    assert "512 launches" in done.stdout


@pytest.mark.slow
def test_has_no_races():
    done = run(program(DRIVER, "tsan"), "small")
    assert (done.returncode, done.stderr) == (0, "")
    assert "8 launches" in done.stdout
