"""``fastlm._C``, the kernels in CUDA C++, which an installation has or has not.

It is built on request (docs/cuda.md) and links no torch: a launcher takes addresses, sizes and a
stream, and allocates nothing.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastlm.kernels._runtime import device_of

NAME = "fastlm._C"


def extension() -> ModuleType | str:
    """The module, or why there is none."""
    try:
        return importlib.import_module(NAME)
    except ModuleNotFoundError as error:
        if error.name != NAME:
            raise
        return f"{NAME} is not built (FASTLM_BUILD_CUDA=1 builds it with fastlm, see docs/cuda.md)"
    except ImportError as error:
        # made for another Python, or without a library that it links
        return f"{NAME} cannot be loaded: {error}"


def description() -> str:
    """What is there, in a sentence."""
    module: Any = extension()
    return module if isinstance(module, str) else f"{NAME} is built for {module.archs}"


def kernels() -> Any:
    """The module, of a call that :func:`refuses_device` has let through."""
    module = extension()
    assert isinstance(module, ModuleType), module
    return module


def refuses_device(tensor: Tensor, name: str) -> str | None:
    """Why the kernels cannot run on the device of ``tensor``, called ``name``, or None."""
    module: Any = extension()
    if isinstance(module, str):
        return module
    if module.host:
        return None if tensor.is_cpu else f"this build of {NAME} runs on CPU tensors alone"
    if tensor.dtype == torch.float64 and not module.float64:
        return f"{name} is float64, which {NAME} is built with if FASTLM_CUDA_FLOAT64=1"
    if not tensor.is_cuda:
        return f"{name} is on {tensor.device.type}: {NAME} needs a CUDA device"
    arch = device_of(tensor).arch
    if serves(module.archs, arch):
        return None
    return f"{NAME} is built for {module.archs}, {name} is on sm_{arch}"


def serves(archs: str, arch: int) -> bool:
    """Whether code for ``archs``, such as ``80;90a;100+PTX``, runs on ``arch``.

    Code runs on later devices of its generation; with an ``a`` on its own alone; as PTX on all
    that are newer.
    """
    for built in archs.split(";"):
        number = int(built.removesuffix("+PTX").removesuffix("a"))
        if number == arch:
            return True
        if number < arch and (
            built.endswith("+PTX") or (built.isdigit() and number // 10 == arch // 10)
        ):
            return True
    return False


def dtype_of(tensor: Tensor) -> Any:
    """The dtype as the launchers are told it."""
    return getattr(kernels().Dtype, str(tensor.dtype).removeprefix("torch."))


def address(tensor: Tensor | None) -> int:
    """Where the elements are; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def place(tensor: Tensor) -> dict[str, int]:
    """On which device, and behind what work, a kernel on ``tensor`` runs."""
    if not tensor.is_cuda:
        return {"device": 0, "stream": 0}
    stream = torch.cuda.current_stream(tensor.device).cuda_stream
    return {"device": tensor.device.index, "stream": stream}
