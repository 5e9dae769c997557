"""Where lines of code may live: who imports whom, which words belong to which file."""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import re
import sys
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LONGEST_FILE = 600

# Lowest first.  A module may import its own layer's folder and the layers below, never one above.
LAYERS = [
    ("fastlm.kernels", "fastlm.ops.reference"),
    ("fastlm.ops.eager", "fastlm.ops.cuda"),
    ("fastlm.ops",),
    ("fastlm.compat",),
    ("fastlm.functional",),
    ("fastlm.nn",),
    ("fastlm._errors",),
    ("fastlm.model",),
    ("fastlm.inference",),
    ("fastlm.training",),
    ("fastlm.hf",),
    ("fastlm.finetuning",),
    ("fastlm.testing",),
    ("fastlm.benchmarks",),
    ("fastlm.cli",),
    ("fastlm.__main__",),
]
# These alone may use the lazy names at the top of fastlm, which hide what is imported.
TOP = ("fastlm.cli", "fastlm.benchmarks", "fastlm.__main__")

# Words of code (comments and strings do not count) -> the only files that may hold them.
ROOMS = {
    r"\btorch\.library\b": ["fastlm/ops/_define.py", "fastlm/compat/provider.py"],
    r"\bautograd\.Function\b": ["fastlm/ops/*.py"],
    r"\bsave_for_backward\b": ["fastlm/ops/*.py"],
    r"^\s*raise\b": ["fastlm/**/*.py", "benchmarks/*.py", "kernels/_*.py"],
    r"^\s*(import|from) triton\b": ["kernels/**/*.py", "benchmarks/_harness.py"],
    r"\bos\.environ\b|\bgetenv\b": ["kernels/_runtime.py", "fastlm/ops/_checked.py"],
    r"\bget_device_(capability|properties)\b": [
        "kernels/_runtime.py", "fastlm/cli/doctor.py", "benchmarks/*.py",
    ],
    r"\bnum_(warps|stages)=\d": ["kernels/*/tuning.py", "kernels/_*.py"],
    r"\.(item|tolist)\(": [
        "fastlm/ops/reference/*.py", "fastlm/ops/_tolerance.py", "fastlm/ops/_checked.py",
        "fastlm/testing.py", "fastlm/inference/*.py", "fastlm/model/*.py", "fastlm/training/*.py",
        "fastlm/cli/*.py", "benchmarks/*.py", "kernels/_ahead.py",
    ],
    r"\bprint\(": [
        "fastlm/cli/*.py", "fastlm/hf/instance.py", "fastlm/training/*.py", "benchmarks/*.py",
    ],
    r"\bexcept\s*:|\bexcept \(?(Base)?Exception\b": [],
    r"\btriton\.autotune\b|\bautotune\b": [],
    r"(?<!safetensors\.)\btorch\.(load|save)\b|\bpickle\b": [],
    r"\bsys\.path\b": [],
    r"\b(eval|exec)\(": [],
}  # fmt: skip

CPP = (".cu", ".cuh", ".cpp", ".h")

# Anything that ties a file to one machine or one registry, or that was left for later.
NOWHERE = r"index-url|find-links|https?://[^ ]*(pypi|pythonhosted)|\bTO" + r"DO\b|\bFIX" + r"ME\b"
MACHINE_PATHS = r"(?<![\w.])/(work|home|opt|root|Users)/"


@cache
def package_files() -> list[Path]:
    folders = ("fastlm", "kernels", "benchmarks")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def all_files() -> list[Path]:
    folders = ("fastlm", "kernels", "csrc", "benchmarks", "examples", "tests", "docs", ".ci")
    inside = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    text = {".py", ".md", ".sh", ".toml", ".txt", ".in", ".yaml", "", *CPP}
    return sorted(
        path
        for path in [*inside, *ROOT.glob("*")]
        if path.is_file()
        and path.suffix in text
        and path.name != "LICENSE"
        and not any(part.startswith(".") and part != ".ci" for part in path.relative_to(ROOT).parts)
    )


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_only(path: Path) -> str:
    """The file without comments and strings, line by line as it was."""
    lines = path.read_text().splitlines(keepends=True)
    dropped = {tokenize.COMMENT, tokenize.STRING}
    rows = [list(line) for line in lines]
    for token in tokenize.generate_tokens(io.StringIO("".join(lines)).readline):
        if token.type not in dropped:
            continue
        (first, begin), (last, end) = token.start, token.end
        for row in range(first, last + 1):
            stop = end if row == last else len(rows[row - 1])
            for column in range(begin if row == first else 0, stop):
                if rows[row - 1][column] != "\n":
                    rows[row - 1][column] = " "
    return "".join("".join(row) for row in rows)


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in ("kernels", "benchmarks"):
        parts.insert(0, "fastlm")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> tuple[int, str]:
    """Position and name of the layer; the longest matching name wins."""
    found = [
        (len(name), position, name)
        for position, names in enumerate(LAYERS)
        for name in names
        if f"{module}.".startswith(f"{name}.")
    ]
    assert found, f"{module} belongs to no layer"
    _, position, name = max(found)
    return position, name


def imported_by(path: Path) -> list[tuple[int, str]]:
    """Line and absolute name of everything a file imports."""
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.rsplit(".", node.level - 1)[0]
                base = f"{above}.{base}".rstrip(".")
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


@pytest.mark.parametrize("path", package_files(), ids=shown)
def test_imports_point_down(path):
    module = module_name(path)
    if module == "fastlm":
        return  # the lazy names: TYPE_CHECKING imports and nothing else, see test_package.py
    here, folder = layer_of(module)
    for line, name in imported_by(path):
        place = f"{shown(path)}:{line} imports {name}"
        top = name.split(".")[0]
        assert top not in ("kernels", "benchmarks", "tests", "support"), place
        if top != "fastlm":
            continue
        if name in ("fastlm", "fastlm.__version__"):
            assert folder in TOP, f"{place}: the lazy names hide what is imported"
            continue
        # from fastlm import nn: a submodule; from fastlm import CausalLM: a lazy name
        if name.count(".") == 1 and not is_module(name):
            assert folder in TOP, f"{place}: the lazy names hide what is imported"
            continue
        there, target = layer_of(name)
        assert target == folder or there < here, f"{place}, which is not below it"


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists() or name == "fastlm.kernels"


@pytest.mark.parametrize(
    ("folder", "others"),
    [("kernels", {"torch", "triton"}), ("fastlm/ops/reference", {"torch"})],
)
def test_lowest_layers_import_no_other_library(folder, others):

    for path in (ROOT / folder).rglob("*.py"):
        for line, name in imported_by(path):
            top = name.split(".")[0]
            allowed = {"fastlm", *others, *sys.stdlib_module_names}
            assert top in allowed, f"{shown(path)}:{line} imports {name}"


def test_benchmarks_and_tests_do_not_import_each_other():
    for path in (ROOT / "tests").rglob("*.py"):
        tree = ast.parse(path.read_text())
        names = [
            alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names
        ]
        names += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        for name in names:
            assert name.split(".")[0] not in ("kernels", "benchmarks"), f"{shown(path)}: {name}"
            assert not name.startswith("fastlm.benchmarks"), f"{shown(path)}: {name}"


@pytest.mark.parametrize("pattern", ROOMS)
def test_words_stay_in_their_room(pattern):
    allowed = {path for glob in ROOMS[pattern] for path in ROOT.glob(glob)}
    strangers = [
        shown(path)
        for path in package_files()
        if path not in allowed and re.search(pattern, code_only(path), re.MULTILINE)
    ]
    assert not strangers, f"{pattern} belongs in {ROOMS[pattern] or 'no file'}"


@pytest.mark.parametrize("pattern", [NOWHERE, MACHINE_PATHS])
def test_no_file_is_tied_to_a_machine_or_left_for_later(pattern):
    strangers = [
        f"{shown(path)}:{number}"
        for path in all_files()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not strangers


def test_no_file_is_too_long():
    too_long = {
        shown(path): length
        for path in all_files()
        if path.suffix in (".py", *CPP)
        and (length := len(path.read_text().splitlines())) > LONGEST_FILE
    }
    assert not too_long


def test_every_kernel_folder_has_the_same_doors():
    for folder in sorted(path for path in (ROOT / "kernels").iterdir() if path.is_dir()):
        if folder.name == "__pycache__":
            continue
        assert (folder / "launch.py").exists(), f"{shown(folder)} has no launch.py"
        assert (folder / "tuning.py").exists(), f"{shown(folder)} has no tuning.py"
        code = "".join(code_only(path) for path in folder.glob("*.py"))
        assert re.search(r"\blaunch\(", code), (
            f"{shown(folder)}: kernels start through the one launcher"
        )
        assert not re.search(r"\w+_kernel\[", code), f"{shown(folder)} starts a kernel by itself"


def backends_of_ops():
    modules = [path.stem for path in sorted((ROOT / "fastlm/ops").glob("[a-z]*.py"))]
    for name in modules:
        op = importlib.import_module(f"fastlm.ops.{name}")
        for backend, module in getattr(op, "BACKENDS", {}).items():
            yield pytest.param(op.BACKENDS["reference"], module, id=f"{name}-{backend}")


@pytest.mark.parametrize(("reference", "backend"), list(backends_of_ops()))
def test_backends_take_the_arguments_of_the_reference(reference, backend):
    definition = importlib.import_module(reference)
    implementation = importlib.import_module(backend)
    steps = [
        name.removesuffix("_refuses") for name in vars(definition) if name.endswith("_refuses")
    ]
    assert steps
    for step in steps:
        wanted = inspect.signature(getattr(definition, step)).parameters
        got = inspect.signature(getattr(implementation, step)).parameters
        assert list(got) == list(wanted), f"{backend}.{step}"
        defaults = [name for name, p in got.items() if p.default is not p.empty]
        assert not defaults, f"{backend}.{step}: defaults live in the public function"
        assert callable(getattr(implementation, f"{step}_refuses"))
    for step in steps:
        for kind in ("truth", "plain"):
            assert callable(getattr(definition, f"{kind}_{step}"))


def test_public_functions_promise_arguments_results_and_errors():
    functional = importlib.import_module("fastlm.functional")
    for name, op in functional.OPS.items():
        promise = inspect.getdoc(op) or ""
        # a special case of another op leaves the rest to it
        if any(f":func:`{other}`" in promise for other in functional.OPS):
            continue
        for section in ("Args:", "Returns:", "Raises:"):
            assert section in promise, f"{name} has no {section}"
        documented = promise.split("Args:")[1].split("Returns:")[0]
        for parameter in inspect.signature(op).parameters:
            assert re.search(rf"\b{parameter}\b", documented), (
                f"{name}: {parameter} is undocumented"
            )


def test_picture_of_the_tree_is_the_tree():
    text = (ROOT / "docs" / "architecture.md").read_text()
    picture = text.split("```text\n")[1].split("```")[0]
    drawn = {line.split()[0] for line in picture.splitlines() if line and line[0] not in " #"}
    real = {shown(path) for path in package_files() if path.name != "__init__.py"}
    assert {name for name in drawn if name.endswith(".py")} == real
    named = {
        name.rstrip(",") for line in picture.splitlines() for name in line.split("  ")[0].split()
    }
    sources = {path.name for path in (ROOT / "csrc").iterdir() if path.suffix in CPP}
    assert {Path(name).name for name in named if Path(name).suffix in CPP} == sources
