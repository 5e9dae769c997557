"""The tables of the documentation: made from committed results, and still what they say."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
TABLES = ROOT / "benchmarks" / "tables.py"


@pytest.fixture(scope="module")
def tables() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(TABLES)))


def test_documents_show_the_committed_results():
    command = [sys.executable, str(TABLES), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


ROWS = [
    {
        "shape": {"N": 8},
        "inputs": "peaked",
        "mode": "fwd",
        "peak_mib": mib,
        "provider": name,
        **ms,
    }
    for name, ms, mib in (
        ("torch", {"ms_p50": 4.0}, 12.4),
        ("torch.compile", {"ms_p50": 3.0}, 15.6),
        ("liger", {"absent": "no module"}, None),
        ("fastlm", {"ms_p50": 1234.5}, 2.0),
        ("fastlm.int8", {"ms_p50": 0.5}, 1.0),
        ("products", {"ms_p50": 1.0}, 0.0),
    )
]


def test_a_case_knows_what_others_offer(tables):
    (case,) = tables.cases(ROWS)
    assert (case.name, case.mode) == ("N8 peaked", "fwd")
    assert set(case.others) == {"torch", "torch.compile"}
    found = case.fastest_other()
    assert found is not None and found[0] == "torch.compile"


def test_a_table_says_who_was_not_measured(tables):
    table = list(tables._milliseconds(ROWS))
    assert table[2].split(" | ")[2:8] == [
        "fastlm", "fastlm.int8", "torch", "torch.compile", "products", "gain",
    ]  # fmt: skip
    assert table[4] == "| N8 peaked | fwd | 1,234 | 0.5 | 4 | 3 | 1 | 0.00 | 2 | 16 |"
    assert table[-1] == "Not measured: `liger`: no module."


def test_a_case_without_others_has_no_gain(tables):
    (case,) = tables.cases(ROWS[3:])
    assert tables._comparison(case) == ("", "", "")
