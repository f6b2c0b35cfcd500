"""Reads the text of a compiled program (`compiled.as_text()`) into computations and instructions.

The grammar is that of XLA's HLO printer: computations `%name (parameters) -> shape {`, each holding one instruction a
line, `[ROOT] %name = shape opcode(operands), attribute=value, ...`, and a line `}`, which names the thread of what
another core runs (collectives on a SparseCore).
"""

import dataclasses
import functools
import re

ITEM_BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "f4e2m1fn": 4,
    "f8e3m4": 8, "f8e4m3": 8, "f8e4m3fn": 8, "f8e4m3b11fnuz": 8, "f8e4m3fnuz": 8, "f8e5m2": 8, "f8e5m2fnuz": 8,
    "f8e8m0fnu": 8,
}  # fmt: skip

_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s.*\{$")
_END = re.compile(r'^\}(, execution_thread="[^"]*")?\s*$')
_INSTRUCTION = re.compile(r"^\s+(ROOT\s+)?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([^\]]*)\]")
_NAME = re.compile(r"%?([\w.\-]+)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line.

    Attributes:
      shape: of the result, as text.
      arguments: what stands between the parentheses: operands, a parameter's number or a constant's value.
      attributes: all behind them.
    """

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str

    @functools.cached_property
    def operands(self):
        """Names of the operands."""
        parts = split(re.sub(r"/\*.*?\*/", "", self.arguments))
        return tuple(_NAME.search(part).group(1) for part in parts if _NAME.search(part))

    @property
    def called(self):
        """Computations that run once each time that this instruction does."""
        return _names(_CALLED.findall(self.attributes))

    @property
    def branches(self):
        """Computations of which a `conditional` runs one."""
        return _names(_BRANCHES.findall(self.attributes))

    def attribute(self, name):
        """The value of `name=%value` or `name=value`, or None."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else None

    def quoted(self, name):
        """The value of `name="value"`, or an empty string."""
        found = re.search(rf'\b{name}="([^"]*)"', self.attributes)
        return found.group(1) if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict
    root: Instruction | None


@dataclasses.dataclass(frozen=True)
class Program:
    """Attributes: `entry`, the name of the computation that runs; `partitions`, devices that run it together."""

    computations: dict
    entry: str
    partitions: int


def split(text, separator=","):
    """Splits at separators that stand outside of all brackets."""
    parts, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == separator and not depth:
            parts.append(text[start:at])
            start = at + 1
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def shape_bytes(shape):
    """Bytes of all arrays in a shape's text, without the padding of tiles; tokens count nothing."""
    return sum(_array_bytes(*found) for found in _ARRAY.findall(re.sub(r"\{[^{}]*\}", "", shape)))


def shape_dtypes(shape):
    """The types of all arrays in a shape's text."""
    return [dtype for dtype, _ in _ARRAY.findall(re.sub(r"\{[^{}]*\}", "", shape)) if dtype in ITEM_BITS]


def _array_bytes(dtype, dimensions):
    count = 1
    for size in dimensions.replace("<=", "").split(","):
        count *= int(size) if size else 1
    return count * ITEM_BITS.get(dtype, 0) // 8


def _names(found):
    return tuple(_NAME.search(part).group(1) for value in found for part in split(value.strip("{}")))


def _closing(text, start):
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] in "([{") - (text[at] in ")]}")
        if not depth:
            return at
    raise ValueError(f"an HLO line ends within brackets: {text[:120]}")


def _instruction(name, text):
    """From what stands behind ` = `."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opening = text.index("(", end)
    closing = _closing(text, opening)
    opcode = text[end:opening].strip()
    return Instruction(name, text[:end], opcode, text[opening + 1 : closing], text[closing + 1 :])


def parse(text):
    """The text of a compiled program -> Program."""
    computations, entry, name, lines = {}, None, None, None
    for line in text.splitlines():
        if lines is None:
            if header := _HEADER.match(line):
                name, lines = header.group(2), []
                entry = name if header.group(1) else entry
        elif _END.match(line):
            computations[name] = _computation(name, lines)
            lines = None
        elif _INSTRUCTION.match(line):
            lines.append(line)
        elif lines:  # kernels carry metadata with line breaks
            lines[-1] += line
    if entry is None:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
    sizes = [re.search(rf"\b{key}=(\d+)", text[: text.index("\n")]) for key in ("num_partitions", "replica_count")]
    counts = [int(found.group(1)) for found in sizes if found]
    return Program(computations, entry, max(counts, default=1))


def _computation(name, lines):
    instructions, root = {}, None
    for line in lines:
        is_root, of, rest = _INSTRUCTION.match(line).groups()
        instructions[of] = _instruction(of, rest)
        root = instructions[of] if is_root else root
    return Computation(name, instructions, root)
