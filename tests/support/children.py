"""Work in a forked child, which may be killed."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch


def start_child(work: Callable[[], None]) -> int:
    """Fork, work there, return the process id; the child exits 0, or 1 after an exception."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)
        work()
        status = 0
    finally:
        os._exit(status)
