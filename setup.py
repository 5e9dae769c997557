"""Build fastlm: pure Python.  Nothing here imports torch, so building needs setuptools alone."""

from setuptools import find_packages, setup

# Folders beside fastlm/ that are imported from inside it.  An installed top-level ``kernels``
# would shadow the package of that name on the registry.
MOUNTED = {"fastlm.kernels": "kernels", "fastlm.benchmarks": "benchmarks"}

mounted_packages = [
    package
    for name, folder in MOUNTED.items()
    for package in [name, *(f"{name}.{child}" for child in find_packages(folder))]
]

setup(
    packages=[*find_packages(include=["fastlm", "fastlm.*"]), *mounted_packages],
    package_dir={"fastlm": "fastlm", **MOUNTED},
)
