"""Wheel, sdist, plain and editable install hold the same package; building needs no torch."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import fastlm

ROOT = Path(__file__).parent.parent
MOUNTED = {"fastlm.kernels": "kernels", "fastlm.benchmarks": "benchmarks"}
SOURCES = (".py", ".md", ".sh", ".cu", ".cuh", ".cpp", ".h")
NOT_SOURCE = (".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "results")

# Prints the modules an installation offers, without importing any of them but fastlm.
LIST_MODULES = """
import importlib.resources, importlib.util, json, pkgutil
def below(name):
    spec = importlib.util.find_spec(name)
    return walk(name, list(spec.submodule_search_locations))
def walk(name, paths):
    found = [name]
    for info in pkgutil.iter_modules(paths):
        child = f"{name}.{info.name}"
        inner = [f"{path}/{info.name}" for path in paths]
        found += walk(child, inner) if info.ispkg else [child]
    return found
roots = ["fastlm", "fastlm.kernels", "fastlm.benchmarks"]
print(json.dumps({
    "modules": sorted({module for root in roots for module in below(root)}),
    "shadows": [name for name in ("kernels", "benchmarks") if importlib.util.find_spec(name)],
    "file": importlib.util.find_spec("fastlm").origin,
    "typed": importlib.resources.files("fastlm").joinpath("py.typed").is_file(),
}))
"""


def python(*args: object, executable: object = sys.executable, **kwargs: object) -> str:
    """Run Python without the current directory on its path; returns what it printed."""
    done = subprocess.run(
        [str(executable), "-P", *map(str, args)], capture_output=True, text=True, **kwargs
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def modules_of_the_tree(root: Path = ROOT) -> list[str]:
    """Every module that an installation must offer, read off the files."""
    names = []
    for name, folder in {"fastlm": "fastlm", **MOUNTED}.items():
        for path in (root / folder).rglob("*.py"):
            parts = path.relative_to(root / folder).with_suffix("").parts
            names.append(".".join([name, *(part for part in parts if part != "__init__")]))
    return sorted(names)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, so that nothing is built into the checkout."""
    copy = tmp_path_factory.mktemp("source") / "fastlm"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    return copy


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Wheel and sdist, built where importing torch fails."""
    trap = tmp_path_factory.mktemp("trap")
    (trap / "torch.py").write_text("raise SystemExit('the build imports torch')")
    hooks = "from setuptools import build_meta; print(build_meta.build_{}('dist'))"
    found = {}
    for kind in ("wheel", "sdist"):
        output = python("-c", hooks.format(kind), cwd=source, env={"PYTHONPATH": str(trap)})
        found[kind] = source / "dist" / output.splitlines()[-1]
    return found


@pytest.fixture(params=["wheel", "sdist", "plain", "editable"])
def installed(request, built, source, tmp_path) -> Path:
    """The Python of a new environment with fastlm installed in one of the four ways."""
    what = {
        "wheel": [built["wheel"]], "sdist": [built["sdist"]],
        "plain": [source], "editable": ["-e", source],
    }[request.param]  # fmt: skip
    return environment(tmp_path / "venv", *what)


def environment(folder: Path, *what: object) -> Path:
    """A new environment that has ``what`` installed and sees the packages of this one."""
    python("-m", "venv", "--without-pip", folder)
    executable = folder / "bin" / "python"
    packages = next((folder / "lib").glob("python*/site-packages"))
    (packages / "packages.pth").write_text(sysconfig.get_path("purelib"))
    python(
        "-m", "pip", "--python", executable, "install", "--quiet", "--force-reinstall", "--no-deps",
        "--no-build-isolation", "--no-index", "--disable-pip-version-check", *what,
    )  # fmt: skip
    return executable


def test_offers_every_module_of_the_tree(installed, tmp_path):
    found = json.loads(python("-c", LIST_MODULES, executable=installed, cwd=tmp_path))
    assert found["modules"] == modules_of_the_tree()
    assert found["shadows"] == [], "a top-level package of ours would shadow somebody else's"
    assert found["typed"]
    assert not found["file"].startswith(str(ROOT)), "the copy under test is not the installed one"


def test_every_module_of_the_wheel_imports(built, tmp_path):
    executable = environment(tmp_path / "venv", built["wheel"])
    script = f"import importlib; [importlib.import_module(m) for m in {modules_of_the_tree()}]"
    python("-c", script, executable=executable, cwd=tmp_path)


def test_wheel_is_pure_python_and_holds_no_results(built):
    assert built["wheel"].name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(built["wheel"]).namelist()
    strangers = [n for n in names if not n.endswith(".py") and ".dist-info/" not in n]
    assert strangers == ["fastlm/py.typed"]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_holds_what_tests_and_benchmarks_need(built, source):
    with tarfile.open(built["sdist"]) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    missing = {
        str(path.relative_to(source))
        for folder in ("fastlm", "kernels", "csrc", "benchmarks", "tests", "docs")
        for path in (source / folder).rglob("*")
        if path.suffix in SOURCES and "results" not in path.parts
    } - names
    assert not missing
    assert {"LICENSE", "CHANGELOG.md", "README.md", "Makefile", "constraints.txt"} <= names


def test_metadata_names_floors_only(built, tmp_path):
    with zipfile.ZipFile(built["wheel"]) as wheel:
        wheel.extractall(tmp_path)
    (distribution,) = importlib.metadata.distributions(path=[str(tmp_path)])
    assert distribution.version == fastlm.__version__
    assert distribution.metadata["License-Expression"] == "Apache-2.0"
    assert distribution.metadata["Requires-Python"] == ">=3.11"
    commands = {entry.name: entry.value for entry in distribution.entry_points}
    assert commands == {"fastlm": "fastlm.cli:main"}
    requirements = [Requirement(text) for text in distribution.requires or []]
    for requirement in requirements:
        assert all(spec.operator == ">=" for spec in requirement.specifier), str(requirement)
    core = {r.name for r in requirements if r.marker is None}
    common = {"numpy", "safetensors", "tokenizers", "tyro", "rich", "pyyaml", "jinja2"}
    assert core == {"torch", *common}


def test_version_has_one_source():
    literal = re.compile(rf"[\"']{re.escape(fastlm.__version__)}[\"']")
    files = [ROOT / "setup.py", ROOT / "pyproject.toml", *(ROOT / "fastlm").rglob("*.py")]
    assert [p.name for p in files if literal.search(p.read_text())] == ["__init__.py"]


@pytest.mark.parametrize("statement", ["import fastlm; dir(fastlm)", "import fastlm.cli"])
def test_importing_loads_nothing_heavy(statement):
    heavy = {"torch", "triton", "transformers", "matplotlib", "numpy", "tyro", "rich"}
    loaded = python("-c", f"{statement}\nimport sys; print(*sys.modules)").split()
    assert not heavy & set(loaded)


def test_every_public_name_can_be_fetched():
    for name in fastlm.__all__:
        assert getattr(fastlm, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        fastlm.nonsense  # noqa: B018


def test_help_answers_in_half_a_second():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        python("-c", "import sys, fastlm.cli; sys.exit(fastlm.cli.main(['--help']))")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


def test_every_pinned_version_satisfies_our_floors():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for extra in project["optional-dependencies"].values() for text in extra]
    for text in project["dependencies"] + extras:
        requirement = Requirement(text)
        if requirement.name != "fastlm":
            assert requirement.specifier.contains(pins[requirement.name.lower()]), text
