"""fastlm in transformers' Trainer: a callback."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

from torch import nn
from transformers import TrainerCallback as _Base

from fastlm.hf.instance import is_optimized, optimize, restore
from fastlm.hf.loss import LossStatistics, base_model, loss_statistics, state_of
from fastlm.hf.report import Report


class TrainerCallback(_Base):
    """Optimize the model that a Trainer trains, and log what its loss knows of the predictions.

    Before the first step the model is optimized, and after the last it is restored, unless it was
    optimized already.  Logs get ``token_accuracy``, ``entropy`` and ``perplexity`` of the steps
    since the last log, if the loss is fused: no logits are computed for them.

    Args:
        options: As :func:`fastlm.optimize` takes them.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.report: Report | None = None
        self._statistics: LossStatistics | None = None
        self._open = contextlib.ExitStack()

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        if model is None:
            return
        for name, why in (
            ("label_smoothing_factor", "the Trainer computes smoothed losses from logits"),
            ("use_liger_kernel", "Liger's kernels replace the same layers"),
        ):
            if getattr(args, name, None):
                warnings.warn(f"fastlm.hf: {name} is set: {why}", stacklevel=2)
        is_callers = is_optimized(model)
        if not is_callers:
            self.report = optimize(model, **self.options)
        if state_of(base_model(model)) is not None:
            self._statistics = self._open.enter_context(loss_statistics(model))
        if not is_callers:
            self._open.callback(restore, model)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        told = self._statistics
        if logs is None or "loss" not in logs or told is None or not float(told.num_items):
            return
        known = {
            "token_accuracy": told.accuracy, "entropy": told.entropy,
            "perplexity": told.perplexity,
        }  # fmt: skip
        logs.update(known)
        if state.log_history:  # which has a copy of them
            state.log_history[-1].update(known)
        told.num_items = told.correct = told.nats = told.entropies = 0.0

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._statistics = None
        self._open.close()
