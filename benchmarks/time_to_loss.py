"""Seconds until a validation loss: fastlm's defaults against nanoGPT's recipe for a CPU.

    python benchmarks/time_to_loss.py [--data FILE] [--out FOLDER]

Both train on the characters of one English text, hold out its last tenth, and take turns of a
few seconds, so that whatever else the machine does slows both.  Each is a process of its own: two
OpenMP pools in one have more threads than there are cores, and libgomp then puts idle threads to
sleep at once, which doubles the time of small steps.  The baseline is a plain PyTorch model of the
shape and recipe that nanoGPT's README gives for a MacBook (4 layers, 4 heads, width 128, 64 tokens,
batch 12, 2000 steps, no dropout); its last validation loss is the goal.  fastlm is
``fastlm train --tokenizer char`` with nothing else set, its own evaluations and checkpoints
included.  Not counted for either: reading the text, the first step, the last validation.  The goal
must be reached in sequences of fastlm's own length and in ones of 64 tokens, like the baseline's.

The text, unless ``--data`` names another, is what Python itself brings on every machine: the
language reference that ``help()`` shows, and docstrings of the standard library, shuffled.
"""

from __future__ import annotations

import argparse
import ast
import math
import multiprocessing
import random
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlm
from fastlm.benchmarks import _report
from fastlm.benchmarks._timing import measure_ceilings

CHARACTERS = 1_115_394
"""As many as the text of nanoGPT's example has."""

SHORTEST_DOCSTRING = 200

# seconds of a turn, about as the two need time in all
BASELINE_TURN, FASTLM_TURN = 4.0, 1.0

LAYERS, HEADS, WIDTH, CONTEXT, BATCH, STEPS = 4, 4, 128, 64, 12, 2000
PEAK_LR, LAST_LR, WARMUP, BETAS, WEIGHT_DECAY = 1e-3, 1e-4, 100, (0.9, 0.99), 0.1


# ---- the text


def english(characters: int = CHARACTERS) -> str:
    """About a megabyte of English in ASCII, the same for one version of Python."""
    from pydoc_data.topics import topics

    parts = [topics[name] for name in sorted(topics)]
    length = sum(map(len, parts))
    for docstring in _docstrings(Path(sysconfig.get_path("stdlib"))):
        if length > characters:
            break
        parts.append(docstring)
        length += len(docstring)
    random.Random(0).shuffle(parts)
    return "\n\n\n".join(parts).encode("ascii", "ignore").decode()[:characters]


def _docstrings(library: Path) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in sorted(library.rglob("*.py")):
        if {"site-packages", "test", "tests", "lib2to3"} & set(file.relative_to(library).parts):
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, documented):
                docstring = ast.get_docstring(node) or ""
                if len(docstring) >= SHORTEST_DOCSTRING:
                    yield docstring


# ---- taking turns


class Turns:
    """One of two processes of which one at a time works; counts its seconds of work.

    Args:
        other: A pipe to the other one's.
        turn: Seconds of work before it is the other's turn.
    """

    def __init__(self, other: Connection, turn: float) -> None:
        self.seconds = 0.0
        self.others_result: dict[str, Any] | None = None
        self._other, self._turn = other, turn
        self._since = self._turn_start = time.perf_counter()

    def wait(self) -> None:
        """Until it is this one's turn; EOFError if the other has died."""
        if self.others_result is None:
            self.others_result = self._other.recv()
        self._since = self._turn_start = time.perf_counter()

    def step(self, *, counts: bool = True) -> None:
        """After each step: count its seconds, and let the other work when the turn is over."""
        now = time.perf_counter()
        if counts:
            self.seconds += now - self._since
        self._since = now
        if now - self._turn_start >= self._turn and self.others_result is None:
            self._other.send(None)
            self.wait()

    def end(self, result: dict[str, Any]) -> None:
        """Tell the other, which has all time from now on."""
        self._other.send(result)


# ---- the baseline


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        rows, length, _ = hidden.shape
        query, key, value = (
            part.view(rows, length, HEADS, -1).transpose(1, 2)
            for part in self.qkv(self.norm_1(hidden)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(rows, length, WIDTH))
        return hidden + self.down(F.gelu(self.up(self.norm_2(hidden))))


class Baseline(nn.Module):
    """nanoGPT's model: learned positions, LayerNorm, GELU, head tied to the embedding."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                adds = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if adds else 0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        hidden = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.norm(hidden) @ self.tokens.weight.T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train_baseline(text: str, other: Connection) -> None:
    """Train when it is the turn for it, and send the baseline's row to fastlm's process."""
    turns = Turns(other, BASELINE_TURN)
    characters = {char: id for id, char in enumerate(sorted(set(text)))}
    ids = torch.tensor([characters[char] for char in text])
    split = int(len(ids) * 0.9)
    train, held_out = ids[:split], ids[split:]
    torch.manual_seed(1337)
    model = Baseline(len(characters))
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=BETAS, fused=True)
    window = torch.arange(CONTEXT)
    turns.wait()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = _baseline_lr(step)
        at = torch.randint(len(train) - CONTEXT, (BATCH, 1)) + window
        loss = model(train[at], train[at + 1])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turns.step(counts=step > 0)
    row = {
        "provider": "nanogpt-recipe",
        "seconds": turns.seconds,
        "steps": STEPS,
        "tokens": STEPS * BATCH * CONTEXT,
        "parameters": sum(p.numel() for p in model.parameters()),
        "val_loss": held_out_loss(model, held_out, CONTEXT),
    }
    turns.end(row)


def _baseline_lr(step: int) -> float:
    if step < WARMUP:
        return PEAK_LR * (step + 1) / (WARMUP + 1)
    done = (step - WARMUP) / (STEPS - WARMUP)
    return LAST_LR + 0.5 * (1 + math.cos(math.pi * done)) * (PEAK_LR - LAST_LR)


@torch.no_grad()
def held_out_loss(loss_of: Any, ids: Tensor, context: int) -> float:
    """Mean over windows of ``context`` tokens that cover the held-out text."""
    count = (len(ids) - 1) // context
    inputs = ids[: count * context].view(count, context)
    targets = ids[1 : count * context + 1].view(count, context)
    losses = [
        loss_of(x, y).item() * len(x)
        for x, y in zip(inputs.split(64), targets.split(64), strict=True)
    ]
    return sum(losses) / count


# ---- fastlm


def train_fastlm(data: Path, out: Path, turns: Turns) -> dict[str, Any]:
    """The row of fastlm."""

    def on_step(step: int) -> None:
        # the first one warms up, and nothing of it counts
        turns.step(counts=step > 1)

    config = fastlm.TrainConfig(data=str(data), tokenizer="char", out=str(out), device="cpu")
    result = fastlm.train(config, on_step=on_step)
    model = fastlm.load(out, device="cpu").model
    held_out = torch.from_numpy(fastlm_held_out(out))
    return {
        "provider": "fastlm",
        "seconds": turns.seconds,
        "steps": result.steps,
        "tokens": result.tokens,
        "parameters": result.parameters,
        "val_loss": result.val_loss,
        "val_loss_in_windows_of_64": held_out_loss(
            lambda x, y: model(x, targets=y).loss, held_out, CONTEXT
        ),
        "config": config.resolved().to_dict() | {"data": None, "out": None},
    }


def fastlm_held_out(out: Path) -> Any:
    from fastlm.training.data import read_tokens

    return read_tokens(out / "tokens").validation.astype("int64")


def main(argv: list[str] | None = None) -> int:
    """Return 0 if fastlm reached the baseline's loss, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, help="another English text, UTF-8")
    parser.add_argument("--out", type=Path, help="folder of the result, time_to_loss.json")
    options = parser.parse_args(argv)
    env = _report.environment("cpu", measure_ceilings("cpu", [torch.float32]))
    folder = options.out or Path(__file__).parent / "results" / _report.slug(env["device"])

    with tempfile.TemporaryDirectory() as scratch:
        data = options.data or Path(scratch) / "english.txt"
        if options.data is None:
            data.write_text(english(), "utf-8")
        text = data.read_text("utf-8")
        here, there = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        worker = context.Process(target=train_baseline, args=(text, there), daemon=True)
        worker.start()
        there.close()
        turns = Turns(here, FASTLM_TURN)
        ours = train_fastlm(data, Path(scratch) / "run", turns)
        turns.end(ours)
        while turns.others_result is None:
            turns.wait()
        baseline = turns.others_result
        worker.join()

    shape = {"characters": len(text), "vocabulary": len(set(text))}
    common = {"op": "train", "mode": "time_to_loss", "dtype": "float32", "shape": shape}
    rows: list[dict[str, Any]] = [common | baseline, common | ours]
    ratio = rows[1]["seconds"] / rows[0]["seconds"]
    # with fastlm's own context, and with no more than the baseline's
    reached = max(rows[1]["val_loss"], rows[1]["val_loss_in_windows_of_64"]) <= rows[0]["val_loss"]
    rows[1] |= {"reached": reached, "ratio": ratio if reached else None}
    _report.save(folder / "time_to_loss.json", env, rows)
    for row in rows:
        print(
            f"{row['provider']:<16}{row['seconds']:7.1f} s  {row['steps']} steps  "
            f"{row['tokens']:,} tokens  {row['parameters']:,} parameters  val {row['val_loss']:.4f}"
        )
    print(f"fastlm in windows of 64 tokens too: val {ours['val_loss_in_windows_of_64']:.4f}")
    verdict = f"in {ratio:.3f} of its time" if reached else "not reached"
    print(f"the baseline's loss {verdict}; written to {folder / 'time_to_loss.json'}")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
