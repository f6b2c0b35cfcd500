"""The kinds of files in which people keep samples, each a shard: jsonl, text, tar, Parquet, ArrayRecord, TFDS."""

import dataclasses
import json
import threading
from typing import Any

import numpy as np

from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.files import storage
from hovle_jax.data.files.shard import Readers, Shard, UnreadableShard
from hovle_jax.data.files.tar_shard import TarShard
from hovle_jax.data.files.text_of_rows import LARGEST_ROW, decode_json, decode_text
from hovle_jax.errors import UserError

TEXT_SPAN = 65_536  # bytes of plain text in a row at most; spans end with a line
ROW_GROUPS = 8  # of Parquet files, kept in memory
MOST_GROUP_ROWS = 2**24  # of a row group, which is read as a whole

_row_groups = Readers(ROW_GROUPS)


@dataclasses.dataclass(frozen=True)
class JsonlShard(Shard):
    """One JSON object per line; blank lines are skipped."""

    @property
    def lines(self) -> np.ndarray:
        """[n, 2] int64: where each line begins and ends."""
        return self.arrays(lambda: {"lines": _lines(self.path)})["lines"]

    def __len__(self) -> int:
        return len(self.lines)

    def row(self, index: int) -> Any:
        start, end = map(int, self.lines[index])
        if end - start > LARGEST_ROW:
            raise BadSample("row_too_large", f"{end - start:,} bytes, and at most {LARGEST_ROW:,} are read")
        return decode_json(storage.read(self.path, start, end - start))

    def name(self, index: int) -> str:
        return f"line at byte {int(self.lines[index][0])}"


def _lines(path):
    """[n, 2] int64: beginning and end of each line that is not blank; of a line no more is kept than where it is."""
    lines, offset, start, blank = [], 0, 0, True

    def end_at(end):
        if not blank:
            lines.append((start, end))

    with storage.stream(path) as file:
        while block := file.read(2**22):
            first, *more = block.split(b"\n")
            blank = blank and not first.strip()
            at = offset + len(first)
            for piece in more:
                end_at(at)
                start, blank = at + 1, not piece.strip()
                at = start + len(piece)
            offset += len(block)
    end_at(offset)
    return np.asarray(lines, np.int64).reshape(-1, 2)


@dataclasses.dataclass(frozen=True)
class TextShard(Shard):
    """Plain text: rows of whole lines, up to 64 KiB."""

    @property
    def spans(self) -> np.ndarray:
        """[n, 2] int64: where each row begins and ends."""
        return self.arrays(lambda: {"spans": _spans(self.path)})["spans"]

    def __len__(self) -> int:
        return len(self.spans)

    def row(self, index: int) -> dict[str, str]:
        start, end = map(int, self.spans[index])
        return {"text": decode_text(storage.read(self.path, start, end - start))}

    def name(self, index: int) -> str:
        return f"text at byte {int(self.spans[index][0])}"


def _spans(path):
    """[n, 2] int64: spans of at most TEXT_SPAN bytes that end with a line or, in a longer line, with a character."""
    spans, offset, pending = [], 0, b""
    with storage.stream(path) as file:
        while block := file.read(2**22):
            pending += block
            at = 0
            while len(pending) - at > TEXT_SPAN:
                end = pending.rfind(b"\n", at, at + TEXT_SPAN) + 1 or at + TEXT_SPAN
                # Never inside a character, which has 4 bytes at most; bytes that are no text are split anywhere.
                end = next((e for e in range(end, end - 4, -1) if pending[e] & 0xC0 != 0x80), end)
                spans.append((offset + at, offset + end))
                at = end
            offset, pending = offset + at, pending[at:]
    if pending:
        spans.append((offset, offset + len(pending)))
    return np.asarray(spans, np.int64).reshape(-1, 2)


@dataclasses.dataclass(frozen=True)
class ParquetShard(Shard):
    """A table. A row group is read as a whole and the last few are kept in memory, so small row groups are better."""

    def _file(self):
        def open_file():
            try:
                import pyarrow.parquet as pq
            except ModuleNotFoundError:
                raise UserError('Parquet files need pyarrow; run: pip install "hovle_jax[data]"') from None
            import pyarrow as pa

            try:
                file = pq.ParquetFile(storage.stream(self.path))
                counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
                _check_counts(counts)
            except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
                raise UnreadableShard(f"{self.path} cannot be read as a Parquet file: {error}") from None
            return file, np.cumsum([0, *counts]), threading.Lock()

        return self.opened(open_file)

    def __len__(self) -> int:
        return int(self._file()[1][-1])

    def row(self, index: int) -> dict[str, Any]:
        _, starts, _ = self._file()
        group = int(np.searchsorted(starts, index, side="right")) - 1
        table = _row_groups.get((self.key, group), lambda: self._read_group(group))
        inner = index - int(starts[group])
        return _python(lambda: {name: column[inner].as_py() for name, column in table.items()})

    def value(self, index: int, field: str) -> Any:
        """Of the field's column alone, which is read as a whole."""
        _, starts, _ = self._file()
        group = int(np.searchsorted(starts, index, side="right")) - 1
        column = _row_groups.get((self.key, group, field), lambda: self._read_group(group, [field])).get(field)
        return None if column is None else _python(lambda: column[index - int(starts[group])].as_py())

    def class_names(self, field: str) -> tuple[str, ...]:
        """As the Hugging Face hub's data sets state them in their schema."""
        try:
            stated = json.loads((self._file()[0].schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
            names = stated["info"]["features"][field]["names"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return ()
        return tuple(map(str, names)) if isinstance(names, list) else ()

    def _read_group(self, group, columns=None):
        import pyarrow as pa

        file, _, lock = self._file()
        try:
            with lock:  # many threads share one reader
                table = file.read_row_group(group, columns)
        except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
            raise BadSample("broken_record", f"row group {group}: {error}") from None
        return {name: table.column(name) for name in table.column_names}


def _python(read):
    """What read() makes of pyarrow's values. Raises BadSample."""
    try:
        return read()
    except UnicodeDecodeError as error:  # pyarrow does not check texts when it reads them
        raise BadSample("not_utf8", error) from None
    # A date that Python cannot represent, or a column that is shorter than the file says.
    except (ValueError, ArithmeticError, LookupError, NotImplementedError) as error:
        raise BadSample("broken_record", error) from None


def _check_counts(counts):
    """Raises ValueError for row groups that are no counts of rows, or that no memory holds."""
    for index, rows in enumerate(counts):
        if not 0 <= rows <= MOST_GROUP_ROWS:
            raise ValueError(f"row group {index} has {rows:,} rows; up to {MOST_GROUP_ROWS:,} are possible")


@dataclasses.dataclass(frozen=True)
class ArrayRecordShard(Shard):
    """ArrayRecord files of msgpack rows: what `prepare` writes."""

    def _reader(self):
        from array_record.python.array_record_module import ArrayRecordReader

        def open_file():
            try:
                reader = ArrayRecordReader(self.path, options="readahead_buffer_size:0")
            except (ValueError, RuntimeError) as error:
                raise UnreadableShard(f"{self.path} cannot be read as an ArrayRecord file: {error}") from None
            if not reader.ok():  # it would report 0 records
                raise UnreadableShard(
                    f"{self.path} cannot be read as an ArrayRecord file: it is truncated, or of another kind"
                )
            return reader, threading.Lock()

        return self.opened(open_file)

    def __len__(self) -> int:
        count = lambda: {"rows": np.asarray([self._reader()[0].num_records()])}
        return int(self.arrays(count)["rows"][0])

    def row(self, index: int) -> Any:
        import msgpack

        reader, lock = self._reader()
        try:
            with lock:
                (raw,) = reader.read([index])
            return msgpack.unpackb(raw)
        except (ValueError, RuntimeError, msgpack.exceptions.UnpackException) as error:
            raise BadSample("broken_record", error) from None

    def name(self, index: int) -> str:
        try:
            row = self.row(index)
            return str(row.get("id", index)) if isinstance(row, dict) else str(index)
        except (BadSample, UnreadableShard):
            return str(index)


SHARD_KINDS = {
    ".jsonl": JsonlShard,
    ".ndjson": JsonlShard,
    ".tar": TarShard,
    ".parquet": ParquetShard,
    ".array_record": ArrayRecordShard,
    ".arrayrecord": ArrayRecordShard,
    ".txt": TextShard,
}
