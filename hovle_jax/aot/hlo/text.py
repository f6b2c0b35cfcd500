"""Reads the text of a compiled program into computations and instructions.

XLA's HLO printer writes computations `%name (parameters) -> shape {`, each holding one instruction a line,
`[ROOT] %name = shape opcode(operands), attribute=value, ...`, and a line `}`, which names the thread of what another
core runs (collectives on a SparseCore).
"""

import dataclasses
import functools
import math
import re

_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s.*\{$")
_END = re.compile(r'^\}(, execution_thread="[^"]*")?\s*$')
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*?)\s([a-z][\w\-]*)\((.*?)\)((?:, .*)?)$")
_STARTS = re.compile(r"^\s+(ROOT )?%[\w.\-]+ = ")
_ARRAY = re.compile(r"\b((?:pred|bf|[a-z])(\d*)\w*)\[([^\]]*)\]")  # its type, the type's bits, its dimensions
_CALLED = re.compile(
    r"\b(?:calls|to_apply|(?:called|branch)_computations|(?:true|false)_computation)=(\{[^}]*\}|%[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line."""

    name: str
    shape: str  # of the result
    opcode: str
    arguments: str  # what stands between the parentheses: operands, a parameter's number or a constant's value
    attributes: str  # all after them

    @functools.cached_property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return _names(self.arguments)

    @functools.cached_property
    def called(self) -> list[str]:
        """Computations that run once each time that this instruction does; of a `conditional`'s one does."""
        return _names(" ".join(_CALLED.findall(self.attributes)))

    def attribute(self, name: str) -> str:
        """The value of `name=%value`, `name=value` or `name="value"`; empty without."""
        found = re.search(rf'\b{name}=(?:"([^"]*)"|%?([\w.\-]+))', self.attributes)
        return (found.group(1) or found.group(2) or "") if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction]
    root: str


@dataclasses.dataclass(frozen=True)
class Program:
    """Attributes: `entry`, the name of the computation that runs; `partitions`, devices that run it together."""

    computations: dict[str, Computation]
    entry: str
    partitions: int


def arrays(shape: str) -> list[tuple[str, int]]:
    """The arrays in a shape's text: [(type, bytes without the padding of tiles)]; tokens are none."""
    found = _ARRAY.findall(re.sub(r"\{[^{}]*\}", "", shape))
    count = lambda sizes: math.prod(int(size) for size in re.findall(r"\d+", sizes))
    return [(dtype, count(sizes) * int(bits or 8) // 8) for dtype, bits, sizes in found if bits or dtype == "pred"]


def _names(text):
    return re.findall(r"%([\w.\-]+)", text)


def parse(text: str) -> Program:
    """Raises ValueError for what is no program's text."""
    computations, entry, name, lines = {}, None, None, None
    for line in text.splitlines():
        if lines is None:
            if header := _HEADER.match(line):
                name, lines = header.group(2), []
                entry = name if header.group(1) else entry
        elif _END.match(line):
            computations[name] = _computation(name, lines)
            lines = None
        elif _STARTS.match(line):
            lines.append(line)
        elif lines:  # kernels carry metadata with line breaks
            lines[-1] += line
    if entry is None:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
    counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text[: text.index("\n")])
    return Program(computations, entry, max(map(int, counts), default=1))


def _computation(name, lines):
    found = []
    for line in lines:
        if not (match := _INSTRUCTION.match(line)):
            raise ValueError(f"this is no instruction of a compiled program: {line[:120]}")
        found.append(match.groups())
    root = next((of for is_root, of, *_ in found if is_root), "")
    return Computation(name, {of: Instruction(of, *rest) for _, of, *rest in found}, root)
