"""``fastlm finetune``: a model of Hugging Face transformers, trained further on examples."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from fastlm._errors import ArgumentError
from fastlm.cli._flags import parse, take
from fastlm.finetuning.config import COMMAND, FinetuneConfig
from fastlm.training.config_file import read_settings

CONFIG_HELP = """--config FILE: settings as name: value lines; flags win over them.  --resume takes
what neither says from the run: fastlm finetune --out FOLDER --resume."""


def run(argv: Sequence[str]) -> int:
    """Flags win over the values in ``--config FILE``, and both over those of a resumed run."""
    file, rest = take(argv, "--config")
    given: dict[str, Any] = {} if file is None else read_settings(file, COMMAND)
    default = None
    if "--resume" in rest or (given.get("resume") is True and "--no-resume" not in rest):
        # here and not above: help needs no torch
        from fastlm.finetuning.folder import read_run

        out = take(rest, "--out")[0] or str(given.get("out", FinetuneConfig.out))
        own = read_run(out).to_dict()
        default = FinetuneConfig.from_dict({**own, **given, "out": out, "resume": True})
    elif file is not None:
        for name in ("model", "data"):
            if name not in given:
                raise ArgumentError(f"{COMMAND}: config {file} must name the {name}")
        default = FinetuneConfig.from_dict(given)
    config = parse(FinetuneConfig, COMMAND, rest, default, more_help=CONFIG_HELP)
    from fastlm.finetuning import finetune

    result = finetune(config)
    run, next_steps = shlex.quote(str(result.out)), list[str]()
    if config.method == "lora":
        next_steps.append(f"fastlm export {run} --merge    # a plain model folder")
    if config.validation_data is not None:
        # not the file it was trained on
        next_steps.append(f"fastlm eval {run} --data {shlex.quote(config.validation_data)}")
    if next_steps:
        print("go on with:", *next_steps, sep="\n  ")
    return 0
