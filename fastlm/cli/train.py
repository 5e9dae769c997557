"""``fastlm train``: a model from text."""

from __future__ import annotations

from collections.abc import Sequence

from fastlm.cli._flags import parse, take
from fastlm.training.config import TrainConfig
from fastlm.training.config_file import before_flags

CONFIG_HELP = """--config FILE: settings as name: value lines; flags win over them.  With --resume,
what neither names stays as it was in the run: fastlm train --out FOLDER --resume latest."""


def run(argv: Sequence[str]) -> int:
    """Flags win over the values in ``--config FILE``, and both over those of a resumed run."""
    file, rest = take(argv, "--config")
    # these two say which run's settings the others are laid over
    out, _ = take(rest, "--out")
    resume, _ = take(rest, "--resume")
    default = before_flags(file, out=out, resume=resume)
    config = parse(TrainConfig, "train", rest, default, more_help=CONFIG_HELP)
    # here and not above: help needs no torch
    from fastlm.training import train

    train(config)
    return 0
