"""Sources: the files in which people keep samples as one list of rows that can be read in any order."""

import dataclasses
import functools
import os
import pathlib

import numpy as np

from hovle_jax.data.bad_samples import printable
from hovle_jax.data.files import storage
from hovle_jax.data.files.shard_kinds import KINDS, ArrayRecordShard, TfdsShard
from hovle_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Source:
    """Shards one after the other: a random-access source of rows.

    Attributes:
      name: for reports.
      root: the folder that image paths are relative to.
    """

    name: str
    shards: tuple
    root: str = ""

    @functools.cached_property
    def _ends(self):
        return np.cumsum([len(shard) for shard in self.shards])

    def __len__(self):
        return int(self._ends[-1])

    def _find(self, index):
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return self.shards[shard], int(index - (self._ends[shard - 1] if shard else 0))

    def __getitem__(self, index):
        """A row. Raises BadSample where it cannot be read."""
        shard, inner = self._find(index)
        return shard.row(inner)

    def where(self, index) -> tuple[str, str]:
        """(shard's path, the row's name in it)."""
        shard, inner = self._find(index)
        return printable(shard.path), printable(shard.name(inner))

    def fingerprint(self):
        return [shard.stamp for shard in self.shards]


def open_source(pattern, name="", root="", split="train"):
    """The source that a path, a pattern or a URL names.

    Args:
      pattern: files of one kind of `KINDS`, or the folder of a prepared corpus or a TFDS data set; of a folder a split
        may be named as in FOLDER:test.
      root: the folder that image paths are relative to; empty = that of the (first) file.
      split: of a folder.
    Raises:
      UserError: no such file, or a kind that is not known.
    """
    folder, colon, named_split = str(pattern).rpartition(":")
    if colon and not storage.is_url(pattern) and os.path.isdir(folder):
        pattern, split = folder, named_split
    paths = storage.expand(pattern)
    if len(paths) == 1 and not storage.is_url(paths[0]) and os.path.isdir(paths[0]):
        return Source(name or pathlib.Path(paths[0]).name, _folder_shards(pathlib.Path(paths[0]), split), root)
    shards = []
    for path in paths:
        suffix = pathlib.PurePosixPath(path).suffix.lower()
        if suffix not in KINDS:
            raise UserError(f"{path}: a source is one of {', '.join(KINDS)}, a meta .json, or the name of a corpus")
        shards.append(KINDS[suffix](path))
    root = root or paths[0].rpartition("/")[0]
    return Source(name or pathlib.PurePosixPath(str(pattern)).stem, tuple(shards), root)


def _folder_shards(folder, split):
    """Of a corpus that `prepare` wrote, or of TFDS."""
    if (folder / "dataset_info.json").exists():
        return (TfdsShard(str(folder), split),)
    found = sorted(folder.glob("*.array_record"))
    shards = tuple(ArrayRecordShard(str(path)) for path in found if path.name.rpartition("-of-")[0][:-6] == split)
    if shards:
        return shards
    splits = sorted({path.name.rpartition("-of-")[0][:-6] for path in found})
    if splits:
        raise UserError(f"{folder} has no split {split!r}; it has {', '.join(splits)}; {folder}:{splits[0]} names one")
    raise UserError(
        f"{folder} is a folder; name its files with a pattern, for example '{folder}/*.tar' "
        "(a folder of `prepare` or TFDS has a dataset.json or a dataset_info.json)"
    )
