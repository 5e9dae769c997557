"""What a CUDA graph needs of a step, with a GPU and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support.host_sync import no_host_sync

from fastlm.kernels._launch import recorded


def launches(step: Callable[[], None]) -> list[Any]:
    """What ``step`` launches, and that it waits for nothing."""
    with no_host_sync(), recorded() as log:
        step()
    return [
        (call.name, call.grid, call.constants, [getattr(x, "shape", x) for x in call.args])
        for call in log
    ]


def captured(step: Callable[[], None], device: str) -> Callable[[], None]:
    """``step`` as a CUDA graph, to be replayed.

    Away from a GPU ``step`` itself, held to what a graph needs: it waits for nothing, and launches
    the same whatever the values are.
    """
    if device != "cuda":
        first = launches(step)

        def replay() -> None:
            assert launches(step) == first

        return replay
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles the kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
