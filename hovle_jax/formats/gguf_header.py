"""The header of a GGUF file: its metadata, and where each tensor lies; every count is compared with the file first.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package `gguf` makes two arrays of each string
of a vocabulary and follows a length of 2^40 to its end; here a length is refused where the file has fewer bytes.
"""

import dataclasses
import math
import struct
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

MAGIC = 0x46554747
VERSIONS = (2, 3)
MOST_ELEMENTS = 2**22  # of all arrays of the metadata together; a vocabulary of 150,000 has half a million
MOST_DIMENSIONS = 4
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
BlockSizes: TypeAlias = Mapping[int, tuple[int, int]]  # {type of a tensor: (numbers in a block, its bytes)}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
      kind: the number of its type, as in llama.cpp's enum.
      shape: the output dimension first.
      start, size: in bytes, from the beginning of the file.
    """

    kind: int
    shape: tuple[int, ...]
    start: int
    size: int


class _Cursor:
    """Reads one value after another. Raises ValueError at the end of the file."""

    def __init__(self, data):
        self.data, self.at = memoryview(data), 0
        self.elements = 0

    def left(self):
        return len(self.data) - self.at

    def take(self, size):
        if size > self.left():
            raise ValueError(f"{size:,} bytes are asked for at byte {self.at:,}, and {self.left():,} are left")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code):
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))
        return value

    def count(self, smallest, what):
        """How many things follow, of so many bytes each at least."""
        value = self.number("Q")
        if value > self.left() // smallest:
            raise ValueError(f"it says that it has {value:,} {what}, and {self.left():,} bytes are left")
        return value

    def text(self):
        return str(self.take(self.count(1, "bytes of text")), "utf-8")

    def value(self, kind):
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array(self.number("I"))
        if kind not in SCALARS:
            raise ValueError(f"a value has the unknown type {kind}")
        return self.number(SCALARS[kind])

    def array(self, kind):
        if kind != STRING and kind not in SCALARS:
            raise ValueError(f"an array holds values of the type {kind}: numbers and texts are supported")
        size = 8 if kind == STRING else struct.calcsize("<" + SCALARS[kind])
        length = self.count(size, "values")
        self.elements += length
        if self.elements > MOST_ELEMENTS:
            raise ValueError(f"its arrays hold more than {MOST_ELEMENTS:,} values")
        if kind == STRING:
            return [self.text() for _ in range(length)]
        return list(struct.unpack(f"<{length}{SCALARS[kind]}", self.take(length * size)))


def read_header(data: np.ndarray, block_sizes: BlockSizes) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """-> ({key: value}, {tensor name: StoredTensor}).

    Args:
      data: [bytes of the file] uint8; a memory map is read as far as the header goes.
    Raises:
      ValueError: what is wrong with the file.
    """
    cursor = _Cursor(data)
    if cursor.number("I") != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in VERSIONS:
        raise ValueError(f"its version is {version}; {' and '.join(map(str, VERSIONS))} are supported, little-endian")
    num_tensors, num_keys = cursor.number("Q"), cursor.count(13, "keys")
    metadata = {}
    for _ in range(num_keys):
        key = cursor.text()
        _check_new(key, metadata, "key")
        metadata[key] = cursor.value(cursor.number("I"))
    if num_tensors > cursor.left() // 32:
        raise ValueError(f"it says that it has {num_tensors:,} tensors, and {cursor.left():,} bytes are left")
    tensors = _tensors(cursor, num_tensors, block_sizes)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment={alignment!r} is not a power of two")
    first = -(-cursor.at // alignment) * alignment
    return metadata, _placed(tensors, first, len(data))


def _check_new(name, known, what):
    if name in known:
        raise ValueError(f"the {what} {name[:100]!r} is there twice")


def _tensors(cursor, number, block_sizes):
    """{name: StoredTensor}, `start` still from the beginning of the data."""
    tensors: dict[str, StoredTensor] = {}
    for _ in range(number):
        name = cursor.text()
        _check_new(name, tensors, "tensor")
        dimensions = cursor.number("I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"tensor {name[:100]!r} has {dimensions:,} dimensions; {MOST_DIMENSIONS} are possible")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
        kind, start = cursor.number("I"), cursor.number("Q")
        if kind not in block_sizes:
            raise ValueError(f"tensor {name[:100]!r} has the unknown type {kind}")
        if 0 in shape:
            raise ValueError(f"tensor {name[:100]!r} has the shape {list(shape)}, which holds no number")
        numbers, size = block_sizes[kind]
        row = shape[-1] if shape else 1
        if row % numbers:
            raise ValueError(f"tensor {name[:100]!r} has rows of {row:,} numbers, in blocks of {numbers}")
        tensors[name] = StoredTensor(kind, shape, start, math.prod(shape) // numbers * size)
    return tensors


def _placed(tensors, first, end):
    """The tensors from the beginning of the file, each inside it and all together no larger than it."""
    for name, tensor in tensors.items():
        if first + tensor.start + tensor.size > end:
            raise ValueError(
                f"tensor {name[:100]!r} has {tensor.size:,} bytes from byte {first + tensor.start:,} on, and the file "
                f"has {end:,}"
            )
    total = sum(tensor.size for tensor in tensors.values())
    if total > end:
        raise ValueError(f"its tensors have {total:,} bytes together, and the file {end:,}")
    return {name: dataclasses.replace(t, start=first + t.start) for name, t in tensors.items()}
