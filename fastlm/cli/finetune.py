"""``fastlm finetune``: a model of Hugging Face transformers, trained further on examples."""

from __future__ import annotations

from collections.abc import Sequence

from fastlm._errors import ArgumentError
from fastlm.cli._flags import parse, take
from fastlm.finetuning.config import COMMAND, FinetuneConfig
from fastlm.training.config_file import read_settings

CONFIG_HELP = """--config FILE: settings as name: value lines; flags win over them.  --resume takes
them from the run: fastlm finetune --out FOLDER --resume."""


def run(argv: Sequence[str]) -> int:
    """Flags win over the values in ``--config FILE``, and both over those of a resumed run."""
    file, rest = take(argv, "--config")
    default = None
    if file is not None:
        given = read_settings(file, COMMAND)
        for name in ("model", "data"):
            if name not in given:
                raise ArgumentError(f"{COMMAND}: config {file} must name the {name}")
        default = FinetuneConfig.from_dict(given)
    if "--resume" in rest:
        # here and not above: help needs no torch
        from fastlm.finetuning.folder import read_run

        out, _ = take(rest, "--out")
        default = read_run(out or (default.out if default else FinetuneConfig.out))
    config = parse(FinetuneConfig, COMMAND, rest, default, more_help=CONFIG_HELP)
    from fastlm.finetuning import finetune

    result = finetune(config)
    print("go on with:")
    if config.method == "lora":
        print(f"  fastlm export {result.out} --merge    # a plain model folder")
    print(f"  fastlm eval {result.out} --data {config.validation_data or config.data}")
    return 0
