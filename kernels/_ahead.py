"""Compile recorded launches for a GPU that is not there, and read what the compiler made of them.

    with pretend(90), recorded(run=False) as launches:
        attention.forward(query, key, value, scale)  # meta tensors
    compiled = compile_launch(launches[0], 90)

Needs ``@triton.jit`` to compile, so a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

from ._launch import Launch
from ._runtime import INTERPRETED

_INSTRUCTIONS = (
    "HGMMA", "UTCHMMA", "HMMA", "WARPGROUP", "UTMALDG", "LDL", "STL", "LDS", "LDSM", "STS", "STSM",
)  # fmt: skip
# at the start of a line, after an optional predicate such as @!P0
_OPCODE = re.compile(r"^\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)[.\s]", re.M)


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch.

    Attributes:
        registers: Per thread.
        stack: Bytes per thread of local memory; above zero, registers spill.
        shared_memory: Bytes per program.
        instructions: Machine instruction to how often it stands in the code; zeros for what is not
            disassembled, as a kernel without ``tl.dot``.
        ttir: Triton's own intermediate code, before it is made for one GPU; of Gluon, for it.
    """

    registers: int
    stack: int
    shared_memory: int
    instructions: dict[str, int]
    ttir: str


@dataclass(frozen=True)
class Specialized:
    """A launch as Triton's runtime would compile it: equal ones share one binary."""

    source: ASTSource
    options: dict[str, Any]
    target: GPUTarget

    @property
    def key(self) -> str:
        """Equal exactly for launches that run the same machine code."""
        return f"{self.target.arch}-{self.source.name}-{self.source.hash()}-{self.options}"


def specialize(launch: Launch, arch: int) -> Specialized:
    """Let Triton's runtime read types, alignment and ones from the arguments, as it would on a GPU.

    Raises:
        RuntimeError: The process interprets kernels.
    """
    if INTERPRETED:
        raise RuntimeError("compiling needs a process without TRITON_INTERPRET")
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    kernel = launch.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    keywords = {**launch.constants, **launch.options, "debug": False, "instrumentation_mode": ""}
    bound, specialization, rest = binder(*launch.args, **keywords)
    options, signature, constants, attributes = kernel._pack_args(
        backend, keywords, bound, specialization, rest
    )
    made_by = GluonASTSource if kernel.is_gluon() else ASTSource
    source = made_by(kernel, signature, constants, attributes)
    return Specialized(source, dict(options.__dict__), target)


def distinct(launches: Iterable[Launch], arch: int) -> dict[str, tuple[Launch, Specialized]]:
    """By key: as many as Triton would compile for ``launches``."""
    found: dict[str, tuple[Launch, Specialized]] = {}
    for launch in launches:
        made = specialize(launch, arch)
        found.setdefault(made.key, (launch, made))
    return found


def compile_launch(
    launch: Launch | Specialized, arch: int, *, disassemble: bool = True
) -> Compiled:
    """Compile for ``arch`` and disassemble.  Triton keeps the binary in its cache on disk."""
    made = launch if isinstance(launch, Specialized) else specialize(launch, arch)
    kernel = triton.compile(made.source, target=made.target, options=made.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        # Gluon begins at the next stage
        first = kernel.asm["ttgir" if "ttir" not in kernel.asm else "ttir"]
        # half a second each, so for products alone: which unit runs them stands nowhere else
        has_code = disassemble and ("tt.dot" in first or "warp_group_dot" in first)
        code = _run("nvdisasm", "-c", file.name) if has_code else ""
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    opcodes = _OPCODE.findall(re.sub(r"/\*[^*]*\*/", "", code))
    return Compiled(
        registers=numbers["REG"],
        stack=numbers["STACK"],
        shared_memory=kernel.metadata.shared,
        instructions={name: opcodes.count(name) for name in _INSTRUCTIONS},
        ttir=first,
    )


def _run(tool: str, *arguments: str) -> str:
    command = [str(_tools() / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def _tools() -> Path:
    """The disassemblers that come with Triton."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
