"""The milliseconds of every call behind a row, in an archive beside the result file."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Collection
from pathlib import Path


def path_of(results: Path) -> Path:
    return results.with_suffix(".samples.zip")


def add(results: Path, samples: dict[str, list[float]], rows: Collection[str]) -> None:
    """Add or replace, and drop those of no row; its key tells it from others, as JSON."""
    if not samples:
        return
    path = path_of(results)
    everything = {**read(results), **samples}
    everything = {key: times for key, times in everything.items() if key in rows}
    part = path.with_suffix(".part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("samples.json", json.dumps(everything, indent=0))
    os.replace(part, path)


def read(results: Path) -> dict[str, list[float]]:
    """Empty where there is no archive."""
    path = path_of(results)
    if not path.exists():
        return {}
    with zipfile.ZipFile(path) as archive:
        found: dict[str, list[float]] = json.loads(archive.read("samples.json"))
    return found
