"""Tar archives as webdataset and img2dataset write them. Nothing is unpacked: names of members are no files' names."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.files import storage
from hovle_jax.data.files.image_paths import LARGEST_IMAGE
from hovle_jax.data.files.shard import Shard, UnreadableShard
from hovle_jax.data.files.text_of_rows import LARGEST_ROW, decode_json, decode_text
from hovle_jax.system.remote import is_url

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
LARGEST_MEMBER = 2**62  # bytes that it may state; whether the file holds them shows when it is read
LARGEST_HEADER = 2**20  # bytes of a member's long name or of its extended header


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
        return self._row(index, with_images=True)

    def value(self, index: int, field: str) -> Any:
        return self._row(index, with_images=field == "image").get(field)

    def _row(self, index, with_images):
        row, images = {}, []
        for name, offset, size in self._members(index):
            extension = _split_name(name)[1].lower()
            if size < 0:
                raise BadSample("truncated_shard", f"from byte {offset} on it cannot be read as a tar archive")
            kind = extension.rsplit(".", 1)[-1]
            if kind in IMAGE_SUFFIXES and not with_images:
                continue
            largest = LARGEST_IMAGE if kind in IMAGE_SUFFIXES else LARGEST_ROW
            if size > largest:
                raise BadSample("row_too_large", f"{name} has {size:,} bytes, and at most {largest:,} are read")
            data = storage.read(self.path, offset, size)
            if len(data) < size:
                raise BadSample("truncated_shard", f"{name} has {size} bytes, of which the file holds {len(data)}")
            if kind in IMAGE_SUFFIXES:
                images.append((extension, data))
            elif kind == "json":
                value = decode_json(data)
                if not isinstance(value, dict):
                    raise BadSample("not_a_row", f"{name} holds a {type(value).__name__}")
                row |= value
            elif kind in ("txt", "text", "caption"):
                row["caption"] = decode_text(data)
            elif kind == "cls":
                row["cls"] = decode_text(data).strip()
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
    with storage.stream(path) as file:
        headers: Any = _Headers(file)  # all that tarfile asks of a file
        try:
            with tarfile.open(fileobj=headers, mode="r:") as tar:
                for member in tar:
                    tar.members = []  # pyright: ignore[reportAttributeAccessIssue] (it would keep them all)
                    if not member.isfile():
                        continue
                    if not 0 <= member.size < LARGEST_MEMBER:
                        raise ValueError(f"a member of {member.size:,} bytes")
                    key = _split_name(member.name)[0]
                    if key != previous:
                        rows.append(len(places))
                        previous = key
                    names.append(member.name.encode("utf-8", "surrogateescape"))
                    places.append((member.offset_data, member.size))
                file.seek(tar.offset)
                ends = not file.read(tarfile.BLOCKSIZE).strip(b"\0") and file.tell() > tar.offset
        except (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError, OSError) as error:
            if isinstance(error, OSError) and is_url(path):
                raise
            # Members before the truncation can be read; a file that is no tar has none.
            if not places:
                raise UnreadableShard(f"{path} cannot be read as a tar archive: {error}") from None
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
    }


class _Headers:
    """A file as `tarfile` reads it for headers alone: one that states a terabyte is refused before memory is taken."""

    def __init__(self, file):
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size):
        """So many bytes."""
        if not 0 <= size <= LARGEST_HEADER:
            raise ValueError(f"a header of {size:,} bytes")
        return self._file.read(size)
