"""What no kernel may contain, found in its source and in the code Triton makes of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

_DEFINITION = re.compile(r"^(%[\w#:]+(?:, %[\w#:]+)*)(?::\d+)? = (.*)$")
_BLOCK_ARGUMENTS = re.compile(r"(%\w+) = (%[\w#]+)")
# What keeps an offset an offset on its way to an address; a 64-bit product makes it an index.
_OFFSET = ("addi", "subi", "splat", "broadcast", "expand_dims", "extsi", "extui", "trans", "select")


class _Value:
    """One value of the program: the operation that made it and what that took."""

    def __init__(self, text: str, operands: list[_Value]) -> None:
        self.text = text
        self.operation = re.split(r"[ ({]", text.strip('"'), maxsplit=1)[0].split(".")[-1]
        self.operands = operands
        self.varies = self.operation in ("get_program_id", "loop_variable") or any(
            operand.varies for operand in operands
        )

    @property
    def is_32_bit_product(self) -> bool:
        kinds = re.search(r": (?:tensor<[^>]*x)?(i\d+)>?\s*$", self.text)
        return self.operation == "muli" and kinds is not None and kinds[1] == "i32"


def narrow_products(ttir: str) -> list[str]:
    """Products in 32 bits of a position (from program_id or a loop) that become part of an address.

    Multiplying by a constant makes an index of blocks into one of elements, which is below 2**31
    in every dimension; multiplying by a stride does not stay there.
    """
    scopes: list[dict[str, _Value]] = [{}]
    found: list[str] = []
    for raw in ttir.splitlines():
        line = re.sub(r'\s*loc\((?:"[^"]*"\([^)]*\)|[^)]*)\)', "", raw).strip()
        if line.startswith("}"):
            scopes.pop()
        known = {name: value for scope in scopes for name, value in scope.items()}
        names, text = _parts(line)
        arguments = _Value("argument", [])
        operands = [known.get(name, arguments) for name in re.findall(r"%\w+", text)]
        value = _Value(text, operands)
        if value.operation == "addptr" and len(operands) == 2:
            found += _narrow_in(operands[1])
        if names:
            scopes[-1].update(dict.fromkeys(names, value))
        if line.endswith("{"):
            scopes.append(dict(_loop_values(text, known)))
    return sorted(set(found))


def _parts(line: str) -> tuple[list[str], str]:
    match = _DEFINITION.match(line)
    if match is None:
        return [], line
    return [re.split(r"[:#]", name)[0] for name in match[1].split(", ")], match[2]


def _loop_values(text: str, known: dict[str, _Value]) -> Iterator[tuple[str, _Value]]:
    """The induction variable of ``scf.for``, and what each iteration hands to the next."""
    induction = re.match(r"scf\.for (%\w+) = ", text)
    if induction:
        yield induction[1], _Value("loop_variable", [])
    carried = re.search(r"iter_args\((.*?)\)", text)
    for name, initial in _BLOCK_ARGUMENTS.findall(carried[1]) if carried else ():
        yield name, known.get(initial, _Value("carried", []))


def _narrow_in(value: _Value) -> list[str]:
    if value.is_32_bit_product:
        runtime = [x for x in value.operands if not _is_constant(x)]
        return [value.text] if len(runtime) == 2 and any(x.varies for x in runtime) else []
    if value.operation not in _OFFSET:
        return []
    return [text for operand in value.operands for text in _narrow_in(operand)]


def _is_constant(value: _Value) -> bool:
    if value.operation in ("splat", "broadcast", "expand_dims"):
        return all(_is_constant(operand) for operand in value.operands)
    return value.operation == "constant"


def float_atomics(ttir: str) -> list[str]:
    """Atomic additions of floats, whose order and so whose rounding changes from run to run."""
    return re.findall(r"tt\.atomic_rmw fadd.*", ttir)


def chained_dots(source: str) -> list[str]:
    """Loops where two ``tl.dot`` add to one accumulator: compilers of our versions get it wrong."""
    found = []
    for loop in ast.walk(ast.parse(source)):
        if isinstance(loop, ast.For | ast.While):
            targets = [name for node in loop.body for name in _accumulators(node)]
            found += [
                f"line {loop.lineno}: {name}" for name in set(targets) if targets.count(name) > 1
            ]
    return sorted(found)


def _accumulators(node: ast.AST) -> Iterator[str]:
    """Names that this statement of a loop body, nested loops apart, gives a product to."""
    if isinstance(node, ast.For | ast.While):
        return
    if isinstance(node, ast.Assign | ast.AugAssign):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        name = ast.unparse(target)
        for call in ast.walk(node.value):
            is_dot = isinstance(call, ast.Call) and ast.unparse(call.func) == "tl.dot"
            adds = isinstance(node, ast.AugAssign) or _adds(node.value, name)
            if is_dot and (adds or len(call.args) > 2):
                yield name
    else:
        for child in ast.iter_child_nodes(node):
            yield from _accumulators(child)


def _adds(expression: ast.expr, name: str) -> bool:
    return isinstance(expression, ast.BinOp) and name in ast.unparse(expression)
