"""The recipe of ``fastlm demo``: Python's own source code, a few minutes on two cores."""

from __future__ import annotations

from fastlm.training.config import TrainConfig

STEPS = 1200


def demo_config(
    out: str,
    *,
    prompt: str,
    data: str | None = None,
    steps: int = STEPS,
    overwrite: bool = False,
) -> TrainConfig:
    """A model that has seen all of the default corpus and writes what looks like Python.

    Args:
        out: Run folder.
        prompt: What the samples go on from.
        data: Another corpus.
        steps: Optimizer steps.
        overwrite: Replace a run that is in ``out``.
    """
    return TrainConfig(
        data=data,
        out=out,
        prompt=prompt,
        steps=steps,
        overwrite=overwrite,
        num_hidden_layers=4,
        intermediate_size=384,
        batch_size=4,
        lr=0.02,
        embedding_lr=0.01,
    )
