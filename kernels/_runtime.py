"""Facts about the machine, asked once."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Device:
    """What launch plans may depend on.

    Attributes:
        arch: 80 for Ampere, 90 for Hopper, 100 for Blackwell.
        num_sms: Streaming multiprocessors; may shape the grid and nothing else.
        shared_memory: Bytes one program may use.
    """

    arch: int
    num_sms: int
    shared_memory: int


# Bytes of shared memory one block may opt in to (CUDA C++ programming guide, compute capabilities).
SHARED_MEMORY = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
_SMS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 170}


def modelled(arch: int) -> Device:
    """The largest product of an architecture, for plans made away from a GPU."""
    return Device(arch, _SMS[arch], SHARED_MEMORY[arch])


# The device that plans are made for away from a GPU.
_pretended = modelled(90)


@contextlib.contextmanager
def pretend(device: int | Device) -> Iterator[None]:
    """Make plans for tensors outside a GPU as if they were on this one, or on such an arch."""
    global _pretended
    before = _pretended
    _pretended = device if isinstance(device, Device) else modelled(device)
    try:
        yield
    finally:
        _pretended = before


@functools.cache
def _cuda_device(index: int) -> Device:
    properties: Any = torch.cuda.get_device_properties(index)  # its stub lacks one attribute
    arch = 10 * properties.major + properties.minor
    return Device(arch, properties.multi_processor_count, properties.shared_memory_per_block_optin)


def device_of(tensor: torch.Tensor) -> Device:
    """What a launch plan for ``tensor`` is made for; off a GPU, Hopper or what is pretended."""
    if tensor.is_cuda:
        return _cuda_device(tensor.device.index)
    return _pretended


def present() -> Device | None:
    """The current GPU, if there is one."""
    return _cuda_device(torch.cuda.current_device()) if torch.cuda.is_available() else None


def compiling_environment() -> dict[str, str]:
    """For a child process in which ``@triton.jit`` compiles."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def refuses_device(tensor: torch.Tensor, name: str) -> str | None:
    """Why Triton cannot run on the device of ``tensor``, called ``name``, or None."""
    if tensor.is_cuda:
        arch = device_of(tensor).arch
        return None if arch >= 80 else f"Triton needs sm_80 or newer, {name} is on sm_{arch}"
    if tensor.device.type == "cpu" and INTERPRETED:
        return None
    if tensor.device.type == "cpu":
        return f"{name} is on cpu: Triton needs a CUDA device, or TRITON_INTERPRET=1 to interpret"
    return f"{name} is on {tensor.device.type}: Triton needs a CUDA device"
