"""The fine-tuning run: from a model and rows to a folder with what was learned."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.finetuning import folder as folders
from fastlm.finetuning.batches import Batch, Layout, max_length_of
from fastlm.finetuning.config import COMMAND, FinetuneConfig
from fastlm.finetuning.examples import Encoder, Example
from fastlm.finetuning.measure import Measured, loss_sum, measure, next_token
from fastlm.finetuning.methods import Changes, changes, fingerprints, prepare
from fastlm.finetuning.pretrained import Pretrained, device_of, locate
from fastlm.finetuning.report import Ran, Told, write_report
from fastlm.finetuning.rows import Fields, Row, Rows, read_rows
from fastlm.hf.instance import explain_attention, optimize, restore
from fastlm.inference.next_token import NextToken
from fastlm.training import checkpoint as checkpoints
from fastlm.training.checkpoint import Checkpoint
from fastlm.training.config import ConfigError
from fastlm.training.console import Display
from fastlm.training.data import DataError
from fastlm.training.folder import RunFolder
from fastlm.training.interrupt import Interrupt, interruptible
from fastlm.training.loop import NonFiniteError

NEXT_TOKENS = 10
"""Shown before and after."""


@dataclass(frozen=True)
class FinetuneResult:
    """What a run came to.

    Attributes:
        out: The run folder.
        steps: Optimizer steps, those before a resume included.
        before: On held-out rows.
        after: Likewise.
        changes: Which parameters have other values than they had.
        expected: The next token after one prompt, before and after.
    """

    out: Path
    steps: int
    before: Measured
    after: Measured
    changes: Changes
    expected: tuple[NextToken, NextToken]


def finetune(
    config: FinetuneConfig, *, on_step: Callable[[int], None] | None = None
) -> FinetuneResult:
    """Train a model of transformers further, and leave a run folder behind.

    The folder has an adapter in peft's layout, or a whole model in Hugging Face's, beside
    ``report.md``, ``metrics.jsonl`` and ``finetune.json``.

    Args:
        config: The run.
        on_step: Called after each optimizer step with the number of steps done.

    Raises:
        ConfigError: A setting is wrong, or ``out`` does not suit it.
        DataError: A row is not as rows must be; the message says which, and what of it.
        ModelFileError: The model cannot be opened.
        MissingPackageError: peft is needed and not installed.
        NonFiniteError: The loss or the gradient is not finite; the last checkpoint is kept.
        KeyboardInterrupt: After Ctrl-C, when the run is saved.  SIGTERM: SystemExit.
        BrokenPipeError: Whoever read our output went away; the run is saved.
        OSError: The run folder cannot be written.
    """
    folders.check_out(config)
    device = device_of(config.device)
    source = locate(config.model)
    if source.is_adapter:
        raise ConfigError(
            f"{COMMAND}: model must be a whole model, got the adapter {config.model}; "
            f"fastlm export {config.model} --merge makes one of it"
        )
    rows, held_out, data_hash = _read(config, source)
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(config.seed)
        run = _Run(config, source, rows, held_out, data_hash, device)
        return run.go(on_step)


def _read(config: FinetuneConfig, source: Pretrained) -> tuple[Rows, Rows, str]:
    """Rows to train on and rows held out, and a digest of the files that they are from."""
    fields = Fields(config.text_column, config.label_column, config.label_prompt)
    files = [config.data] + ([config.validation_data] if config.validation_data else [])
    found = [read_rows(path, fields, source.template, whose=config.model) for path in files]
    digest = hashlib.sha256(b"".join(Path(path).read_bytes() for path in files)).hexdigest()
    rows = found[0]
    if len(found) == 2:
        if found[1].kind != rows.kind:
            raise DataError(
                f"{COMMAND}: validation_data must have the fields {rows.kind}, as data has, got "
                f"{found[1].kind}"
            )
        return rows, found[1], digest
    count = round(len(rows.rows) * config.validation) or 1
    if count >= len(rows.rows):
        raise DataError(
            f"{COMMAND}: {config.data} must have rows to train on beside {count} to hold out, "
            f"got {len(rows.rows)}"
        )
    generator = torch.Generator().manual_seed(config.seed)
    order = [int(i) for i in torch.randperm(len(rows.rows), generator=generator)]
    out, kept = sorted(order[:count]), sorted(order[count:])
    return (
        Rows(rows.kind, tuple(rows.rows[i] for i in kept), rows.notes),
        Rows(rows.kind, tuple(rows.rows[i] for i in out)),
        digest,
    )


class _Run:
    """The state of a run between two steps, and what happens in one."""

    def __init__(
        self, config: FinetuneConfig, source: Pretrained, rows: Rows, held_out: Rows,
        data_hash: str, device: torch.device,
    ) -> None:  # fmt: skip
        self.config, self.source, self.rows, self.device = config, source, rows, device
        self.data_hash = data_hash
        self.dtype = _dtype(config, device)
        inner = source.open(dtype=self.dtype, device=device)
        self.encoder = _encoder(config, source, inner, rows, held_out)
        self.train = [e for row in rows.rows for e in self.encoder.encode(row)]
        shortened, split = self.encoder.shortened, self.encoder.split
        chosen = _sample(held_out.rows, config.eval_rows)
        self.held_out = [e for row in chosen for e in self.encoder.encode(row)]
        self.notes = list(rows.notes)
        if shortened:
            self.notes.append(f"{shortened:,} rows lost the beginning of their prompt")
        if split:
            self.notes.append(f"{split:,} texts became several examples")
        if not self.encoder.end and not rows.rows[0].spelled:
            self.notes.append("no end is learned: the tokenizer has no token that ends a text")
        self.data = _described(rows, held_out, len(chosen))
        self.guess = _guess(chosen)
        self.prompt = _prompt(config, chosen)
        self.prompt_ids = self.encoder.prompt_ids(
            self.prompt, spelled=config.prompt is None and chosen[0].spelled
        )[-self.encoder.max_length :]

        self.model = prepare(inner, config)
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.fingerprints = fingerprints(self.model)
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=config.peak_lr, betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
        )  # fmt: skip
        self.per_epoch = math.ceil(len(self.train) / config.batch_size)
        self.steps = config.steps or config.epochs * self.per_epoch
        warmup = max(1, self.steps // 10) if config.warmup is None else config.warmup
        self.warmup = min(warmup, self.steps)
        self.step, self.tokens, self.elapsed = 0, 0, 0.0
        self.folder = RunFolder(config.out)

    def go(self, on_step: Callable[[int], None] | None) -> FinetuneResult:
        """All of it: measure, train, save, measure, report."""
        optimized = optimize(self.model)
        try:
            with self._autocast():
                self.layout = Layout(self.model)
                routes = self._routes()
            layout = self.layout.why_padded or "examples packed into one row, none seeing another"
            if self.layout.why_padded is not None:
                layout = f"examples padded, because {layout}"
            ran = Ran(optimized, routes, layout)
            before, expected = self._measure()
            with interruptible() as interrupt:
                # before anything of the run that is there is changed
                saved = self._saved() if self.config.resume else None
                folders.start(self.config, self.folder)
                if self.config.resume:
                    self._go_on_from(saved)
                with Display(self.steps, self.step, interrupt.pipe_closed) as display:
                    self._introduce(display, ran)
                    display.say("before", str(before))
                    self._advance(display, interrupt, on_step)
                after, then = self._measure()
                changed = changes(self.model, self.fingerprints)
                told = Told(self.data, self.guess, before, after, (expected, then), changed, ran)
                self._finish(told)
        finally:
            restore(self.model)
        display.say("after", str(after))
        share = f"{changed.parameters:,} of {changed.total:,} numbers"
        display.say(
            "changed",
            f"{share} in {len(changed.changed):,} parameters; {changed.rest()}",
        )
        display.say("written", f"{self.folder.path}: {self._kind()}, report.md")
        return FinetuneResult(self.folder.path, self.step, before, after, changed, (expected, then))

    def _kind(self) -> str:
        return "adapter" if self.config.method == "lora" else "model"

    # ---- before the first step

    def _routes(self) -> Any:
        batch = self._micro_batches(0)[0]
        self.model.train()
        with torch.no_grad():
            return explain_attention(self.layout.model, **batch.inputs, **self.layout.options)

    def _introduce(self, display: Display, ran: Ran) -> None:
        config = self.config
        display.say("data", self.data)
        for note in self.notes:
            display.say("", note)
        trained = sum(p.numel() for p in self.trained.values())
        total = sum(p.numel() for p in self.model.parameters())
        how = {"lora": f"lora of rank {config.lora_r}", "last-n-layers":
               f"last {config.last_n_layers} blocks"}.get(config.method, config.method)  # fmt: skip
        display.say(
            "trains",
            f"{how}: {trained:,} of {total:,} parameters ({trained / total:.2%}), learning rate "
            f"{config.peak_lr:g}",
        )
        display.say("runs", f"{ran.attention()}; {ran.loss()}")
        display.say("", ran.layout)
        if self.step:
            display.say("resume", f"from step {self.step}")

    def _measure(self) -> tuple[Measured, NextToken]:
        labels = self.encoder.label_ids if self.guess is not None else ()
        with self._autocast():
            found = measure(self.layout, self.held_out, labels)
            return found, next_token(
                self.layout, self.source.tokenizer, self.prompt, self.prompt_ids, NEXT_TOKENS
            )

    # ---- steps

    def _examples(self, step: int) -> Sequence[Example]:
        """Those of a step: every epoch has all, in an order of its own."""
        epoch, place = divmod(step, self.per_epoch)
        generator = torch.Generator().manual_seed(self.config.seed + 1 + epoch)
        order = torch.randperm(len(self.train), generator=generator)
        size = self.config.batch_size
        return [self.train[int(i)] for i in order[place * size : (place + 1) * size]]

    def _micro_batches(self, step: int) -> list[Batch]:
        examples = self._examples(step)
        size = math.ceil(len(examples) / self.config.grad_accumulation)
        parts = [examples[at : at + size] for at in range(0, len(examples), size)]
        return [self.layout.batch(part) for part in parts]

    def _learning_rate(self, step: int) -> float:
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        fall = (self.steps - step) / max(1, self.steps - self.warmup)
        return self.config.peak_lr * min(rise, fall)

    def _train_step(self) -> Tensor:
        batches = self._micro_batches(self.step)
        learned = sum(batch.num_learned for batch in batches)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            with self._autocast():
                loss = loss_sum(self.layout, batch) / learned
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.config.grad_clip or math.inf)
        if not (torch.isfinite(total) and torch.isfinite(norm)):
            what = "loss" if not torch.isfinite(total) else "gradient norm"
            value = float(norm if what == "gradient norm" else total)
            kept = f"what was saved before is in {self.folder.path}"
            raise NonFiniteError(
                f"{COMMAND}: step {self.step + 1}: the {what} is {value}; no weight was changed by "
                f"it; {kept if self._has_checkpoint() else 'nothing was saved before'}"
            )
        self.optimizer.param_groups[0]["lr"] = self._learning_rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += sum(batch.num_tokens for batch in batches)
        return total

    def _advance(
        self, display: Display, interrupt: Interrupt, on_step: Callable[[int], None] | None
    ) -> None:
        """Step until the end or a signal, logging and saving on the way."""
        config = self.config
        self.model.train()
        losses, since, seen, clock = 0.0, 0, self.tokens, time.perf_counter()
        while self.step < self.steps and interrupt.signal is None:
            losses += float(self._train_step())
            since += 1
            last = self.step == self.steps
            save = last or (config.save_every is not None and self.step % config.save_every == 0)
            if save or self.step % config.log_every == 0:
                seconds = time.perf_counter() - clock
                self.elapsed += seconds
                row = {
                    "step": self.step, "tokens": self.tokens, "loss": losses / since,
                    "lr": self._learning_rate(self.step - 1),
                    "tok_per_sec": (self.tokens - seen) / seconds, "elapsed_s": self.elapsed,
                }  # fmt: skip
                display.show(row)
                self.folder.add_metrics(row)
                losses, since, seen, clock = 0.0, 0, self.tokens, time.perf_counter()
            if save:
                self._save()
            if on_step is not None:
                on_step(self.step)
        if interrupt.signal is not None and self.step < self.steps:
            self._save()
            command = f"fastlm finetune --out {shlex.quote(str(self.folder.path))} --resume"
            display.say("saved", f"step {self.step} of {self.steps}; go on with: {command}")
            raise interrupt.exit()

    # ---- files

    def _has_checkpoint(self) -> bool:
        return any(self.folder.checkpoints.glob("step-*"))

    def _save(self) -> None:
        """A checkpoint to go on from, and the adapter or model, which others open."""
        names = {id(p): name for name, p in self.trained.items()}
        tensors = {"rng.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        for parameter, state in self.optimizer.state.items():
            for key, value in state.items():
                tensors[f"{key}.{names[id(parameter)]}"] = value
        checkpoints.save(
            self.folder.checkpoints,
            Checkpoint(
                self.step, {n: p.detach().clone() for n, p in self.trained.items()}, tensors,
                {"tokens": self.tokens, "elapsed": self.elapsed, "data": self.data_hash},
            ),
            keep=1,
        )  # fmt: skip
        folders.write_model(self.model, self.source.tokenizer, self.folder.path)
        labels = list(self.encoder.labels)
        self.folder.write_json(
            folders.SUMMARY,
            {"base": self.config.model, "method": self.config.method, "step": self.step,
             "steps": self.steps, "labels": labels, "text_column": self.config.text_column,
             "label_column": self.config.label_column, "label_prompt": self.config.label_prompt,
             "max_length": self.encoder.max_length},
        )  # fmt: skip

    def _saved(self) -> Checkpoint | None:
        """That of the run to go on with, or None if it has none yet."""
        if not self._has_checkpoint():
            return None
        found = checkpoints.load_latest(self.folder.checkpoints)
        if found.state["data"] != self.data_hash:
            raise ConfigError(f"{COMMAND}: data must be the same files to resume, got others")
        return found

    def _go_on_from(self, found: Checkpoint | None) -> None:
        self.folder.keep_metrics_until(0 if found is None else found.step)
        if found is None:
            return
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(found.model[name])
        for name, parameter in self.trained.items():
            self.optimizer.state[parameter] = {
                key: found.optimizer[f"{key}.{name}"].to(
                    "cpu" if key == "step" else parameter.device
                )
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
        torch.set_rng_state(found.optimizer["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in found.optimizer:
            torch.cuda.set_rng_state(found.optimizer["rng.cuda"], self.device)
        self.step, self.tokens = found.step, found.state["tokens"]
        self.elapsed = found.state["elapsed"]

    def _finish(self, told: Told) -> None:
        summary = json.loads((self.folder.path / folders.SUMMARY).read_text("utf-8"))
        summary |= {
            "before": told.before.to_dict(), "after": told.after.to_dict(),
            "changed": asdict(told.changes),
            "next_token": [found.to_dict() for found in told.expected],
        }  # fmt: skip
        self.folder.write_json(folders.SUMMARY, summary)
        write_report(self.folder, self.config, told)

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        enabled = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=enabled):
            yield


def _encoder(
    config: FinetuneConfig, source: Pretrained, model: nn.Module, rows: Rows, held_out: Rows
) -> Encoder:
    length = max_length_of(model, config.max_length)
    labels = {row.label for row in (*rows.rows, *held_out.rows) if row.label is not None}
    if len(labels) == 1:
        raise DataError(f"{COMMAND}: {config.data} must have two labels, got only {min(labels)!r}")
    return Encoder(source.tokenizer, length, sorted(labels))


def _described(rows: Rows, held_out: Rows, measured: int) -> str:
    counts = Counter(row.label for row in rows.rows if row.label is not None)
    text = f"{len(rows.rows):,} rows ({rows.kind}), {len(held_out.rows):,} more held out"
    if measured < len(held_out.rows):
        text += f", {measured:,} of which are measured"
    seen = {row.pieces for row in rows.rows}
    if again := sum(row.pieces in seen for row in held_out.rows):
        text += f"; {again:,} held-out rows are also among those trained on"
    if counts:
        most = ", ".join(f"{label} {count:,}" for label, count in counts.most_common(8))
        text += f"; {len(counts)} labels: {most}{', ...' if len(counts) > 8 else ''}"
    return text


def _guess(rows: Sequence[Row]) -> float | None:
    """How often the most frequent label of rows is right, or None where they have none."""
    counts = Counter(row.label for row in rows if row.label is not None)
    return max(counts.values()) / len(rows) if counts else None


def _prompt(config: FinetuneConfig, rows: Sequence[Row]) -> str:
    """What the report shows the next token after."""
    if config.prompt is not None:
        return config.prompt
    return rows[0].prompt or rows[0].pieces[0].text[:48]


def _sample(rows: Sequence[Row], most: int) -> Sequence[Row]:
    """At most so many, at even distances."""
    if len(rows) <= most:
        return rows
    return [rows[i * len(rows) // most] for i in range(most)]


def _dtype(config: FinetuneConfig, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    narrow = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if narrow else torch.float32
