"""The kinds of files in which people keep samples, each a shard: jsonl, text, tar, Parquet, ArrayRecord, TFDS."""

import dataclasses
import json
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.files import storage
from hovle_jax.data.files.shard import Readers, Shard
from hovle_jax.errors import UserError

BYTE_ORDER_MARK = "\ufeff".encode()  # some editors put it at the beginning of a file
TEXT_SPAN = 65_536  # bytes of plain text in a row at most; spans end with a line
ROW_GROUPS = 8  # of Parquet files, kept in memory
MOST_BYTES = 2**61  # of a file; more does not fit the index
MOST_GROUP_ROWS = 2**24  # of a row group, which is read as a whole
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")

_row_groups = Readers(ROW_GROUPS)


def _decode(raw):
    try:
        return raw.removeprefix(BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample("not_utf8", error) from None


def _json(raw):
    try:
        return json.loads(_decode(raw))
    except ValueError as error:  # also a number with too many digits
        raise BadSample("broken_json", error) from None
    except RecursionError:
        raise BadSample("broken_json", "nested too deeply") from None


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
        return _json(storage.read(self.path, start, end - start))

    def name(self, index: int) -> str:
        return f"line at byte {int(self.lines[index][0])}"


def _lines(path):
    """[n, 2] int64: beginning and end of each line that is not blank."""
    lines, offset, pending = [], 0, b""
    with storage.stream(path) as file:
        while block := file.read(2**24):
            *whole, pending = (pending + block).split(b"\n")
            for line in whole:
                if line.strip():
                    lines.append((offset, offset + len(line)))
                offset += len(line) + 1
    if pending.strip():
        lines.append((offset, offset + len(pending)))
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
        return {"text": _decode(storage.read(self.path, start, end - start))}

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
class TarShard(Shard):
    """webdataset and img2dataset: members that share a name up to its first dot are one row."""

    @property
    def _index(self):
        return self.arrays(lambda: _tar_index(self.path))

    def __len__(self) -> int:
        return len(self._index["rows"]) - 1

    def _members(self, index) -> Iterator[tuple[str, int, int]]:
        """(name, offset, size) of each member of a row."""
        arrays = self._index
        first, last = arrays["rows"][index : index + 2]
        ends = arrays["name_ends"]
        for k in range(int(first), int(last)):
            start = int(ends[k - 1]) if k else 0
            name = bytes(arrays["names"][start : int(ends[k])]).decode("utf-8", "replace")
            offset, size = map(int, arrays["places"][k])
            yield name, offset, size

    def row(self, index: int) -> dict[str, Any]:
        row, images = {}, []
        for name, offset, size in self._members(index):
            extension = _split_name(name)[1].lower()
            if size < 0:
                raise BadSample("truncated_shard", f"from byte {offset} on it cannot be read as a tar archive")
            held = min(size, max(0, int(self._index["size"][0]) - offset))
            data = storage.read(self.path, offset, held)
            if len(data) < size:
                raise BadSample("truncated_shard", f"{name} has {size} bytes, of which the file holds {len(data)}")
            kind = extension.rsplit(".", 1)[-1]
            if kind in IMAGE_SUFFIXES:
                images.append((extension, data))
            elif kind == "json":
                value = _json(data)
                if not isinstance(value, dict):
                    raise BadSample("not_a_row", f"{name} holds a {type(value).__name__}")
                row |= value
            elif kind in ("txt", "text", "caption"):
                row["caption"] = _decode(data)
        if images:
            row["image"] = [data for _, data in sorted(images, key=lambda pair: pair[0])]
        return row

    def name(self, index: int) -> str:
        return _split_name(next(iter(self._members(index)))[0])[0]


def _split_name(name):
    """'folder/0001.seg.png' -> ('folder/0001', 'seg.png')."""
    folder, _, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return (f"{folder}/{key}" if folder else key), extension


def _tar_index(path):
    """Where each member lies, grouped into rows: adjacent members with the same key.

    A truncated archive has one more row, of size -1, so that the loss of the rest is reported.
    """
    import tarfile

    names, places, rows, previous = [], [], [], None
    with storage.stream(path) as opened:
        file = _Bounded(opened)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    tar.members = []  # pyright: ignore[reportAttributeAccessIssue] (it would keep them all)
                    if not member.isfile():
                        continue
                    if max(member.offset_data, member.size) > MOST_BYTES:
                        raise ValueError(f"a member of {member.size:,} bytes at byte {member.offset_data:,}")
                    key = _split_name(member.name)[0]
                    if key != previous:
                        rows.append(len(places))
                        previous = key
                    names.append(member.name.encode("utf-8", "surrogateescape"))
                    places.append((member.offset_data, member.size))
                file.seek(tar.offset)
                ends = not file.read(tarfile.BLOCKSIZE).strip(b"\0") and file.tell() > tar.offset
        except (tarfile.TarError, ValueError, OverflowError, OSError) as error:
            # Members before the truncation can be read; a file that is no tar has none.
            if not places:
                raise UserError(f"{path} cannot be read as a tar archive: {error}") from None
            ends = False
        if not ends:
            rows.append(len(places))
            names.append(b"the rest of the archive")
            places.append((sum(places[-1]) if places else 0, -1))
    return {
        "names": np.frombuffer(b"".join(names), np.uint8),
        "name_ends": np.cumsum([len(name) for name in names], dtype=np.int64),
        "places": np.asarray(places, np.int64).reshape(-1, 2),
        "rows": np.asarray([*rows, len(places)], np.int64),
        "size": np.asarray([file.size], np.int64),
    }


class _Bounded:
    """A file of which no more is asked for than it has: a header can speak of a name of 2^40 bytes."""

    def __init__(self, file):
        self._file = file
        self.size = file.seek(0, 2)
        file.seek(0)
        self.tell, self.seek = file.tell, file.seek

    def read(self, size=-1):
        left = max(0, self.size - self._file.tell())
        return self._file.read(left if size < 0 else min(size, left))


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
            except (pa.ArrowException, ValueError, OSError) as error:
                raise UserError(f"{self.path} cannot be read as a Parquet file: {error}") from None
            return file, np.cumsum([0, *counts]), threading.Lock()

        return self.opened(open_file)

    def __len__(self) -> int:
        return int(self._file()[1][-1])

    def row(self, index: int) -> dict[str, Any]:
        _, starts, _ = self._file()
        group = int(np.searchsorted(starts, index, side="right")) - 1
        table = _row_groups.get((self.key, group), lambda: self._read_group(group))
        inner = index - int(starts[group])
        try:
            return {name: column[inner].as_py() for name, column in table.items()}
        except UnicodeDecodeError as error:  # pyarrow does not check texts when it reads them
            raise BadSample("not_utf8", error) from None
        # A date that Python cannot represent, or a column that is shorter than the file says.
        except (ValueError, ArithmeticError, LookupError, NotImplementedError) as error:
            raise BadSample("broken_record", error) from None

    def _read_group(self, group):
        import pyarrow as pa

        file, _, lock = self._file()
        try:
            with lock:  # many threads share one reader
                table = file.read_row_group(group)
        except (pa.ArrowException, ValueError, OSError) as error:
            raise BadSample("broken_record", f"row group {group}: {error}") from None
        return {name: table.column(name) for name in table.column_names}


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
                raise UserError(f"{self.path} cannot be read as an ArrayRecord file: {error}") from None
            if not reader.ok():  # it would report 0 records
                raise UserError(
                    f"{self.path} cannot be read as an ArrayRecord file: it is truncated, or of another kind"
                )
            return reader, threading.Lock()

        return self.opened(open_file)

    def __len__(self) -> int:
        return self._reader()[0].num_records()

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
        except BadSample:
            return str(index)


@dataclasses.dataclass(frozen=True)
class TfdsShard(Shard):
    """A split of a prepared TFDS data set (a folder with dataset_info.json), images left encoded."""

    split: str

    def _data(self):
        return self.opened(lambda: _tfds_source(self.path, self.split))

    def __len__(self) -> int:
        return len(self._data())

    def row(self, index: int) -> dict[str, Any]:
        data = self._data()
        try:
            row = data[index]
        except Exception as error:  # noqa: BLE001 (as in _tfds_source)
            raise BadSample("broken_record", error) from None
        return {key: _plain(value) for key, value in row.items()}


def _tfds_source(path, split):
    import logging

    logging.getLogger("absl").setLevel(logging.ERROR)
    import tensorflow_datasets as tfds

    try:
        builder: Any = tfds.builder_from_directory(path)  # TFDS's own types are too narrow
        features = builder.info.features.items()
        encoded = {k: tfds.decode.SkipDecoding() for k, f in features if isinstance(f, tfds.features.Image)}
        return builder.as_data_source(split, decoders=encoded)
    except Exception as error:  # noqa: BLE001 (tfds raises anything)
        raise UserError(f"{path} has no split {split!r} that TFDS reads as ArrayRecord: {error}") from None


def _plain(value):
    """TFDS's numpy values as plain ones: texts as str, encoded images as bytes."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, np.ndarray)):
        return [_plain(v) for v in (value.tolist() if isinstance(value, np.ndarray) else value)]
    return value.item() if isinstance(value, np.generic) else value


SHARD_KINDS = {
    ".jsonl": JsonlShard,
    ".ndjson": JsonlShard,
    ".tar": TarShard,
    ".parquet": ParquetShard,
    ".array_record": ArrayRecordShard,
    ".arrayrecord": ArrayRecordShard,
    ".txt": TextShard,
}
