"""What all files of rows have in common: a cached index, and readers that stay open while they are in use.

A shard knows its length and gives one row, a dict, at a time. The index that finds its rows (offsets of lines, or of
members of a tar) is built once and cached. Open files live in `_readers`, never in a shard, so that shards can be sent
to worker processes.
"""

import abc
import collections
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from hovle_jax.data.files import storage
from hovle_jax.system.cache import cache_dir, locked

OPEN_READERS = 256
INDEX_VERSION = 3


def cached_arrays(key: Sequence, build: Callable[[], dict[str, np.ndarray]] | None) -> dict[str, np.ndarray]:
    """{name: array} from the cache, memory-mapped; from `build()` the first time, which may be None later."""
    folder = cache_dir("index", storage.hash_key(INDEX_VERSION, *key))
    if not (folder / "done").exists():
        with locked(folder):
            if not (folder / "done").exists():
                assert build is not None, "the process that hands on a key has built its arrays"
                for name, array in build().items():
                    np.save(folder / f"{name}.npy", array)
                (folder / "done").touch()
    return {path.stem: _load(path) for path in sorted(folder.glob("*.npy"))}


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
        """This shard's index, from the cache or from build()."""
        return self.opened(lambda: cached_arrays(self.stamp, build))
