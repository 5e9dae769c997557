"""Build fastlm: pure Python; with FASTLM_BUILD_CUDA=1 the extension ``fastlm._C`` (docs/cuda.md).

Nothing here imports torch, so building needs setuptools alone; the extension ninja and pybind11.
"""

import os
import runpy
import shutil
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# Folders beside fastlm/ that are imported from inside it.  An installed top-level ``kernels``
# would shadow the package of that name on the registry.
MOUNTED = {"fastlm.kernels": "kernels", "fastlm.benchmarks": "benchmarks"}

mounted_packages = [
    package
    for name, folder in MOUNTED.items()
    for package in [name, *(f"{name}.{child}" for child in find_packages(folder))]
]


class BuildCuda(build_ext):
    """Leaves the compiling to csrc/build.py."""

    def build_extension(self, ext: Extension) -> None:
        build = runpy.run_path(str(Path(__file__).parent / "csrc" / "build.py"))["build"]
        built = build(Path(self.build_temp).resolve() / "csrc")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, target)


extension: dict[str, Any] = {}
if os.environ.get("FASTLM_BUILD_CUDA") == "1":
    extension = {
        "ext_modules": [Extension("fastlm._C", sources=[])],
        "cmdclass": {"build_ext": BuildCuda},
    }

setup(
    packages=[*find_packages(include=["fastlm", "fastlm.*"]), *mounted_packages],
    package_dir={"fastlm": "fastlm", **MOUNTED},
    **extension,
)
