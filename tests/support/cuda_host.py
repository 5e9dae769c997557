"""Build csrc/ against tests/cuda_host, which runs CUDA C++ on a CPU, and what is tested with it.

g++ compiles everything, with CUDA's headers.  Objects and programs are kept below build/cuda_host
under a name made of all that they depend on, so that nothing is built twice, whoever asks.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest
from support.memory import in_child
from support.mutants import Mutant

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
HOST = ROOT / "tests" / "cuda_host"
CACHE = ROOT / "build" / "cuda_host"

FLAGS = (
    "-std=c++17", "-g", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
    "-fno-strict-aliasing",  # 16 bytes are loaded as such, whatever the elements
    "-DFASTLM_WITH_FLOAT64",
)  # fmt: skip
VARIANTS = {
    "plain": ("-O2",),
    "asan": ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "tsan": ("-O1", "-fsanitize=thread"),
}
# what a sanitizer ends a program with
SANITIZER_OPTIONS = {"TSAN_OPTIONS": "exitcode=66", "ASAN_OPTIONS": "exitcode=66"}

NEEDS = "CUDA C++ on this machine needs"


def build_py() -> dict[str, Any]:
    """What csrc/build.py defines."""
    return runpy.run_path(str(CSRC / "build.py"))


@functools.cache
def cuda_headers() -> Path:
    """The toolkit's headers, or those that come with Triton."""
    build, places = build_py(), []
    with contextlib.suppress(build["BuildError"]):
        places.append(build["cuda_home"]() / "include")
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "include")
    for place in places:
        if (place / "cuda_bf16.h").exists():
            return place
    missing("CUDA headers, those of a toolkit or those that come with Triton")


def needed(program: str) -> str:
    """The path of a program without which the test cannot run."""
    return shutil.which(program) or missing(program)


def missing(what: str) -> NoReturn:
    """Fails in CI, where everything must run, and skips elsewhere."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{NEEDS} {what}")


def sources_in(*folders: Path) -> list[Path]:
    """Everything that a compiler may read there."""
    kinds = (".cu", ".cuh", ".cpp", ".h")
    return [path for f in folders for path in sorted(f.rglob("*")) if path.suffix in kinds]


def _made(name: str, reads: Sequence[Path], words: Sequence[object], make: Callable) -> Path:
    """The file that ``make(path)`` writes, which depends on the files it reads and on words."""
    state = hashlib.sha256(repr([*map(str, words), sys.version]).encode())
    for path in reads:
        state.update(path.name.encode() + path.read_bytes())
    folder = CACHE / state.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be making it
        if not path.exists():
            half_done = folder / f"{name}.new"
            make(half_done)
            half_done.rename(path)
    return path


def _run(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")


def compiled(
    source: Path, *flags: str, csrc: Path = CSRC, reads: Sequence[Path] | None = None
) -> Path:
    """The object of one file; ``reads`` are the files it includes, by default all of both."""
    if reads is None:
        reads = sources_in(csrc, HOST)
    if csrc != CSRC:
        flags += ("-w", "-g0")  # a bug may leave something unused
    command = [needed("g++"), *FLAGS, *flags, "-isystem", cuda_headers(), "-I", HOST]

    def make(path: Path) -> None:
        _run(*command, "-I", csrc, "-x", "c++", "-c", source, "-o", path)

    return _made(f"{source.stem}.o", [source, *reads], command, make)


def linked(name: str, objects: Sequence[Path], *flags: str) -> Path:
    command = [needed("g++"), *flags]

    def make(path: Path) -> None:
        _run(*command, *objects, "-o", path)

    return _made(name, objects, command, make)


def shim() -> list[Path]:
    """The objects that stand for a GPU, never sanitized."""
    shim_sources = sources_in(HOST / "shim")
    return [
        compiled(source, "-O2", reads=shim_sources)
        for source in shim_sources
        if source.suffix == ".cpp"
    ]


def program(source: Path, variant: str, csrc: Path = CSRC) -> Path:
    """A program that launches kernels by itself, in one of the three variants.

    One that checks an op, ``check_<op>.cpp``, has the launchers of that op.
    """
    flags = VARIANTS[variant]
    sources = (source, *sorted(csrc.glob(f"{source.stem.removeprefix('check_')}*.cu")))
    objects = [compiled(path, *flags, csrc=csrc) for path in sources]
    return linked(f"{source.stem}-{variant}", [*objects, *shim()], *flags)


def run(path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(path), *words], capture_output=True, text=True, env={**os.environ, **SANITIZER_OPTIONS}
    )


def host_module(csrc: Path = CSRC) -> ModuleType:
    """``fastlm._C`` made of the sources in ``csrc``, for CPU tensors."""
    return loaded(host_library(csrc))


def loaded(library: Path) -> ModuleType:
    # a name of its own: of two modules of one name pybind11 hands out the first again
    name = f"{library.parent.name}._C"
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    spec = importlib.util.spec_from_file_location(name, library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def host_library(csrc: Path = CSRC) -> Path:
    if importlib.util.find_spec("pybind11") is None:
        missing("pybind11")
    pybind11 = importlib.import_module("pybind11")
    bindings = compiled(
        csrc / "bindings.cpp", "-O0", "-DFASTLM_HOST", '-DFASTLM_ARCHS="host"',
        "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include"),
        csrc=csrc, reads=sorted(csrc.glob("*.h")),
    )  # fmt: skip
    kernels = [compiled(path, "-O2", csrc=csrc) for path in sorted(csrc.glob("*.cu"))]
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    return linked(name, [bindings, *kernels, *shim()], "-shared")


@contextlib.contextmanager
def in_place_of_the_extension(module: ModuleType) -> Iterator[ModuleType]:
    """``fastlm._C`` is ``module``."""
    before = sys.modules.get("fastlm._C")
    sys.modules["fastlm._C"] = module
    try:
        yield module
    finally:
        del sys.modules["fastlm._C"]
        if before is not None:
            sys.modules["fastlm._C"] = before


@contextlib.contextmanager
def mutated(mutant: Mutant) -> Iterator[Path]:
    """A copy of csrc/ with a planted bug."""
    source = (ROOT / mutant.file).read_text()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "csrc"
        shutil.copytree(CSRC, copy, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / Path(mutant.file).name).write_text(source.replace(mutant.old, mutant.new))
        yield copy


def killed(mutant: Mutant, check: Callable[[], object]) -> bool:
    """Whether ``check``, which passes without the bug, fails with it in place of ``fastlm._C``."""
    with mutated(mutant) as csrc:
        library = host_library(csrc)

        def check_mutant() -> None:
            with in_place_of_the_extension(loaded(library)):
                check()

        try:
            in_child(check_mutant)
        except AssertionError:
            return True
    return False


@contextlib.contextmanager
def only_block(module: ModuleType, number: int) -> Iterator[None]:
    """Of every grid this block alone runs, where all would take too long."""
    assert module.__file__ is not None
    library = ctypes.CDLL(module.__file__)
    library.shim_set_blocks.argtypes = [ctypes.c_ulong, ctypes.c_ulong]
    library.shim_set_blocks(number, number + 1)
    try:
        yield
    finally:
        library.shim_set_blocks(0, 2**64 - 1)


@contextlib.contextmanager
def ordered(module: ModuleType, order: str, seed: int = 0) -> Iterator[None]:
    """Blocks, and threads of each, run ``"forward"``, in ``"reverse"`` or in ``"random"`` order."""
    assert module.__file__ is not None
    library = ctypes.CDLL(module.__file__)
    library.shim_set_order(["forward", "reverse", "random"].index(order), seed)
    try:
        yield
    finally:
        library.shim_set_order(0, 0)
