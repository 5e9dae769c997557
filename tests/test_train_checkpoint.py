"""Checkpoints: whole or absent after every crash, and damage is never silent."""

from __future__ import annotations

import errno
import os
import random
import re
import resource
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from support.children import start_child

from fastlm.training import checkpoint
from fastlm.training.checkpoint import (
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    Checkpoint,
    CheckpointCorruptError,
    CheckpointError,
    CheckpointWarning,
    Files,
    load,
    load_latest,
    save,
)

FILES = (MODEL, OPTIMIZER, STATE, MANIFEST)


def some(step: int, mark: float) -> Checkpoint:
    """A checkpoint whose every part is known by ``mark``."""
    return Checkpoint(
        step,
        {"weight": torch.full((3, 4), mark), "bias": torch.full((2,), -mark)},
        {"weight.momentum": torch.full((3, 4), mark / 2), "rng.cpu": torch.arange(9).byte()},
        {"mark": mark},
    )


def mark_of(found: Checkpoint) -> float:
    """The mark, once every part has been seen to bear it."""
    mark = found.state["mark"]
    expected = some(found.step, mark)
    for mine, theirs in ((found.model, expected.model), (found.optimizer, expected.optimizer)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    return mark


# ---- crash states


@dataclass
class Recorder(Files):
    """Does everything, and writes it down."""

    log: list[tuple[str, Path, Any]] = field(default_factory=list)

    def make_folder(self, path: Path) -> None:
        self.log.append(("make_folder", path, None))
        super().make_folder(path)

    def write(self, path: Path, data: bytes) -> None:
        self.log.append(("write", path, data))
        super().write(path, data)

    def sync(self, path: Path) -> None:
        self.log.append(("sync", path, None))
        super().sync(path)

    def rename(self, old: Path, new: Path) -> None:
        self.log.append(("rename", old, new))
        super().rename(old, new)

    def remove_folder(self, path: Path) -> None:
        self.log.append(("remove_folder", path, None))
        super().remove_folder(path)


Disk = dict[Path, bytes]


def crash_states(before: Disk, log: list[tuple[str, Path, Any]], root: Path) -> Iterator[Disk]:
    """Every content of ``root`` that a crash after any number of operations may leave.

    A file that was not synced is whole, half or empty.  Of the changes of names in ``root`` since
    it was last synced any number of the last ones may be lost.  A removal may be half done.
    """
    for done in range(len(log) + 1):
        operations = log[:done]
        synced = {path for kind, path, _ in operations if kind == "sync"}
        last_sync = max(
            (i for i, (kind, path, _) in enumerate(operations) if kind == "sync" and path == root),
            default=-1,
        )
        renames = [
            i for i, (kind, *_) in enumerate(operations) if kind == "rename" and i > last_sync
        ]
        for lost in range(len(renames) + 1):
            # what came after a lost change of names did not happen to the names either
            end = renames[len(renames) - lost] if lost else done
            for keep in ("all", "half", "none"):
                disk = dict(before)
                for kind, path, more in operations[:end]:
                    if kind == "write":
                        part = {"all": len(more), "half": len(more) // 2, "none": 0}[keep]
                        disk[path] = more if path in synced else more[:part]
                    elif kind == "rename":
                        moved = {p: p for p in disk if p.is_relative_to(path)}
                        for p in moved:
                            disk[more / p.relative_to(path)] = disk.pop(p)
                    elif kind == "remove_folder":
                        inside = sorted(p for p in disk if p.is_relative_to(path))
                        halfway = keep == "half" and (kind, path, more) == operations[-1]
                        for p in inside[: len(inside) // 2] if halfway else inside:
                            del disk[p]
                yield disk


def contents(root: Path) -> Disk:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def materialize(disk: Disk, root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for path, data in disk.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def damage_newest(root: Path) -> None:
    (root / "step-000002" / MODEL).write_bytes(b"damaged")


Saves = list[tuple[int, float]]


@pytest.mark.parametrize(
    ("name", "earlier", "saved", "keep", "prepare"),
    [
        ("first", [], (1, 1.0), 2, None),
        ("second", [(1, 1.0)], (2, 2.0), 2, None),
        ("rotate", [(1, 1.0), (2, 2.0)], (3, 3.0), 2, None),
        ("keep one", [(1, 1.0)], (2, 2.0), 1, None),
        ("replace", [(1, 1.0), (2, 2.0)], (2, 3.0), 2, None),
        ("replace the only one", [(2, 2.0)], (2, 3.0), 1, None),
        ("replace a damaged one", [(1, 1.0), (2, 2.0)], (2, 3.0), 2, damage_newest),
        ("before a damaged one", [(1, 0.5), (2, 2.0)], (1, 1.5), 1, damage_newest),
    ],
)
def test_every_crash_leaves_a_whole_checkpoint(
    name: str,
    earlier: Saves,
    saved: tuple[int, float],
    keep: int,
    prepare: Callable[[Path], None] | None,
    tmp_path: Path,
) -> None:
    root = tmp_path / "checkpoints"
    root.mkdir()
    for step, mark in earlier:
        save(root, some(step, mark), keep=9)
    if prepare is not None:
        prepare(root)
    before, files = contents(root), Recorder()
    good = {mark for step, mark in earlier if prepare is None or step != 2}
    save(root, some(*saved), keep=keep, files=files)

    states = {tuple(sorted(disk.items())) for disk in crash_states(before, files.log, root)}
    assert len(states) > 10
    outcomes = set()
    for state in states:
        materialize(dict(state), root)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CheckpointWarning)
                outcomes.add(mark_of(load_latest(root)))
        except CheckpointError:
            assert not good, "a good checkpoint was lost"
        # and whatever was left behind, the next save works
        save(root, some(7, 7.0), keep=1)
        assert mark_of(load_latest(root)) == 7.0
        assert [path.name for path in root.iterdir()] == ["step-000007"]
    newest_before = {max(good)} if good else set()
    assert outcomes == newest_before | {saved[1]}


def test_order_without_syncs_would_be_caught(tmp_path: Path) -> None:
    """The enumeration sees what a save that never waits for the disk leaves behind."""

    class Hasty(Recorder):
        def sync(self, path: Path) -> None:
            pass

    root = tmp_path / "checkpoints"
    root.mkdir()
    save(root, some(1, 1.0), keep=1)
    before, files = contents(root), Hasty()
    save(root, some(2, 2.0), keep=1, files=files)
    lost = 0
    for disk in crash_states(before, files.log, root):
        materialize(disk, root)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CheckpointWarning)
                load_latest(root)
        except CheckpointError:
            lost += 1
    assert lost > 0


@pytest.mark.parametrize("step", [1, 2])
def test_failing_disk_keeps_the_old_checkpoint(step: int, tmp_path: Path) -> None:
    class Failing(Files):
        left = 0

        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if name in ("make_folder", "write", "sync", "rename", "remove_folder"):
                if self.left == 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                self.left -= 1
            return value

    root, failures = tmp_path / "checkpoints", 0
    while True:
        shutil.rmtree(root, ignore_errors=True)
        save(root, some(1, 1.0), keep=1)
        files = Failing()
        files.left = failures
        try:
            save(root, some(step, 2.0), keep=1, files=files)
            break
        except OSError as error:
            assert error.errno == errno.ENOSPC
        assert mark_of(load_latest(root)) in (1.0, 2.0)
        failures += 1
    assert failures > 10
    assert mark_of(load_latest(root)) == 2.0


def test_file_size_limit_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, some(1, 1.0), keep=1)

    def too_large() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        large = Checkpoint(2, {"weight": torch.zeros(10_000)}, {}, {})
        with pytest.raises(OSError, match="File too large"):
            save(tmp_path, large, keep=1)

    _, status = os.waitpid(start_child(too_large), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert mark_of(load_latest(tmp_path)) == 1.0


def kill_while_saving(folder: Path, kills: int) -> None:
    save(folder, some(1, 1.0), keep=2)
    draw = random.Random(0)
    for _ in range(kills):
        first = load_latest(folder).step

        def forever(first: int = first) -> None:
            step = first
            while True:
                step += 1
                save(folder, some(step, float(step)), keep=2)

        child = start_child(forever)
        while max(folder.glob("step-*")).name == checkpoint.name_of(first):
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = load_latest(folder)
        assert found.step > first
        assert mark_of(found) == found.step


def test_killed_while_saving(tmp_path: Path) -> None:
    kill_while_saving(tmp_path, 12)


@pytest.mark.slow
def test_killed_while_saving_often(tmp_path: Path) -> None:
    kill_while_saving(tmp_path, 300)


# ---- damage


def check_damage_is_seen(folder: Path, rounds: int) -> None:
    good = save(folder, some(1, 1.0), keep=9)
    other = save(folder, some(2, 2.0), keep=9)
    draw = random.Random(1)
    originals = {name: (other / name).read_bytes() for name in FILES}
    for _ in range(rounds):
        name = draw.choice(FILES)
        data = originals[name]
        at = draw.randrange(len(data))
        flipped = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        added = data + draw.randbytes(draw.randint(1, 9))
        swapped = (good / name).read_bytes()
        bad = draw.choice([flipped, flipped, flipped, data[:at], added, swapped, None])
        if bad is None:
            (other / name).unlink()
        else:
            (other / name).write_bytes(bad)
        # a swapped manifest accuses the files that it does not describe
        blamed = name if bad != swapped or name != MANIFEST else ""
        with pytest.raises(CheckpointCorruptError, match=f"step-000002: .*{blamed}"):
            load(other)
        with pytest.warns(CheckpointWarning, match=f"{blamed}.*; using step-000001 instead"):
            assert mark_of(load_latest(folder)) == 1.0
        (other / name).write_bytes(data)
        assert mark_of(load(other)) == 2.0


def test_damage_is_never_silent_and_names_the_file(tmp_path: Path) -> None:
    check_damage_is_seen(tmp_path, 100)


@pytest.mark.slow
def test_damage_is_never_silent_in_long(tmp_path: Path) -> None:
    check_damage_is_seen(tmp_path, 3000)


def test_whole_checkpoint_under_another_name_is_refused(tmp_path: Path) -> None:
    save(tmp_path, some(1, 1.0), keep=9).rename(tmp_path / "step-000002")
    with pytest.raises(CheckpointCorruptError, match=r"state\.json is that of step-000001"):
        load(tmp_path / "step-000002")


def test_all_damaged_names_every_one(tmp_path: Path) -> None:
    for step in (1, 2):
        (save(tmp_path, some(step, 1.0), keep=9) / MODEL).unlink()
    with pytest.raises(CheckpointError, match=r"step-000002: model.*; step-000001: model"):
        load_latest(tmp_path)


def test_none_at_all_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must hold a checkpoint to resume from, got none"):
        load_latest(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_values_that_are_not_finite_are_never_saved(
    part: str, value: float, tmp_path: Path
) -> None:
    save(tmp_path, some(1, 1.0), keep=1)
    before = contents(tmp_path)
    bad = some(2, 2.0)
    next(iter(getattr(bad, part).values()))[-1, -1] = value
    with pytest.raises(CheckpointError, match=r"step 2 is not saved: .*weight.* is not finite"):
        save(tmp_path, bad, keep=1)
    assert contents(tmp_path) == before


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, some(step, 1.0), keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-00000{s}" for s in (4, 5, 6)]


def test_nothing_is_pickled() -> None:
    for source in Path(checkpoint.__file__).parent.glob("*.py"):
        assert not re.search(r"pickle|(?<!safetensors\.)torch\.load\b", source.read_text()), source
