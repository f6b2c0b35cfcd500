"""What all files of rows have in common: a cached index, and readers that stay open while they are in use.

A shard knows its length and gives one row, a dict, at a time. The index that finds its rows (offsets of lines, or of
members of a tar) is built once and cached. Open files live in `_readers`, never in a shard, so that shards can be sent
to worker processes.
"""

import abc
import collections
import dataclasses
import functools
import json
import os
import threading
import zlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from hovle_jax.data.files import storage
from hovle_jax.errors import UserError
from hovle_jax.system.cache import cache_dir, locked
from hovle_jax.system.remote import is_url

OPEN_READERS = 256
INDEX_VERSION = 3
DONE = "done"  # of an index: {name of an array: its file's checksum}


class UnreadableShard(UserError):
    """A file of rows that cannot be read at all; among others it counts as bad samples."""


def cached_arrays(
    key: Sequence, build: Callable[[], dict[str, np.ndarray]] | None, place: str = "index"
) -> dict[str, np.ndarray]:
    """{name: array} from the cache, memory-mapped; from `build()` the first time, which may be None later.

    Damaged files are made again; of several processes one builds, and the others wait for it.

    Args:
      key: what the arrays depend on, as JSON.
      place: the folder of the cache.
    """
    folder = cache_dir(place, storage.hash_key(INDEX_VERSION, *key))
    arrays = _whole(folder)
    if arrays is None:
        with locked(folder):
            arrays = _whole(folder)
            if arrays is None:
                assert build is not None, "the process that hands on a key has built its arrays"
                arrays = _written(folder, build())
    return arrays


def _whole(folder):
    """The arrays as they were written; None where there are none, or a file is not what it was."""
    try:
        checksums = json.loads((folder / DONE).read_text())
        paths = {name: folder / f"{name}.npy" for name in checksums}
        if all(_checksum(path) == checksums[name] for name, path in paths.items()):
            return {name: _load(path) for name, path in paths.items()}
    except (OSError, ValueError, EOFError, AttributeError, TypeError):
        pass
    return None


def _written(folder, arrays):
    """Each file takes the place of a damaged one at once, which another process may have mapped."""
    for name, array in arrays.items():
        np.save(folder / f"{name}.new.npy", array)
        os.replace(folder / f"{name}.new.npy", folder / f"{name}.npy")
    checksums = {name: _checksum(folder / f"{name}.npy") for name in arrays}
    (folder / f"{DONE}.new").write_text(json.dumps(checksums))
    os.replace(folder / f"{DONE}.new", folder / DONE)
    return {name: _load(folder / f"{name}.npy") for name in arrays}


def _checksum(path):
    return zlib.crc32(np.memmap(path, np.uint8, "r"))


def _load(path):
    try:
        return np.load(path, mmap_mode="r")
    except ValueError:  # an array without elements cannot be mapped
        return np.load(path)


class _Reader:
    """A place for a reader. One thread opens it; others that want the same one wait."""

    def __init__(self):
        self.lock, self.opened = threading.Lock(), None


class Readers:
    """The most recently used open readers, by key; each process has its own."""

    def __init__(self, most: int):
        self.most = most
        self._lock, self._open, self._process = threading.Lock(), collections.OrderedDict(), None

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The reader of this key, from make() if it is not open."""
        with self._lock:
            if self._process != os.getpid():
                self._open, self._process = collections.OrderedDict(), os.getpid()
            reader = self._open.setdefault(key, _Reader())
            self._open.move_to_end(key)
            if len(self._open) > self.most:
                self._open.popitem(last=False)  # it closes when the last thread has finished with it
        with reader.lock:
            if reader.opened is None:
                reader.opened = make()
            return reader.opened


_readers = Readers(OPEN_READERS)


@dataclasses.dataclass(frozen=True)
class Shard(abc.ABC):
    """A file of rows, at `path`."""

    path: str

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many rows it has."""

    @abc.abstractmethod
    def row(self, index: int) -> Any:
        """A row, which is a dict unless the file is malformed. Raises BadSample if it cannot be read."""

    def value(self, index: int, field: str) -> Any:
        """One field of a row, None if it has none; a shard may read less for it than for the row. Raises BadSample."""
        row = self.row(index)
        return row.get(field) if isinstance(row, dict) else None

    def class_names(self, field: str) -> tuple[str, ...]:
        """The names of the classes that a field has as numbers; empty if the file says nothing of them."""
        return ()

    def name(self, index: int) -> str:
        """How reports name a row."""
        return str(index)

    @functools.cached_property
    def stamp(self) -> tuple:
        """Identifies this shard's index and readers; it differs once the file has changed."""
        return (type(self).__name__, *dataclasses.astuple(self), *storage.fingerprint(self.path))

    def opened(self, make: Callable[[], Any]) -> Any:
        """The result of make(), which is called once in each process while the result is in use."""
        return _readers.get(self.key, make)

    @functools.cached_property
    def key(self) -> str:
        """A short hash of `stamp`."""
        return storage.hash_key(self.stamp)

    def arrays(self, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """This shard's index, from the cache or from build(). Raises UnreadableShard for a file that cannot be read."""
        return _readers.get(("index", self.key), lambda: cached_arrays(self.stamp, lambda: self._built(build)))

    def _built(self, build):
        try:
            return build()
        except OSError as error:
            if is_url(self.path):  # the network's failures shape no data
                raise
            raise UnreadableShard(f"{self.path} cannot be read: {error.strerror or error}") from None
