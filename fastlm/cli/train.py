"""``fastlm train``: a model from text."""

from __future__ import annotations

from collections.abc import Sequence

from fastlm.cli._flags import parse, take
from fastlm.training.config import TrainConfig, read_config


def run(argv: Sequence[str]) -> int:
    """``--config FILE`` gives the values that flags do not; the run saves all of them."""
    path, rest = take(argv, "--config")
    config = parse(TrainConfig, "train", rest, read_config(path) if path else None)
    # here and not above: help needs no torch
    from fastlm.training import train

    train(config)
    return 0
