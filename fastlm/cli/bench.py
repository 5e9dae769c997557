"""``fastlm bench``: what is installed, side by side on this machine."""

from __future__ import annotations

from collections.abc import Sequence

from fastlm.benchmarks._options import parse


def run(argv: Sequence[str]) -> int:
    options = parse(argv)
    # here and not above: help needs no torch
    from fastlm.benchmarks import _suite

    return _suite.run(options)
