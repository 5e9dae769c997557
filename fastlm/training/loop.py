"""The training run: from a TrainConfig to a folder that ``fastlm.load`` and others open."""

from __future__ import annotations

import math
import shlex
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from fastlm._errors import UserError
from fastlm.inference.language_model import LanguageModel
from fastlm.model.config import CausalLMConfig
from fastlm.model.transformer import IGNORE_INDEX, CausalLM
from fastlm.training import checkpoint as checkpoints
from fastlm.training.checkpoint import Checkpoint, CheckpointWarning
from fastlm.training.config import ConfigError, ResolvedConfig, TrainConfig
from fastlm.training.console import Display
from fastlm.training.data import Batches, Tokens, validation_batches
from fastlm.training.folder import RunFolder
from fastlm.training.interrupt import Interrupt, interruptible
from fastlm.training.optimizer import Optimizer, learning_rate_share
from fastlm.training.report import opening, write_report
from fastlm.training.tokenizer import end_of_text, token_bytes

FINAL_EVAL_TOKENS = 4_194_304
"""Held-out tokens read after the last step."""

EVAL_BATCH_TOKENS = 4096
"""Tokens validated at once, unless a training batch has more."""

OPENING_TOKENS = 64
"""Held-out tokens that a default prompt is cut from."""

Batch = tuple[Tensor, Tensor]


class NonFiniteError(UserError, RuntimeError):
    """The loss or the gradient became NaN or infinite; no weight was changed by that step."""


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        out: The run folder.
        steps: Optimizer steps, those before a resume included.
        tokens: Tokens trained on.
        parameters: Size of the model.
        train_loss: Mean over the last rows of metrics.jsonl, nats per token.
        val_loss: Loss over the held-out tokens, nats per token.
        val_bpb: The same in bits per byte of text, which compares across tokenizers.
        elapsed_s: Seconds of training and validation, without preparation, the last validation and
            the report.
    """

    out: Path
    steps: int
    tokens: int
    parameters: int
    train_loss: float
    val_loss: float
    val_bpb: float
    elapsed_s: float


def train(config: TrainConfig, *, on_step: Callable[[int], None] | None = None) -> TrainResult:
    """Train a causal language model and leave a run folder behind.

    On CPU a resumed run continues bit for bit: weights, optimizer, random numbers, data order.

    Args:
        config: The run.
        on_step: Called after each optimizer step with the number of steps done.

    Returns:
        The last losses and where everything is.

    Raises:
        ConfigError: A setting is wrong, or ``out`` does not suit it.
        DataError: The corpus cannot be used.
        CheckpointError: There is no whole checkpoint to resume from.
        NonFiniteError: The loss or the gradient is not finite; the last checkpoint is kept.
        KeyboardInterrupt: After Ctrl-C, when the run is saved.  SIGTERM: SystemExit.
        BrokenPipeError: Whoever read our output went away; the run is saved.
        OSError: The run folder cannot be written.
    """
    settings = config.resolved()
    device, dtype = _device(settings.device), _dtype(settings)
    folder = RunFolder(settings.out)
    # the caller's random numbers stay as they are
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), interruptible() as interrupt:
        tokenizer, tokens = (
            folder.start(settings) if settings.resume is None else folder.reopen(settings)
        )
        torch.manual_seed(settings.seed)
        run = _Run(settings, folder, tokenizer, tokens, device, dtype)
        if settings.resume is not None:
            folder.record(settings)
        with Display(settings.steps, run.step, interrupt.pipe_closed) as display:
            run.introduce(display)
            run.advance(display, interrupt, on_step)
            val_loss, val_bpb = run.finish(display)
    return TrainResult(
        out=folder.path,
        steps=run.step,
        tokens=run.step * run.tokens_per_step,
        parameters=run.parameters,
        train_loss=run.train_loss,
        val_loss=val_loss,
        val_bpb=val_bpb,
        elapsed_s=run.elapsed,
    )


def accumulate_gradients(model: Callable[..., Any], micro_batches: Sequence[Batch]) -> Tensor:
    """Add to ``.grad`` the gradient of the mean loss over all targets of all micro-batches.

    Args:
        model: A :class:`fastlm.CausalLM`, compiled or not.
        micro_batches: ids and targets ``(B, T)`` each; -100 is no target, and none at all is fine.

    Returns:
        That mean, detached; 0 if there is no target.
    """
    counts = [(targets != IGNORE_INDEX).sum() for _, targets in micro_batches]
    num_items = torch.stack(counts).sum().clamp(min=1)
    total = None
    for ids, targets in micro_batches:
        loss = model(ids, targets=targets, num_items=num_items).loss
        loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return total


class _Run:
    """The state of a run between two steps, and what happens in one."""

    def __init__(
        self,
        config: ResolvedConfig,
        folder: RunFolder,
        tokenizer: Tokenizer,
        tokens: Tokens,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.folder, self.tokenizer, self.device = config, folder, tokenizer, device
        self.tokens, self.dtype = tokens, dtype
        self.model = CausalLM(_model_config(config, tokenizer)).to(device)
        initialize(self.model)
        self.forward = torch.compile(self.model) if config.compile else self.model
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.optimizer = Optimizer(self.model, config)
        self.batches = _two_phases(config, tokens)
        self.token_bytes = torch.tensor(token_bytes(tokenizer), device=device)
        self.tokens_per_step = config.batch_size * config.context * config.grad_accumulation
        self.health = _Health(device)
        self.step, self.elapsed, self.train_loss = 0, 0.0, math.nan
        self.losses = torch.zeros((), device=device)
        self.since_log = 0
        self.resumed: list[str] = []
        if config.resume is not None:
            self._resume(config.resume)

    def _resume(self, name: str) -> None:
        if name == "latest" and not any(self.folder.checkpoints.glob("step-*")):
            self.resumed.append("no checkpoint yet: from the first step")
            self.folder.keep_metrics_until(0)
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CheckpointWarning)
            if name == "latest":
                found = checkpoints.load_latest(self.folder.checkpoints)
            else:
                found = checkpoints.load_named(self.folder.checkpoints, name)
        for warning in caught:
            self.resumed.append(str(warning.message))
            warnings.warn_explicit(warning.message, warning.category, __file__, 0)
        if found.step > self.config.steps:
            raise ConfigError(
                f"train: steps must be at least {found.step}, where the run is, "
                f"got {self.config.steps}"
            )
        self.model.load_state_dict(found.model, strict=False)
        self.model.tie_weights()
        self.optimizer.load_state(found.optimizer)
        torch.set_rng_state(found.optimizer["rng.cpu"])
        # a run that was begun on a CPU has none
        if self.device.type == "cuda" and "rng.cuda" in found.optimizer:
            torch.cuda.set_rng_state(found.optimizer["rng.cuda"], self.device)
        self.step = found.step
        self.elapsed = self.folder.keep_metrics_until(found.step)
        self.resumed.append(f"from step {found.step}")

    def introduce(self, display: Display) -> None:
        config, model = self.config, self.model.config
        train, held_out = len(self.tokens.train), len(self.tokens.validation)
        display.say(
            "corpus",
            f"{config.data or 'Python standard library'}: {train:,} tokens to train on, "
            f"{held_out:,} held out, vocabulary {model.vocab_size:,}",
        )
        display.say(
            "model",
            f"{model.model_type}, {model.num_hidden_layers} layers of width {model.hidden_size}, "
            f"{model.num_attention_heads} heads, {self.parameters / 1e6:.2f} M parameters",
        )
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        display.say(
            "train",
            f"{config.steps} steps of {self.tokens_per_step:,} tokens with {config.optimizer} on "
            f"{self.device}{threads}, {str(self.dtype).removeprefix('torch.')}",
        )
        for line in self.resumed:
            display.say("resume", line)

    # ---- steps

    def advance(
        self, display: Display, interrupt: Interrupt, on_step: Callable[[int], None] | None
    ) -> None:
        """Step until the end or a signal, logging, validating and saving on the way."""
        config = self.config
        self._start_clock()
        while self.step < config.steps and interrupt.signal is None:
            self._train_step()
            last = self.step == config.steps
            save = last or self.step % config.save_every == 0
            evaluate = not last and self.step % config.eval_every == 0
            if self.device.type == "cpu" or save or evaluate or self._is_logged():
                self.health.check(self.folder.checkpoints)
            # a save ends a row, so that a run resumed from it writes the same rows
            if save or evaluate or self._is_logged():
                row = self._row()
                if evaluate:
                    row |= self._validation(config.eval_tokens)
                display.show(row)
                self.folder.add_metrics(row)
                self._start_clock()
            if save:
                self.save()
            if on_step is not None:
                on_step(self.step)
        if interrupt.signal is not None and self.step < config.steps:
            self.save()
            command = f"fastlm train --out {shlex.quote(str(self.folder.path))} --resume latest"
            display.say("saved", f"step {self.step}; go on with: {command}")
            raise interrupt.exit()

    def _is_logged(self) -> bool:
        return self.step % self.config.log_every == 0 or self.step == 1

    def _train_step(self) -> None:
        config = self.config
        first = self.step * config.grad_accumulation
        micro_batches = [
            self._to_device(self.batches(first + i)) for i in range(config.grad_accumulation)
        ]
        for parameter in self.model.parameters():
            parameter.grad = None
        with self._autocast():
            loss = accumulate_gradients(self.forward, micro_batches)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        self.health.observe(self.step + 1, loss, norm)
        self.optimizer.step(learning_rate_share(self.step, config), self.health.good)
        self.losses += loss
        self.norm = norm
        self.since_log += 1
        self.step += 1

    def _to_device(self, batch: Batch) -> Batch:
        if self.device.type == "cpu":
            return batch
        ids, targets = (part.pin_memory().to(self.device, non_blocking=True) for part in batch)
        return ids, targets

    def _autocast(self) -> torch.autocast:
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)

    # ---- numbers

    def _start_clock(self) -> None:
        self.losses.zero_()
        self.since_log = 0
        self.clock = time.perf_counter()

    def _row(self) -> dict[str, Any]:
        """A row of metrics.jsonl about the steps since the last one."""
        self.train_loss = self.losses.item() / self.since_log
        seconds = time.perf_counter() - self.clock
        self.elapsed += seconds
        return {
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "loss": self.train_loss,
            "lr": self.config.lr * learning_rate_share(self.step - 1, self.config),
            "grad_norm": self.norm.item(),
            "tok_per_sec": self.since_log * self.tokens_per_step / seconds,
            "elapsed_s": self.elapsed,
        }

    def _validation(self, most_tokens: int) -> dict[str, float]:
        started = time.perf_counter()
        loss, bpb = self.evaluate(most_tokens)
        self.elapsed += time.perf_counter() - started
        return {"val_loss": loss, "val_bpb": bpb, "elapsed_s": self.elapsed}

    @torch.no_grad()
    def evaluate(self, most_tokens: int) -> tuple[float, float]:
        """Nats per token and bits per byte over the held-out tokens, or an even sample of them."""
        config = self.config
        rows = max(config.batch_size, EVAL_BATCH_TOKENS // config.context)
        nats = torch.zeros((), dtype=torch.float64, device=self.device)
        tokens, text_bytes = 0, torch.zeros((), dtype=torch.int64, device=self.device)
        for batch in validation_batches(self.tokens.validation, config.context, rows, most_tokens):
            ids, targets = self._to_device(batch)
            with self._autocast():
                nats += self.model(ids, targets=targets, num_items=1).loss
            tokens += targets.numel()
            text_bytes += self.token_bytes[targets].sum()
        total = nats.item()
        return total / tokens, total / math.log(2) / max(1, int(text_bytes))

    # ---- files

    def save(self) -> None:
        """A checkpoint, and the weights at the top of the folder, where others open them."""
        optimizer = self.optimizer.state() | {"rng.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            optimizer["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoints.save(
            self.folder.checkpoints,
            Checkpoint(self.step, self._weights(), optimizer, {"config": self.config.to_dict()}),
            keep=self.config.keep,
        )
        self.model.save_pretrained(self.folder.path)

    def _weights(self) -> dict[str, Tensor]:
        """By name; a tied head stands there once, as the embedding."""
        weights = self.model.state_dict()
        if self.model.config.tie_word_embeddings:
            del weights["lm_head.weight"]
        return weights

    def finish(self, display: Display) -> tuple[float, float]:
        """Validate on everything, and write the report."""
        loss, bpb = self.evaluate(FINAL_EVAL_TOKENS)
        # a finished run that is resumed has this row already
        self.folder.keep_metrics_until(self.step, last_validation=False)
        self.folder.add_metrics(
            {"step": self.step, "val_loss": loss, "val_bpb": bpb, "elapsed_s": self.elapsed}
        )
        seconds = f"{self.elapsed:.0f} s of training"
        display.say("done", f"val loss {loss:.4f}, {bpb:.3f} bits/byte, {seconds}")
        text = self.tokenizer.decode(self.tokens.validation[:OPENING_TOKENS].tolist())
        prompt = opening(text) if self.config.prompt is None else self.config.prompt
        lm = LanguageModel(self.model, self.tokenizer)
        files = write_report(self.folder, self.config, lm, prompt)
        display.say("written", f"{self.folder.path}: model, {', '.join(files)}")
        return loss, bpb


def _two_phases(config: ResolvedConfig, tokens: Tokens) -> Callable[[int], Batch]:
    """Micro-batch by its number: short sequences first, then full ones, of as many tokens."""
    rows = config.batch_size * config.context // config.short_context
    short = Batches(tokens.train, config.short_context, rows, config.seed)
    full = Batches(tokens.train, config.context, config.batch_size, config.seed)
    first_full = int(config.steps * config.short_share) * config.grad_accumulation
    return lambda number: short(number) if number < first_full else full(number - first_full)


class _Health:
    """Whether every loss and gradient so far was finite, known on the device without asking it."""

    def __init__(self, device: torch.device) -> None:
        self.good = torch.ones((), dtype=torch.bool, device=device)
        # step, loss and gradient norm of the first bad step
        self.first_bad = torch.zeros(3, dtype=torch.float64, device=device)

    def observe(self, step: int, loss: Tensor, norm: Tensor) -> None:
        good = self.good & torch.isfinite(loss) & torch.isfinite(norm)
        now = torch.stack([torch.full_like(loss, step), loss, norm])
        self.first_bad = torch.where(self.good & ~good, now.double(), self.first_bad)
        self.good = good

    def check(self, saved: Path) -> None:
        """Raise NonFiniteError about the first bad step, if there was one."""
        if self.good:
            return
        step, loss, norm = self.first_bad.tolist()
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
        kept = sorted(path.name for path in saved.glob("step-*"))
        last = (
            f"the last checkpoint is {saved / kept[-1]}" if kept else "no checkpoint was saved yet"
        )
        raise NonFiniteError(
            f"train: step {int(step)}: {what}; no weight was changed by it; {last}"
        )


@torch.no_grad()
def initialize(model: CausalLM) -> None:
    """Weights to start training from: each block at first adds nothing to the residual stream.

    The other matrices of the blocks take random inputs to outputs of 0.6 times their scale.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(parameter)
        elif ".layers." in name and parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.6 / math.sqrt(parameter.shape[1]))


def _model_config(config: ResolvedConfig, tokenizer: Tokenizer) -> CausalLMConfig:
    return CausalLMConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        model_type="qwen3" if config.qk_norm else "llama",
        max_position_embeddings=config.context,
        rope_theta=config.rope_theta,
        tie_word_embeddings=config.tie_word_embeddings,
        # what ends one document is what the next one follows
        bos_token_id=end_of_text(tokenizer),
        eos_token_id=end_of_text(tokenizer),
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"train: device must be one of this machine's {torch.cuda.device_count()} GPUs or cpu, "
            f"got {name!r}"
        )
    return device


def _dtype(config: ResolvedConfig) -> torch.dtype:
    if config.dtype != "auto":
        return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    on_gpu = _device(config.device).type == "cuda"
    return torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else torch.float32
