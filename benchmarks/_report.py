"""Result files, and the tables drawn from them."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import fastlm
from fastlm._errors import UserError

from ._providers import PACKAGES
from ._timing import Ceilings

# characters of the reason why a row has no numbers
_REASON = 160


def environment(device: str, ceilings: Ceilings) -> dict[str, Any]:
    """What a reader needs to judge a number: machine, versions, commit, date, ceilings.

    Rows that were added to a file later have the ceilings of their own run.
    """
    return {
        "device": device_name(device),
        "driver": _driver() if device == "cuda" else None,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "fastlm": fastlm.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "peers": {name: _version(name) for name in PACKAGES},
        "git": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "ceilings": asdict(ceilings),
    }


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    model = re.search(r"model name\s*: (.*)", text)
    return model.group(1) if model else platform.machine()


def slug(name: str) -> str:
    """``NVIDIA H200`` to ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def save(path: Path, env: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write the whole file beside the old one and rename, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"env": env, "rows": rows}, indent=1) + "\n")
    os.replace(part, path)


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """``env`` and ``rows`` of a result file.

    Raises:
        UserError: It is none, or cannot be read.
    """
    try:
        content = json.loads(path.read_text())
        return content["env"], content["rows"]
    except OSError as error:
        raise UserError(f"bench: {path} cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError):
        raise UserError(f"bench: {path} holds no results of a benchmark") from None


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In what two environments differ whose rows cannot stand in one file."""
    there, here = ({**env.get("peers", {}), **env} for env in (before, now))
    names = ("device", "driver", "cuda", "threads", "torch", "triton", *now["peers"], "git")
    return [
        f"{name} {there.get(name)} there, {here[name]} here"
        for name in names
        if there.get(name) != here[name]
    ]


HEADER = (
    f"{'shape':<46} {'mode':<8}{'provider':<15}{'ms':>10}{'p20':>10}{'p80':>10}{'speedup':>9}"
    f"{'TFLOP/s':>9}{'GB/s':>8}{'of peak':>9}{'MiB':>8}{'error':>9}"
)


def line(row: dict[str, Any]) -> str:
    """One row of the table, under HEADER."""
    start = f"{problem(row):<46} {row['mode']:<8}{row['provider']:<15}"
    if why := reason(row):
        return f"{start} {why}"
    found = cells(row)
    kernel = f"  {row['kernel'][:60]}" if "kernel" in row else ""
    return (
        f"{start}{found['ms']:>10}{found['p20']:>10}{found['p80']:>10}{found['speedup']:>9}"
        f"{row['tflops']:>9.3f}{row['gbps']:>8.1f}{found['of peak']:>9}{found['MiB']:>8}"
        f"{found['error']:>9}{kernel}"
    )


def problem(row: dict[str, Any]) -> str:
    words = [f"{key}{value}" for key, value in row["shape"].items()]
    return " ".join(words + [row[name] for name in ("inputs", "dtype") if name in row])


def cases(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows by problem and mode: the fastest first, last who has no numbers."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((problem(row), row["mode"]), []).append(row)
    for group in found.values():
        group.sort(key=lambda row: row.get("ms_p50", float("inf")))
    return found


def reason(row: dict[str, Any]) -> str:
    """Why a row has no numbers; empty if it has."""
    for name in ("wrong", "absent"):
        if name in row:
            return f"{name}: {row[name]}"[:_REASON]
    return str(row.get("failed", ""))[:_REASON]


def cells(row: dict[str, Any]) -> dict[str, str]:
    """The numbers of a row as text; not every benchmark has all of them."""
    names = ("peak_mib", "max_rel_err", "speedup", "fraction_of_peak")
    peak, error, gain, fraction = (row.get(name) for name in names)
    return {
        **{name: f"{row[key]:.3f}" for name, key in _TIMES},
        "of peak": "-" if fraction is None else f"{fraction:.1%}",
        "MiB": "-" if peak is None else f"{peak:.0f}",
        "error": "-" if error is None else f"{error:.1e}",
        "speedup": "-" if gain is None else f"{gain:.2f}",
    }


_TIMES = (("ms", "ms_p50"), ("p20", "ms_p20"), ("p80", "ms_p80"))


def heading(env: dict[str, Any]) -> str:
    rates = ", ".join(f"{k} {v:.3g} TFLOP/s" for k, v in env["ceilings"]["tflops"].items())
    return (
        f"{env['device']}, driver {env['driver'] or '-'}, torch {env['torch']}, triton "
        f"{env['triton'] or '-'}, commit {env['git']}\n"
        f"measured ceilings: copy {env['ceilings']['gbps']:.1f} GB/s, matmul {rates}"
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0].strip()


def _commit() -> str:
    """Short hash of the checkout this file is in, with + where it has uncommitted changes."""
    here = Path(__file__).resolve().parent
    if shutil.which("git") is None:
        return "unknown"

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *args], capture_output=True, text=True
        ).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    return f"{commit}{'+' if git('status', '--porcelain', '-uno') else ''}" if commit else "unknown"
