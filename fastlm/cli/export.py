"""``fastlm export``: a run as others take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from fastlm.cli._flags import parse


@dataclass(frozen=True)
class ExportOptions:
    """Write a model folder in Hugging Face's layout, or an adapter in peft's, and nothing else."""

    run: Positional[str]
    """Run or model folder, or adapter."""
    merge: bool = False
    """Add an adapter to the weights of its model, so that peft is not needed."""
    out: str | None = None
    """New folder. None: merged, or export, inside the run folder; of no other folder."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of merged weights; auto: that of the model."""


def run(argv: Sequence[str]) -> int:
    options = parse(ExportOptions, "export", argv)
    # here and not above: help needs no torch
    from fastlm.finetuning.export import export

    done = export(options.run, options.out, merge=options.merge, dtype=options.dtype)
    if done.error is not None:
        print(
            f"merged in {done.dtype}; opened again, log-probabilities differ from those of model "
            f"and adapter by {done.error:.1e} at most"
        )
    print(f"written {done.out}: {', '.join(done.files)}")
    return 0
