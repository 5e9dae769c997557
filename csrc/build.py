"""Build ``fastlm._C`` with ninja: every .cu by nvcc, the bindings by the host's compiler, no torch.

    python csrc/build.py build/csrc              # what setup.py does with FASTLM_BUILD_CUDA=1
    python csrc/build.py build/csrc --archs 80   # for one architecture

FASTLM_CUDA_ARCHS lists the architectures, ``90a`` or ``100+PTX``, the latter for newer GPUs too.
FASTLM_CUDA_FLOAT64=1 adds the kernels of float64, for tests of derivatives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

CSRC = Path(__file__).resolve().parent
DEFAULT_ARCHS = "75;80;90a;100+PTX"
# Spills and arrays in local memory are errors: a kernel that needs them is to be written anew.
NVCC_FLAGS = (
    "-std=c++17", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-fPIC,-Wall,-Wextra",
    "-Xptxas", "-v,-Werror,-warn-spills,-warn-lmem-usage",
)  # fmt: skip
CXX_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")


class BuildError(Exception):
    """The extension cannot be built here."""


def cuda_home() -> Path:
    """The folder of the CUDA toolkit: CUDA_HOME, or that of nvcc on the PATH."""
    named = os.environ.get("CUDA_HOME")
    if named:
        return Path(named)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise BuildError("fastlm._C needs nvcc: put it on PATH, or set CUDA_HOME")
    # nvcc may be reached through a link or a script elsewhere; it says where it is
    told = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull],
        capture_output=True, text=True,
    ).stderr  # fmt: skip
    tops = [line.partition("TOP=")[2] for line in told.splitlines() if "TOP=" in line]
    return Path(tops[0]).resolve() if tops else Path(nvcc).resolve().parents[1]


def gencodes(archs: str) -> list[str]:
    """nvcc's flags for ``80;90a;100+PTX``."""
    flags = []
    for arch in archs.split(";"):
        number = arch.removesuffix("+PTX")
        if not number.removesuffix("a").isdigit() or (arch != number and number.endswith("a")):
            raise BuildError(f"FASTLM_CUDA_ARCHS must be like {DEFAULT_ARCHS}, got {archs!r}")
        codes = f"sm_{number}" if arch == number else f"[sm_{number},compute_{number}]"
        flags += ["-gencode", f"arch=compute_{number},code={codes}"]
    return flags


def extension_name() -> str:
    return f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def ninja_file(archs: str) -> str:
    """The whole build; paths of outputs are relative to the folder it runs in."""
    import pybind11

    home = cuda_home()
    includes = [CSRC, pybind11.get_include(), sysconfig.get_path("include")]
    where = " ".join(f"-isystem {_quoted(path)}" for path in includes[1:])
    sources = sorted(CSRC.glob("*.cu"))
    objects = " ".join(f"{source.stem}.o" for source in sources)
    cxx = os.environ.get("CXX", "c++")
    chosen = ["-DFASTLM_WITH_FLOAT64"] if os.environ.get("FASTLM_CUDA_FLOAT64") == "1" else []
    cxx_flags = [*CXX_FLAGS, *chosen, f"-DFASTLM_ARCHS='\"{archs}\"'"]
    lines = [
        "rule nvcc",
        f"  command = {_quoted(home / 'bin' / 'nvcc')} {' '.join([*NVCC_FLAGS, *chosen])} "
        f"{' '.join(gencodes(archs))} -MMD -MF $out.d -c $in -o $out > $out.log 2>&1 || "
        "(cat $out.log; exit 1)",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule cxx",
        f"  command = {cxx} {' '.join(cxx_flags)} {where} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        # the static runtime: nothing to find, and nothing to clash with torch's own
        f"  command = {_quoted(home / 'bin' / 'nvcc')} -shared -cudart static $in -o $out",
        *(f"build {source.stem}.o: nvcc {_quoted(source)}" for source in sources),
        f"build bindings.o: cxx {_quoted(CSRC / 'bindings.cpp')}",
        f"build {extension_name()}: link bindings.o {objects}",
        f"default {extension_name()}",
        "",
    ]
    return "\n".join(lines)


def _quoted(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ")


def build(folder: Path, archs: str | None = None) -> Path:
    """Build into ``folder``; returns the path of the extension.

    Raises:
        BuildError: nvcc, ninja or pybind11 is missing, or a compiler failed.
    """
    archs = archs or os.environ.get("FASTLM_CUDA_ARCHS") or DEFAULT_ARCHS
    ninja = shutil.which("ninja")
    if ninja is None:
        raise BuildError("fastlm._C needs ninja: pip install ninja pybind11")
    try:
        text = ninja_file(archs)
    except ModuleNotFoundError:
        raise BuildError("fastlm._C needs pybind11: pip install ninja pybind11") from None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(text)
    if subprocess.run([ninja, "-C", str(folder)]).returncode:
        raise BuildError("fastlm._C was not built: see the compiler's messages above")
    return folder / extension_name()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--archs", default=None)
    options = parser.parse_args()
    try:
        print(build(options.folder, options.archs))
    except BuildError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
