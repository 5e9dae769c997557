"""Tensors placed so that a wrong address crashes, and a way to watch a crash."""

from __future__ import annotations

import ctypes
import faulthandler
import math
import mmap
import os
import resource
import signal
import sys
import traceback
import warnings
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_PROT_NONE, _PROT_READ_WRITE = 0, 3
_PRIVATE_ANONYMOUS_NORESERVE = 0x02 | 0x20 | 0x4000
_PAGE = mmap.PAGESIZE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _map(size: int) -> int:
    """Address of ``size`` zero bytes that take no memory until they are written."""
    flags = _PRIVATE_ANONYMOUS_NORESERVE
    address = _libc.mmap(None, size, _PROT_READ_WRITE, flags, -1, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), f"cannot map {size} bytes")
    return address


def _tensor_at(address: int, elements: int, dtype: torch.dtype, mapping: tuple[int, int]) -> Tensor:
    """One-dimensional tensor over mapped memory, unmapped with its storage."""
    buffer = (ctypes.c_uint8 * (elements * dtype.itemsize)).from_address(address)
    weakref.finalize(buffer, _libc.munmap, *mapping).atexit = False
    return torch.frombuffer(buffer, dtype=dtype, count=elements)


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last one a view touches."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def guarded(tensor: Tensor, end: str = "back") -> Tensor:
    """A copy of ``tensor``, strides kept, that touches a page nobody may read or write.

    Args:
        tensor: CPU tensor.
        end: ``"back"``: the byte after its last element is protected; ``"front"``: the one before
            its first.  The far side is protected too, less than a page away.
    """
    elements = max(1, _extent(tensor.shape, tensor.stride()))
    size = elements * tensor.element_size()
    body = math.ceil(size / _PAGE) * _PAGE
    base = _map(body + 2 * _PAGE)
    _libc.mprotect(base, _PAGE, _PROT_NONE)
    _libc.mprotect(base + _PAGE + body, _PAGE, _PROT_NONE)
    first = base + _PAGE + {"front": 0, "back": body - size}[end]
    flat = _tensor_at(first, elements, tensor.dtype, (base, body + 2 * _PAGE))
    copy = flat.as_strided(tensor.shape, tensor.stride())
    if 0 not in tensor.stride():
        return copy.copy_(tensor.detach())
    # an expanded dimension holds one value: write it once
    narrow = tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())
    copy[narrow].copy_(tensor.detach()[narrow])
    return copy


def sparse(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros with strides as large as you like; only pages that are written take memory."""
    elements = max(1, _extent(shape, strides))
    size = elements * dtype.itemsize
    base = _map(size)
    return _tensor_at(base, elements, dtype, (base, size)).as_strided(shape, strides)


def in_child(function: Callable[[], object], seconds: int = 120) -> None:
    """Run ``function`` in a forked process.

    Raises:
        AssertionError: It raised (the message is its traceback) or a signal ended it (the message
            begins with the signal's name; SIGALRM after ``seconds``).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # torch's threads do not survive a fork, and the child asks for one thread first
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(reader)
        _run_and_exit(function, writer, seconds)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        report = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        raise AssertionError(f"{signal.Signals(-status).name} ended the child")
    if status != 0:
        raise AssertionError(report)


def _run_and_exit(function: Callable[[], object], report: int, seconds: int) -> None:
    """Never returns: nothing of the parent's, such as its cleanup, may run in the child."""
    code = 1
    try:
        faulthandler.disable()  # a crash is reported by its signal; no page of stack, no core file
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        torch.set_num_threads(1)  # a fork has lost OpenMP's workers and would wait for them
        function()
        code = 0
    except BaseException:
        os.write(report, traceback.format_exc().encode())
    finally:
        os._exit(code)
