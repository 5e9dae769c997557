"""Where the ratios are, and whether they are compared or written anew."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    stored = Path(__file__).with_name("ratios.json")
    parser.addoption(
        "--ratios", type=Path, default=stored, metavar="FILE", help="the stored ratios"
    )
    parser.addoption("--store", action="store_true", help="write the ratios instead of comparing")
