"""VLMEvalKit's TSV files: a row is a question, with its image as base64 or where that lies.

The file may be larger than memory: all cells but the images are kept, and images are read where they lie in the file.
"""

import ast
import base64
import binascii
import csv
import dataclasses
import pathlib
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.images import decode_image
from hovle_jax.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

LARGEST_CELL = 2**31 - 1  # bytes; Python's own limit is 128 KiB, which few images keep
LONGEST_REFERENCE = 64  # characters: a shorter image is the index of the row whose image it is
IMAGE, PATH = "image", "image_path"
ALWAYS = ("index", "question")


@dataclasses.dataclass(frozen=True)
class Row:
    """A question.

    Attributes:
      path: the file.
      number: 1 = the first after the header.
      cells: {column in lower case, but A to Z: text}, without the image; empty = nothing there.
      place: the byte at which the row that has its image begins; -1 = it has none in the file.
    """

    path: pathlib.Path
    number: int
    cells: Mapping[str, str]
    place: int = -1

    @property
    def index(self) -> str:
        return self.cells["index"]

    @property
    def has_image(self) -> bool:
        return self.place >= 0 or bool(self.cells.get(PATH) and IMAGE not in self.cells)

    def get(self, column: str) -> str:
        """The text of a cell without blanks around; empty where there is none."""
        return self.cells.get(column, "").strip()

    def error(self, column: str, what: object) -> UserError:
        """A mistake in a cell, with the place that it lies at."""
        return UserError(f"{self.path}, row {self.number} (index {self.index!r}), column {column!r}: {what}")


@dataclasses.dataclass(frozen=True)
class Table:
    """A file: its columns as they are written, but the image's, and its rows."""

    path: pathlib.Path
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def require(self, columns: Sequence[str], why: str) -> None:
        """Raises UserError where a column is missing."""
        known = {plain_name(column) for column in self.columns} | {IMAGE}
        missing = [column for column in columns if column not in known]
        if missing:
            has = ", ".join(self.columns)
            raise UserError(f"{self.path} has no column {missing[0]!r}, which {why} needs; it has {has}")

    def images(self, row: Row) -> tuple["Image.Image", ...]:
        """A row's images, decoded. Raises UserError for one that is none or is not there."""
        if row.place < 0:
            return tuple(self._from_file(row, path) for path in listed(row.get(PATH)))
        return tuple(_decoded(row, IMAGE, _bytes_of(row, text)) for text in _encoded(self._image_cell(row)))

    def _image_cell(self, row):
        with self.path.open("rb") as file:
            names = next(_records(file, self.path))[1]
            file.seek(row.place)
            return next(_records(file, self.path, row.place))[1][list(map(plain_name, names)).index(IMAGE)]

    def _from_file(self, row, path):
        found = self.path.parent / path
        if not found.is_file():
            raise row.error(PATH, f"there is no image {found}; paths are relative to the TSV's folder")
        return _decoded(row, PATH, found.read_bytes())


def read_table(path: pathlib.Path) -> Table:
    """Reads a file. Raises UserError, naming row and column, for what is no table or has rows that contradict."""
    if not path.is_file():
        raise UserError(f"no TSV file at {path}")
    with path.open("rb") as file:
        records = _records(file, path)
        header = next(records, (0, []))[1]
        names = list(map(plain_name, header))
        _check_header(path, header, names)
        rows, references = [], {}
        for number, (place, cells) in enumerate(records, 1):
            row, reference = _row(path, number, place, names, cells)
            rows.append(row)
            if reference:
                references[number - 1] = reference
    _check_indices(rows)
    by_index = {row.index: row for row in rows}
    for i, reference in references.items():
        rows[i] = _with_image_of(rows[i], reference, by_index, references)
    columns = tuple(name for name, plain in zip(header, names, strict=True) if plain != IMAGE)
    return Table(path, columns, tuple(rows))


def plain_name(column: str) -> str:
    """A column's name in lower case; those of options, A to Z, stay as they are."""
    column = column.strip()
    return column if column in string.ascii_uppercase else column.lower()


def texts(cell: str) -> tuple[str, ...]:
    """A cell that may hold a list as Python writes it, as "['1,000', 'one thousand']", else one text."""
    if cell.startswith("[") and cell.endswith("]"):
        try:
            return tuple(map(str, ast.literal_eval(cell)))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass  # a text in brackets
    return (cell,) if cell else ()


def listed(text: str) -> list[str]:
    """The same of what has no commas in it, as paths and base64, whose lists may be long."""
    if not (text.startswith("[") and text.endswith("]")):
        return [text] if text else []
    return [one.strip().strip("'\"") for one in text[1:-1].split(",") if one.strip()]


def _records(file, path, place=0) -> Iterator[tuple[int, list[str]]]:
    """(the byte at which it begins, its cells) of each line of the table, of which one may have several of the file."""
    csv.field_size_limit(LARGEST_CELL)

    def lines():
        nonlocal place
        for raw in file:
            at, place = place, place + len(raw)
            yield raw.decode("utf-8-sig" if at == 0 else "utf-8")

    reader, number = csv.reader(lines(), delimiter="\t"), 0
    while True:
        start = place
        try:
            cells = next(reader, None)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, row {number}: no UTF-8 ({error.reason} at byte {start + error.start})") from None
        except csv.Error as error:
            raise UserError(f"{path}, row {number}: no table of tab-separated values ({error})") from None
        if cells is None:
            return
        if cells:
            yield start, cells
            number += 1


def _check_header(path, header, names):
    missing = [name for name in ALWAYS if name not in names]
    if missing:
        raise UserError(f"{path} has no column {missing[0]!r}: is it a TSV of VLMEvalKit? It begins {header[:4]}")
    if IMAGE not in names and PATH not in names:
        raise UserError(f"{path} has no column {IMAGE!r} and none {PATH!r}, so there is nothing to look at")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"{path} has the column {twice!r} twice")


def _row(path, number, place, names, cells):
    """-> (the row, the index of the row that has its image or '')"""
    if len(cells) != len(names):
        column = names[len(cells)] if len(cells) < len(names) else "after the last"
        raise UserError(f"{path}, row {number}, column {column!r}: {len(cells)} cells for {len(names)} columns")
    found = dict(zip(names, cells, strict=True))
    image = found.pop(IMAGE, None)
    if image is not None:
        found[IMAGE] = ""  # there is such a column
    own = len(image or "") > LONGEST_REFERENCE
    row = Row(path, number, found | {"index": found["index"].strip()}, place if own else -1)
    if not row.index:
        raise row.error("index", "it is empty")
    return row, "" if own else (image or "").strip()


def _check_indices(rows):
    seen = {}
    for row in rows:
        if row.index in seen:
            raise row.error("index", f"row {seen[row.index].number} has the same")
        seen[row.index] = row


def _with_image_of(row, reference, by_index, references):
    other = by_index.get(reference)
    if other is None:
        raise row.error(IMAGE, f"{reference!r} is too short for an image, and no row has it as its index")
    if other.place < 0 or other.number - 1 in references:
        raise row.error(IMAGE, f"the row {reference!r} that it refers to has no image itself")
    return dataclasses.replace(row, place=other.place)


def _encoded(cell):
    """The base64 texts of a cell: one, or those of a list."""
    return [text.rpartition("base64,")[2] for text in ([cell] if cell.startswith("data:") else listed(cell.strip()))]


def _bytes_of(row, text):
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise row.error(IMAGE, f"no base64: {error}") from None


def _decoded(row, column, data):
    try:
        return decode_image(data)
    except BadSample as error:
        raise row.error(column, error) from None
