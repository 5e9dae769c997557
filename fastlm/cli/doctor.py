"""``fastlm doctor``: what is installed, which backend serves which op, and whether it is right.

Needs torch and nothing else of what fastlm depends on, so that it can name what is missing.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fastlm
from fastlm._errors import ArgumentError
from fastlm.cli import FAILED

REQUIRED = ("torch", "numpy", "safetensors", "tokenizers", "tyro", "rich", "pyyaml")
OPTIONAL = ("triton", "matplotlib", "transformers")
# which refuse inputs that require one
WITHOUT_GRADIENT = ("attention_with_kv_cache",)
USAGE_TEXT = """usage: fastlm doctor [--json]
       fastlm doctor --warm [flags]

Shows versions, devices and the backend of every op, then compares each backend, forward and
backward, with the definition in float64.  Exit code 1 when something is broken.
TRITON_INTERPRET=1 fastlm doctor tests the Triton kernels without a GPU.

With --warm it compiles the kernels of a model ahead of its first step; fastlm doctor --warm --help
lists the flags."""


def run(argv: Sequence[str]) -> int:
    if "--warm" in argv:
        from fastlm.cli import _warm

        return _warm.run([word for word in argv if word != "--warm"])
    unknown = [word for word in argv if word not in ("--json", "-h", "--help")]
    if unknown:
        words = " ".join(unknown)
        raise ArgumentError(f"doctor: unrecognized options: {words}, did you mean --json?")
    if set(argv) & {"-h", "--help"}:
        print(USAGE_TEXT)
        return 0
    report = examine()
    print(json.dumps(report, indent=1) if "--json" in argv else described(report))
    return FAILED if report["problems"] else 0


def examine() -> dict[str, Any]:
    """Everything doctor has to say, as plain values."""
    versions = {name: _version(name) for name in (*REQUIRED, *OPTIONAL)}
    problems = [f"{name} is not installed" for name in REQUIRED if versions[name] is None]
    report: dict[str, Any] = {
        "fastlm": fastlm.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "problems": problems,
        "hints": [],
    }
    if versions["torch"] is None:
        return report
    devices = _devices()
    report["devices"] = devices
    report["extension"] = _extension()
    if len(devices) == 1 and shutil.which("nvidia-smi"):
        report["hints"].append("nvidia-smi is here, but this build of torch sees no GPU")
    kinds = ["cpu", *(["cuda"] if len(devices) > 1 else [])]
    report["backends"] = {kind: _backends(kind) for kind in kinds}
    report["self_test"] = [row for kind in kinds for row in self_test(kind)]
    problems += [
        f"{row['op']} on {row['backend']}, {row['device']}"
        for row in report["self_test"]
        if row["result"] == "wrong"
    ]
    return report


def described(report: dict[str, Any]) -> str:
    """The report for people."""
    installed = ", ".join(f"{k} {v or 'not installed'}" for k, v in report["versions"].items())
    lines = [
        f"fastlm {report['fastlm']}, Python {report['python']}, {report['platform']}",
        installed,
        *(f"device    {device}" for device in report.get("devices", [])),
        *([f"extension {report['extension']}"] if "extension" in report else []),
    ]
    for kind, ops in report.get("backends", {}).items():
        lines += ["", f"backends chosen on {kind}"]
        for op, steps in ops.items():
            for step, choice in steps.items():
                why = "; ".join(f"not {k}: {v}" for k, v in choice["refusals"].items())
                lines.append(f"  {op:<25}{step:<10}{choice['backend'] or 'none':<11}{why}")
    if "self_test" in report:
        lines += ["", "self-test against the definition in float64"]
        for row in report["self_test"]:
            place = f"{row['backend']} on {row['device']}"
            lines.append(f"  {row['op']:<25}{place:<20}{row['result']:<14}{row['detail']}")
    lines += [""] + [f"hint: {hint}" for hint in report["hints"]]
    lines += [f"BROKEN: {problem}" for problem in report["problems"]]
    return "\n".join([*lines, "" if report["problems"] else "nothing is broken"]).rstrip()


def self_test(device: str) -> list[dict[str, str]]:
    """Every op on every backend, forward and backward; a result is ok, wrong or unavailable."""
    from fastlm.functional import OPS

    rows = []
    for name, op in OPS.items():
        for backend in sys.modules[op.__module__].BACKENDS:
            if backend != "reference":
                result, detail = _judged(op, name, backend, device)
                rows.append(
                    {
                        "op": name,
                        "backend": backend,
                        "device": device,
                        "result": result,
                        "detail": detail,
                    }
                )
    return rows


def _judged(op: Callable[..., Any], name: str, backend: str, device: str) -> tuple[str, str]:
    # Whatever it raises is the finding, an import error or a compiler's as well as a wrong number.
    with ThreadPoolExecutor(max_workers=1) as pool:
        error = pool.submit(_compare, op, name, backend, device).exception()
    if error is None:
        return "ok", ""
    if isinstance(error, NotImplementedError):
        return "unavailable", str(error).rpartition("refused: ")[2]
    return "wrong", " ".join(f"{type(error).__name__}: {error}".split())


def _compare(op: Callable[..., Any], name: str, backend: str, device: str) -> None:
    """The whole call and, through checked(), each operator in it."""
    import torch

    from fastlm import testing
    from fastlm.functional import checked

    inputs, constants = example(name, device)
    constants["backward"] = name not in WITHOUT_GRADIENT
    with checked():
        actual = testing.run(op, *inputs, **constants, backend=backend)
    constants["backend"] = "reference"
    plain = testing.run(op, *inputs, **constants)
    truth = testing.run(op, *inputs, **constants, dtype=torch.float64)
    testing.assert_all_as_accurate(name, actual, plain=plain, truth=truth)


def example(op: str, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Small random arguments of an op, the same on every device; gradients are taken of the first.

    More than one block along each axis of a kernel.
    """
    import torch

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    def classes(count: int, *shape: int) -> torch.Tensor:
        return torch.randint(count, shape, generator=generator).to(device)

    if op == "apply_rotary":
        angles = normal(9, 16)
        heads = (normal(1, 9, 4, 32), normal(1, 9, 2, 32))
        return heads, {"cos": angles.cos(), "sin": angles.sin()}
    if op == "attention_with_kv_cache":
        caches = normal(2, 300, 2, 32), normal(2, 300, 2, 32)
        tokens = {"key": normal(2, 3, 2, 32), "value": normal(2, 3, 2, 32)}
        lengths = torch.tensor([290, 7], dtype=torch.int32, device=device)
        return (normal(2, 3, 4, 32), *caches), {**tokens, "cache_seqlens": lengths}
    if op == "linear_top_k":
        return (normal(2, 20, 32), normal(300, 32)), {"k": 5}
    arguments: dict[str, Callable[[], tuple[Any, ...]]] = {
        "causal_attention": lambda: (
            normal(1, 150, 4, 32),
            normal(1, 150, 2, 32),
            normal(1, 150, 2, 32),
        ),
        "cross_entropy": lambda: (normal(4, 5000), classes(5000, 4)),
        "linear_cross_entropy": lambda: (normal(2, 20, 32), normal(300, 32), classes(300, 2, 20)),
        "linear_logprobs": lambda: (normal(2, 20, 32), normal(300, 32), classes(300, 2, 20)),
        "rms_norm": lambda: (normal(3, 65), normal(65)),
        "glu": lambda: (normal(3, 65), normal(3, 65)),
        "swiglu": lambda: (normal(3, 65), normal(3, 65)),
    }
    return arguments[op](), {}


def _backends(device: str) -> dict[str, Any]:
    """What ``auto`` chooses for each step of each op, and why not another backend."""
    from fastlm.functional import OPS, explain

    found: dict[str, Any] = {}
    for name in OPS:
        inputs, constants = example(name, device)
        needs = name not in WITHOUT_GRADIENT
        leaves = [x.requires_grad_(needs) if x.is_floating_point() else x for x in inputs]
        steps = explain(name, *leaves, **constants).steps
        found[name] = {
            step: {"backend": choice.backend, "refusals": choice.refusals}
            for step, choice in steps.items()
        }
    return found


def _devices() -> list[str]:
    import torch

    from fastlm.kernels._runtime import INTERPRETED

    interpreted = ", Triton interpreted" if INTERPRETED else ""
    found = [f"cpu, {torch.get_num_threads()} threads{interpreted}"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            f"cuda:{index}, {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    return found


def _extension() -> str:
    from fastlm.ops.cuda._extension import description

    return description()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
