"""Rows of any source that training reads, with the class in one of their fields."""

import dataclasses
import functools
import json
import pathlib

import numpy as np

from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.files.mixture import Entry
from hovle_jax.data.files.records import CLASS_KEYS, IMAGE_KEYS, class_text, parse
from hovle_jax.data.files.shard import cached_arrays
from hovle_jax.data.files.sources import Source
from hovle_jax.errors import UserError
from hovle_jax.evaluation.clip.class_names import names_beside
from hovle_jax.system.printable import printable
from hovle_jax.system.remote import is_url

LOOKED_AT = 20  # rows, in which a field may be missing


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of one or more sources: `labelled.Pictures`.

    Attributes:
      field: of a row, which names its class.
    """

    sources: tuple[Source, ...]
    field: str

    @classmethod
    def open(cls, entries: list[Entry], source: str, label: str) -> "Rows":
        """The rows of these sources. Raises UserError if they have no such field; `source` is how they were named."""
        sources = tuple(entry.source for entry in entries)
        known = _fields(sources[0])
        field = label or next((name for name in CLASS_KEYS if name in known), "")
        if field not in known:
            asked = repr(label) if label else " or ".join(map(repr, CLASS_KEYS))
            has = ", ".join(map(printable, known)) or "nothing that can be read"
            raise UserError(f"{source}: rows have no field {asked}; they have {has}: name one with --label")
        return cls(sources, field)

    @functools.cached_property
    def _ends(self):
        return np.cumsum([len(source) for source in self.sources])

    def _find(self, index) -> tuple[Source, int]:
        at = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[at], int(index - (self._ends[at - 1] if at else 0))

    def image_bytes(self, index: int) -> bytes:
        """The row's first image. Raises BadSample."""
        source, inner = self._find(index)
        row = source[inner]
        images = {key: row[key] for key in IMAGE_KEYS if key in row} if isinstance(row, dict) else row
        record = parse(images, source.root, source.outside_root)  # what else a row says may be of any form
        if not record.images:
            raise BadSample("no_image", "the row has no image")
        return record.image_bytes(0)

    def where(self, index: int) -> tuple[str, str]:
        """(the file, the row's name in it)."""
        source, inner = self._find(index)
        return source.where(inner)

    def classes(self) -> tuple[tuple[str, ...], np.ndarray]:
        """-> (names of the classes, [N] int32: the class of each row, -1 for none)."""
        values = [value for source in self.sources for value in _values(source, self.field)]
        stated = self._stated_names()
        names = stated or _sorted_names({value for value in values if value is not None})
        places = {name: i for i, name in enumerate(names)}
        if stated:  # by number, or by name
            places = {str(i): i for i in range(len(names))} | places
        return names, np.asarray([places.get(value or "", -1) for value in values], np.int32)

    def _stated_names(self):
        """What the files say, in the order of the numbers that rows have for classes; empty if they say nothing."""
        shard = self.sources[0].shards[0]
        stated = shard.class_names(self.field)
        root = str(pathlib.Path(shard.path).parent)
        return stated or (() if is_url(shard.path) else names_beside(root))


def _fields(source):
    """The keys of the first rows that can be read, in their order."""
    found = {}
    for index in range(min(LOOKED_AT, len(source))):
        try:
            row = source[index]
        except BadSample:
            continue
        found |= dict.fromkeys(row if isinstance(row, dict) else ())
    return tuple(map(str, found))


def _values(source, field) -> list[str | None]:
    """What each row has in the field, as a text; None for nothing. Kept in the cache, as all rows are read for it."""

    def build():
        values = [_value(source, index, field) for index in range(len(source))]
        return {"values": np.frombuffer(json.dumps(values).encode(), np.uint8)}

    arrays = cached_arrays(["classes", field, *source.fingerprint()], build)
    return json.loads(arrays["values"].tobytes())


def _value(source, index, field):
    try:
        row = source.value(index, field)
    except BadSample:
        return None
    return class_text(row)


def _sorted_names(values):
    """By number if all are numbers, else by name."""
    is_number = all(value.lstrip("-").isdecimal() for value in values)
    return tuple(sorted(values, key=(lambda value: (int(value), value)) if is_number else str))
