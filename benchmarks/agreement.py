"""How far two runs agree: speedups over the same baseline, row by row.

python benchmarks/agreement.py FIRST.json SECOND.json    # exit 1 under 90 % of the rows within 15 %
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

WITHIN, SHARE = 0.15, 0.9


def differences(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> dict[str, float]:
    """Row to how much larger its larger speedup is, of rows in both; a baseline has none."""
    before, after = _speedups(first), _speedups(second)
    return {
        key: max(before[key], after[key]) / min(before[key], after[key]) - 1
        for key in before
        if key in after
    }


def _speedups(rows: list[dict[str, Any]]) -> dict[str, float]:
    found = {}
    for row in rows:
        if row.get("speedup") and row["provider"] != row["baseline"]:
            shape = " ".join(f"{key}{value}" for key, value in row["shape"].items())
            words = (row["op"], row.get("inputs", ""), shape, row["mode"], row["provider"])
            found[" ".join(filter(None, words))] = row["speedup"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs=2, type=Path)
    first, second = (json.loads(path.read_text())["rows"] for path in parser.parse_args().files)
    found = differences(first, second)
    if not found:
        print("the two have no row with a speedup in common")
        return 1
    close = sum(value <= WITHIN for value in found.values()) / len(found)
    print(f"{close:.1%} of {len(found)} speedups within {WITHIN:.0%}; furthest apart:")
    for name, value in sorted(found.items(), key=lambda item: -item[1])[:10]:
        print(f"{value:7.1%}  {name}")
    return 0 if close >= SHARE else 1


if __name__ == "__main__":
    sys.exit(main())
