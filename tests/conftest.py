"""What tests share: a device, an honest interpreter, poisoned memory, processes, counted skips."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    # before triton is imported: @triton.jit reads it when a kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"

from support import cuda_host, interpreter  # noqa: E402
from support.poison import poisoned  # noqa: E402
from support.ranks import Ranks  # noqa: E402

from fastlm.ops.cuda._extension import extension  # noqa: E402

# More skipped tests than this fail a run on CPU: a test that silently stops running is no test.
# Those for want of a compiler, which fail in CI, do not count.
MOST_SKIPS = 0

if not ON_GPU:
    interpreter.install()


@pytest.fixture(scope="session")
def device() -> str:
    """``"cuda"`` with real kernels where there is a GPU, else ``"cpu"`` with interpreted ones."""
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture(scope="session", autouse=True)
def _bfloat16_rounds(device: str) -> None:
    interpreter.check_bfloat16(device)


@pytest.fixture(scope="session", autouse=True)
def _empty_memory_is_poisoned(_bfloat16_rounds: None) -> Iterator[None]:
    with poisoned():
        yield


@pytest.fixture(autouse=True)
def _same_random_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_is_compiled_before() -> None:
    """torch.compile counts what it makes of a function over all tests of a process, up to 8."""
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()


@pytest.fixture(scope="session")
def _host_extension() -> ModuleType:
    return cuda_host.host_module()


@pytest.fixture(autouse=True)
def _cuda_kernels_run_on_this_machine(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test with backend "cuda" finds the extension: on CPU the one that the host shim runs."""
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    if parameters.get("backend") != "cuda":
        yield
    elif ON_GPU:
        if isinstance(reason := extension(), str):
            pytest.skip(reason)
        yield
    else:
        module = request.getfixturevalue("_host_extension")
        with cuda_host.in_place_of_the_extension(module):
            yield


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    """Processes in one group, as the next two; started when the first of a module's tests asks."""
    with contextlib.closing(Ranks(2)) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def three() -> Iterator[Ranks]:
    with contextlib.closing(Ranks(3)) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    with contextlib.closing(Ranks(4)) as ranks:
        yield ranks


def _skips(terminal: Any) -> Counter[str]:
    return Counter(report.longrepr[2] for report in terminal.stats.get("skipped", []))


def _uncalled_for(skips: Counter[str]) -> int:
    return sum(n for reason, n in skips.items() if cuda_host.NEEDS not in reason)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    skips = _skips(terminalreporter)
    for reason, count in sorted(skips.items()):
        terminalreporter.write_line(f"skipped {count}: {reason}")
    count = _uncalled_for(skips)
    if not ON_GPU and count > MOST_SKIPS:
        terminalreporter.write_line(f"{count} skips, {MOST_SKIPS} allowed", red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if (
        terminal
        and not ON_GPU
        and _uncalled_for(_skips(terminal)) > MOST_SKIPS
        and session.exitstatus == 0
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
