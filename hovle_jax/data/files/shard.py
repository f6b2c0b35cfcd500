"""What files of rows have in common: a cached index, and readers that stay open while they are in use.

A shard knows its length and gives one row, a dict, at a time. What it needs to find its rows (offsets of lines, of
members of a tar) is built once and cached. Shards keep no open files but in `_readers`, so that they can be sent to
worker processes.
"""

import collections
import dataclasses
import functools
import os
import threading

import numpy as np

from hovle_jax.data.files import storage
from hovle_jax.system.cache import cache_dir, locked

OPEN_READERS = 256
INDEX_VERSION = 2


def cached_arrays(key, build):
    """{name: array} from the cache, memory-mapped, or from `build()` the first time."""
    folder = cache_dir("index", storage.key_of(INDEX_VERSION, *key))
    if not (folder / "done").exists():
        with locked(folder):
            if not (folder / "done").exists():
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
    """A place for a reader, which one thread opens while those who want the same one wait."""

    def __init__(self):
        self.lock, self.opened = threading.Lock(), None


class Readers:
    """Open readers of files by path, the last used ones, one set for each process."""

    def __init__(self, most):
        self.most = most
        self._lock, self._open, self._process = threading.Lock(), collections.OrderedDict(), None

    def get(self, path, make):
        with self._lock:
            if self._process != os.getpid():
                self._open, self._process = collections.OrderedDict(), os.getpid()
            reader = self._open.setdefault(path, _Reader())
            self._open.move_to_end(path)
            if len(self._open) > self.most:
                self._open.popitem(last=False)  # it closes when the last thread has done with it
        with reader.lock:
            if reader.opened is None:
                reader.opened = make()
            return reader.opened


_readers = Readers(OPEN_READERS)


class Shard:
    """A file of rows. `path` names it; `__len__`, `row(i)` and `name(i)` are its kind's."""

    path: str

    def name(self, index):
        """What a row is called in reports."""
        return str(index)

    @functools.cached_property
    def stamp(self):
        """By what this shard's index and readers are known: a file that was changed and opened again is another one."""
        return (type(self).__name__, *dataclasses.astuple(self), *storage.fingerprint(self.path))

    def opened(self, make):
        """What make() opens, once in each process while it is in use."""
        return _readers.get(self.key, make)

    @functools.cached_property
    def key(self):
        """`stamp`, short."""
        return storage.key_of(self.stamp)

    def arrays(self, build):
        """This shard's cached index."""
        return self.opened(lambda: cached_arrays(self.stamp, build))
