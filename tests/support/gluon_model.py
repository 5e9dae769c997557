"""A Gluon kernel on a CPU: its own source, run by Python, to be run in every order of its parts.

:func:`run` executes the source of a kernel with modules of this file in place of Triton's, the
partitions of a program one after the other, and gives what each of them did to barriers and shared
memory.  No wait waits: a reader gets the copy that it has waited for, counted by its waits.  That
waits do hold it where they must is for :func:`support.gluon_orders.explore` to show.  What a
partition does depends on no data, so one recording serves all orders.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).parents[2]
# a barrier or a place for a tile: name and number
Place = tuple[str, int]


class HazardError(AssertionError):
    """What a GPU would do wrong, at once or in some order."""


@dataclass(frozen=True)
class Event:
    """What a partition does.

    Attributes:
        kind: ``expect`` (a barrier, and ``count`` bytes), ``copy`` (of ``count`` bytes to a tile,
            which the barrier counts), ``wait`` (for the parity ``count`` of a barrier), ``arrive``
            (``count`` times), ``mma`` (which reads the versions of ``reads``), ``mma_wait`` (until
            ``count`` or less are at work).
    """

    kind: str
    barrier: Place | None = None
    tile: Place | None = None
    count: int = 0
    reads: tuple[tuple[Place, int], ...] = ()


@dataclass
class Recording:
    """What a program did.

    Attributes:
        arrivals: Of each barrier, how many end its phase.
        partitions: Name to what it did, in order.
    """

    arrivals: dict[Place, int] = field(default_factory=dict)
    partitions: dict[str, list[Event]] = field(default_factory=dict)
    _current: list[Event] = field(default_factory=list)
    _barrier_of: dict[Place, Place] = field(default_factory=dict)
    _versions: dict[Place, list[torch.Tensor]] = field(default_factory=dict)
    _seen: dict[Place, int] = field(default_factory=dict)
    _made: int = 0

    def name(self) -> str:
        self._made += 1
        return str(self._made)

    def add(self, event: Event) -> None:
        self._current.append(event)
        if event.kind == "wait" and event.barrier in self._barrier_of:
            tile = self._barrier_of[event.barrier]
            self._seen[tile] = self._seen.get(tile, 0) + 1

    def begin(self, name: str) -> None:
        self._current = self.partitions.setdefault(name, [])
        self._seen = {}

    def copied(self, barrier: Place, tile: Place, data: torch.Tensor) -> None:
        self._barrier_of[barrier] = tile
        self._versions.setdefault(tile, []).append(data)

    def read(self, tile: Place) -> tuple[int, torch.Tensor]:
        version = self._seen.get(tile, 0) - 1
        if not 0 <= version < len(self._versions.get(tile, ())):
            raise HazardError(f"tile {tile} is read without having been waited for")
        return version, self._versions[tile][version]


_recording = Recording()


# What a kernel sees in place of tensors' descriptors and of shared memory.


@dataclass
class Descriptor:
    """Of a tensor, copied in tiles of ``block``, zeros beyond its ends."""

    tensor: torch.Tensor
    block: Sequence[int]
    layout: object = None

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def block_type(self) -> types.SimpleNamespace:
        size = torch.Size(self.block).numel() * self.tensor.itemsize
        return types.SimpleNamespace(nbytes=size)

    def tile(self, start: Sequence[Any]) -> torch.Tensor:
        out = self.tensor.new_zeros(self.block)
        ends = [min(int(s) + n, size) for s, n, size in zip(
            start, self.block, self.tensor.shape, strict=True)]  # fmt: skip
        inside = self.tensor[tuple(slice(int(s), e) for s, e in zip(start, ends, strict=True))]
        out[tuple(slice(0, n) for n in inside.shape)] = inside
        return out


@dataclass
class Shared:
    """An array of tiles or barriers, or one of them, read through a shape and an order."""

    name: str
    dtype: torch.dtype
    shape: Sequence[int]
    number: int | None = None
    turned: bool = False

    @property
    def place(self) -> Place:
        assert self.number is not None
        return self.name, self.number

    def index(self, number: Any) -> Shared:
        assert self.number is None and 0 <= int(number) < self.shape[0]
        return Shared(self.name, self.dtype, self.shape[1:], int(number))

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.name, self.dtype, shape, self.number, self.turned)

    def permute(self, order: Sequence[int]) -> Shared:
        assert tuple(order) == (1, 0)
        return Shared(self.name, self.dtype, self.shape[::-1], self.number, not self.turned)


@dataclass
class Pending:
    """A product that may be at work: nothing but a wait gives its value."""

    value: torch.Tensor
    number: int


@dataclass
class Pointer:
    """A pointer into a tensor without gaps."""

    tensor: torch.Tensor
    offset: Any = 0

    @property
    def dtype(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(element_ty=self.tensor.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.tensor, self.offset + offset)


def _store(pointer: Pointer, value: torch.Tensor, mask: torch.Tensor) -> None:
    offsets, value, mask = torch.broadcast_tensors(pointer.offset, value, mask)
    flat = pointer.tensor.view(-1)
    flat[offsets[mask]] = value[mask].to(flat.dtype)


def _mma(a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Pending:
    operands, reads = [], []
    for x in (a, b):
        if isinstance(x, Shared):
            version, data = _recording.read(x.place)
            reads.append((x.place, version))
            matrix = data.reshape(x.shape[::-1] if x.turned else x.shape)
            operands.append(matrix.t() if x.turned else matrix)
        else:
            operands.append(x)
    event = Event("mma", reads=tuple(reads))
    _recording.add(event)
    value = operands[0].to(acc.dtype) @ operands[1].to(acc.dtype)
    number = sum(e.kind == "mma" for e in _recording._current)
    return Pending(value + acc if use_acc else value, number)


def _mma_wait(outstanding: int, deps: Sequence[Pending]) -> torch.Tensor:
    _recording.add(Event("mma_wait", count=outstanding))
    (dep,) = deps
    issued = sum(e.kind == "mma" for e in _recording._current)
    if dep.number > issued - outstanding:
        raise HazardError("a product is used that may still be at work")
    return dep.value


def _warp_specialize(partitions: Any, warps: Sequence[int], registers: Sequence[int]) -> None:
    # whoever copies comes last in the kernel, and first here, so that there is something to read
    for function, arguments in reversed(partitions):
        _recording.begin(function.__name__)
        function(*arguments)


def _allocate(dtype: Any, shape: Sequence[int], layout: object) -> Shared:
    return Shared(_recording.name(), dtype, list(shape))


def _decorator(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    return function if function is not None else lambda f: f


def _maximum(a: Any, b: Any) -> torch.Tensor:
    return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))


def _minimum(a: Any, b: Any) -> torch.Tensor:
    return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))


def _language(program: int) -> types.ModuleType:
    """What kernels use of ``triton.language`` and of Gluon's."""
    tl = types.ModuleType("language")
    tl.constexpr = lambda value: value
    tl.int32, tl.int64, tl.float32 = torch.int32, torch.int64, torch.float32
    tl.program_id = lambda axis: torch.tensor(program)
    tl.cdiv = lambda a, b: -(-a // b)
    tl.arange = lambda start, end, layout=None: torch.arange(start, end)
    tl.full = lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype)
    tl.zeros = lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype)
    tl.where = torch.where
    tl.minimum, tl.maximum = _minimum, _maximum
    tl.max, tl.sum = torch.amax, torch.sum
    tl.exp2, tl.log2, tl.abs = torch.exp2, torch.log2, torch.abs
    tl.static_range = range
    tl.convert_layout = lambda value, layout: value
    tl.allocate_shared_memory = _allocate
    tl.warp_specialize = _warp_specialize
    tl.store = _store
    for name in ("NVMMADistributedLayout", "SliceLayout", "DotOperandLayout"):
        setattr(tl, name, lambda *_: None)
    return tl


def _init(barrier: Shared, count: int) -> None:
    _recording.arrivals[barrier.place] = int(count)


def _hopper() -> types.ModuleType:
    hopper = types.ModuleType("hopper")
    hopper.fence_async_shared = lambda: None
    hopper.warpgroup_mma, hopper.warpgroup_mma_wait = _mma, _mma_wait
    hopper.mbarrier = types.SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=_init,
        expect=lambda bar, n: _recording.add(Event("expect", bar.place, count=n)),
        wait=lambda bar, parity: _recording.add(Event("wait", bar.place, count=int(parity))),
        arrive=lambda bar, count: _recording.add(Event("arrive", bar.place, count=count)),
    )

    def copy(desc: Descriptor, start: Sequence[Any], barrier: Shared, tile: Shared) -> None:
        _recording.copied(barrier.place, tile.place, desc.tile(start))
        _recording.add(Event("copy", barrier.place, tile.place, desc.block_type.nbytes))

    hopper.tma = types.SimpleNamespace(async_copy_global_to_shared=copy)
    return hopper


@contextlib.contextmanager
def _modules(program: int) -> Iterator[None]:
    language, gluon = _language(program), types.ModuleType("gluon")
    triton = types.ModuleType("triton")
    triton.jit = triton.constexpr_function = _decorator
    triton.language, triton.cdiv = language, language.cdiv
    gluon.jit = gluon.constexpr_function = _decorator
    gluon.language = language
    names = {
        "triton": triton,
        "triton.language": language,
        "triton.experimental": types.ModuleType("experimental"),
        "triton.experimental.gluon": gluon,
        "triton.experimental.gluon.language": language,
        "triton.experimental.gluon.language.nvidia": types.ModuleType("nvidia"),
        "triton.experimental.gluon.language.nvidia.hopper": _hopper(),
    }
    names["triton.experimental"].gluon = gluon
    ours = {name: None for name in sys.modules if name.startswith("modelled")}
    with mock.patch.dict(sys.modules, names):
        yield
    for name in [name for name in sys.modules if name.startswith("modelled") and name not in ours]:
        del sys.modules[name]


def _loaded(path: str, text: str | None = None) -> types.ModuleType:
    """The module, its neighbours, and those of the package above, with the modules in place."""
    file = ROOT / path
    for name, folder in (("modelled", file.parent.parent), ("modelled.kernel", file.parent)):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    spec = importlib.util.spec_from_file_location(f"modelled.kernel.{file.stem}", file)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    source = file.read_text() if text is None else text
    exec(compile(source, str(file), "exec"), vars(module))
    return module


def run(
    path: str, kernel: str, program: int, *args: Any, text: str | None = None, **constants: Any
) -> Recording:
    """Run one program of a kernel; what it stores goes to the tensors of its pointers.

    Args:
        path: From the repository root.
        kernel: Name of the function.
        program: Number of the program.
        args: :class:`Descriptor`, :class:`Pointer` and numbers.
        text: Source in place of the file's.
    """
    global _recording
    _recording = Recording()
    with _modules(program):
        getattr(_loaded(path, text), kernel)(*args, **constants)
    return _recording
