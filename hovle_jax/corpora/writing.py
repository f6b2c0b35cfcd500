"""Writes a corpus: ArrayRecord files of rows for each split, and a description; complete, or not at all."""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import msgpack

from hovle_jax.system.files import whole_folder

DESCRIPTION = "dataset.json"
SHARD_BYTES = 512 * 2**20


def shard_name(split: str, index: int = 0, count: int = 1) -> str:
    """The file name of a shard, one of `count` of its split."""
    return f"{split}-{index:05d}-of-{count:05d}.array_record"


def pack_row(row: dict[str, Any]) -> bytes:
    """Packs a row into the bytes of one record.

    Args:
      row: the keys of an InternVL annotation (`id`, `image`, `width`, `height`, `conversations`), `caption`, and more
        of the corpus's own; `image` is an encoded image or a list of them, instead of an annotation's path.
    """
    return msgpack.packb(row, use_bin_type=True)  # pyright: ignore[reportReturnType] (None only without autoreset)


def write_corpus(
    folder: str | os.PathLike, name: str, rows_by_split: Mapping[str, Iterable[dict]], about: dict[str, Any]
) -> None:
    """Writes the rows of each split, and `dataset.json`.

    Args:
      folder: where the corpus goes; it must not exist.
      rows_by_split: {split: iterable of rows}.
      about: what the description says besides the splits; JSON types.
    Raises:
      UserError: the folder is not empty, or cannot be written.
      ValueError: two rows of a split have the same id.
    """
    with whole_folder(folder) as partial:
        with CorpusWriter(partial) as writer:
            for split, rows in rows_by_split.items():
                seen = set()
                for row in rows:
                    if row["id"] in seen:
                        raise ValueError(f"{split}: two rows have the id {row['id']}")
                    seen.add(row["id"])
                    writer.add(split, row)
        describe(partial, {"name": name, **about, "splits": writer.splits})


def describe(folder: pathlib.Path, about: dict[str, Any]) -> None:
    """Writes `dataset.json`, which shows that a corpus is complete."""
    text = json.dumps(about, indent=1, ensure_ascii=False)
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


class CorpusWriter:
    """Writes rows, one by one, to the files of their splits.

    Attributes:
      splits: {split: what the description says of it}; filled in when the writer is closed.
    """

    def __init__(self, folder: pathlib.Path, shard_bytes: int = SHARD_BYTES):
        self.folder, self.shard_bytes = folder, shard_bytes
        self.splits = {}
        self._open = {}

    def __enter__(self) -> "CorpusWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        for split, writer in self._open.items():
            description = writer.close()
            if kind is None:
                self.splits[split] = description

    def add(self, split: str, row: dict[str, Any]) -> None:
        """Appends a row to a split."""
        if split not in self._open:
            self._open[split] = _SplitWriter(self.folder, split, self.shard_bytes)
        self._open[split].add(row)


class _SplitWriter:
    def __init__(self, folder, split, shard_bytes):
        self.folder, self.split, self.shard_bytes = folder, split, shard_bytes
        self.rows = self.bytes = self.in_shard = 0
        self.ids, self.records = hashlib.sha256(), hashlib.sha256()
        self.paths, self.writer = [], None

    def add(self, row: dict[str, Any]) -> None:
        record = pack_row(row)
        if self.writer is None or self.in_shard >= self.shard_bytes:
            self.writer = self._next_shard()
        self.writer.write(record)
        self.records.update(record)
        self.ids.update(b"\n" * bool(self.rows) + row["id"].encode())
        self.rows += 1
        self.bytes += len(record)
        self.in_shard += len(record)

    def _next_shard(self):
        from array_record.python.array_record_module import ArrayRecordWriter

        if self.writer is not None:
            self.writer.close()
        self.paths.append(self.folder / f"{self.split}-{len(self.paths):05d}.open")
        self.in_shard = 0
        # One record per group, so that random access to a row reads no other.
        return ArrayRecordWriter(str(self.paths[-1]), "group_size:1")

    def close(self):
        """Renames the files, whose number is now known -> the split's description."""
        self.writer.close()
        files = []
        for index, path in enumerate(self.paths):
            name = shard_name(self.split, index, len(self.paths))
            files.append({"file": name, "bytes": path.stat().st_size})
            path.rename(self.folder / name)
        return {
            "rows": self.rows,
            "files": files,
            "ids_sha256": self.ids.hexdigest(),
            "records_sha256": self.records.hexdigest(),
        }


def is_written(folder: pathlib.Path) -> bool:
    """Whether a complete corpus is in this folder."""
    return (folder / DESCRIPTION).is_file()
