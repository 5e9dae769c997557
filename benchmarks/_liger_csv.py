"""Results in the columns of Liger's ``all_benchmark_data.csv``, which its plotting scripts read."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ._axes import AXES

COLUMNS = (
    "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit",
    "x_name", "x_label", "x_value", "y_value_50", "y_value_20", "y_value_80",
    "extra_benchmark_config_str", "gpu_name", "timestamp", "version",
)  # fmt: skip
_MODES = {"fwd": "forward", "bwd": "backward", "fwd_bwd": "full"}

Row = dict[str, Any]


def write(path: Path, files: Iterable[tuple[Row, list[Row]]]) -> None:
    """Rows with numbers, of environments and their rows; speed and, where known, memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for env, rows in files:
            for row in rows:
                if "ms_p50" in row and row["shape"]:
                    writer.writerows(_lines(env, row))


def _lines(env: Row, row: Row) -> Iterator[Row]:
    shape = dict(row["shape"])
    name, label = AXES.get(row["op"], (next(iter(shape)), ""))
    common = {
        "kernel_name": row["op"],
        "kernel_provider": row["provider"],
        "kernel_operation_mode": _MODES.get(row["mode"], row["mode"]),
        "x_name": name,
        "x_label": label or name,
        "x_value": shape.pop(name),
        "extra_benchmark_config_str": json.dumps(
            {**shape, **{key: row[key] for key in ("dtype", "inputs") if key in row}}
        ),
        "gpu_name": env["device"],
        "timestamp": env["date"],
        "version": env["fastlm"],
    }
    speed = {f"y_value_{p}": row[f"ms_p{p}"] for p in (50, 20, 80)}
    yield {**common, "metric_name": "speed", "metric_unit": "ms", **speed}
    if row.get("peak_mib") is not None:
        memory = {f"y_value_{p}": row["peak_mib"] for p in (50, 20, 80)}
        yield {**common, "metric_name": "memory", "metric_unit": "MB", **memory}
