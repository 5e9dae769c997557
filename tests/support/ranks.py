"""Processes that hold shards of one layer, forked once and asked many questions."""

from __future__ import annotations

import datetime
import functools
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.children import start_child

# Longer than any case takes, shorter than anyone waits for a rank that hangs.
SECONDS = 60


class Ranks:
    """``count`` processes in one gloo group, which meet in a file and not at a port."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._pipes: list[Connection] = []
        self._children: list[int] = []

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name, "store"))
        for rank in range(self._count):
            ours, theirs = Pipe()
            serve = functools.partial(_serve, rank, self._count, store, theirs)
            self._children.append(start_child(serve))
            theirs.close()
            self._pipes.append(ours)

    def run(self, case: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``case(*args)`` returns on each rank.

        Raises:
            AssertionError: It raised on some rank, or did not end; with their tracebacks.
        """
        if not self._pipes:
            self._start()
        for pipe in self._pipes:
            pipe.send((case, args))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(SECONDS):
                failures.append(f"rank {rank} hangs")
                break
            failed, result = pipe.recv()
            (failures if failed else results).append(result)
        if failures:
            self.close()  # whoever waits for a failed rank answers no more; others start anew
            raise AssertionError("\n".join(failures))
        return results

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for child in self._children:
            os.kill(child, 9)
            os.waitpid(child, 0)
        if self._children:
            self._folder.cleanup()
        self._pipes, self._children = [], []


def _serve(rank: int, count: int, store: str, questions: Connection) -> None:
    dist.init_process_group(
        "gloo", rank=rank, world_size=count, store=dist.FileStore(store, count),
        timeout=datetime.timedelta(seconds=SECONDS / 2),
    )  # fmt: skip
    while True:
        case, args = questions.recv()
        torch.manual_seed(0)
        try:
            questions.send((False, case(*args)))
        except BaseException:
            questions.send((True, f"rank {rank}: {traceback.format_exc()}"))
