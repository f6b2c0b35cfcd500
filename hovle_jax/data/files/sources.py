"""Sources: files of samples as one list of rows, which can be read in any order."""

import dataclasses
import functools
import os
import pathlib
from typing import Any

import numpy as np

from hovle_jax.data.bad_samples import BadEvent, BadSample
from hovle_jax.data.files import storage
from hovle_jax.data.files.records import Record, parse
from hovle_jax.data.files.shard import Shard, UnreadableShard
from hovle_jax.data.files.shard_kinds import SHARD_KINDS, ArrayRecordShard
from hovle_jax.data.files.tfds_shard import TfdsShard
from hovle_jax.errors import UserError
from hovle_jax.system.printable import printable
from hovle_jax.system.remote import is_url

UNREADABLE = "unreadable_shard"


@dataclasses.dataclass(frozen=True)
class LostShard(Shard):
    """A file among others that cannot be read, as one bad row that stands for all of them.

    Attributes:
      problem: what is wrong with it.
      samples: how many it may have held, as the others hold on average.
    """

    problem: str
    samples: int

    @functools.cached_property
    def stamp(self) -> tuple:
        return ("LostShard", self.path)

    def __len__(self) -> int:
        return 1

    def row(self, index: int) -> Any:
        raise BadSample(UNREADABLE, self.problem)

    def name(self, index: int) -> str:
        return "all of it"


@dataclasses.dataclass(frozen=True)
class Source:
    """Shards, one after the other, as one random-access list of rows.

    Attributes:
      name: how reports name it.
      root: the folder that image paths are relative to, and below which they stay.
      outside_root: image paths may lead elsewhere.
    """

    name: str
    shards: tuple[Shard, ...]
    root: str = ""
    outside_root: bool = False

    @functools.cached_property
    def _ends(self):
        return np.cumsum([len(shard) for shard in self.shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, index):
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return self.shards[shard], int(index - (self._ends[shard - 1] if shard else 0))

    def __getitem__(self, index: int) -> Any:
        """A row. Raises BadSample if it cannot be read."""
        return self._read(index, lambda shard, inner: shard.row(inner))

    def value(self, index: int, field: str) -> Any:
        """One field of a row, None if it has none. Raises BadSample."""
        return self._read(index, lambda shard, inner: shard.value(inner, field))

    def _read(self, index, read):
        shard, inner = self._find(index)
        try:
            return read(shard, inner)
        except UnreadableShard as error:  # since it was opened
            raise BadSample(UNREADABLE, error) from None

    def after_shard(self, index: int) -> int:
        """The first row of the shard after that of a row; of the last one, the number of all rows."""
        return int(self._ends[np.searchsorted(self._ends, index, side="right")])

    def event(self, index: int, reason: str, detail: str) -> BadEvent:
        """A row that cannot be used, as it is listed before any step."""
        shard, _ = self._find(index)
        samples = shard.samples if isinstance(shard, LostShard) else 1
        return BadEvent(-1, self.name, *self.where(index), reason, detail, samples=samples)

    def record(self, index: int) -> Record:
        """A row as what it means. Raises BadSample if it cannot be read, or means nothing."""
        return parse(self[index], self.root, self.outside_root)

    def where(self, index: int) -> tuple[str, str]:
        """(shard's path, the row's name in it)."""
        shard, inner = self._find(index)
        return printable(shard.path), printable(shard.name(inner))

    def fingerprint(self) -> list[tuple]:
        """Identifies its files as they are now."""
        return [shard.stamp for shard in self.shards]


def open_source(
    pattern: str | os.PathLike, name: str = "", root: str = "", split: str = "train", outside_root: bool = False
) -> Source:
    """The source that a path, a pattern or a URL names.

    Args:
      pattern: files of one kind of `SHARD_KINDS`, or the folder of a prepared corpus or of a TFDS data set, with or
        without a split as in FOLDER:test.
      root: the folder that image paths are relative to; empty = that of the (first) file.
      split: of a folder whose split `pattern` does not name.
      outside_root: the rows' image paths may lead out of `root`.
    Raises:
      UserError: there is no such file, or it is of an unknown kind.
    """
    folder, colon, named_split = str(pattern).rpartition(":")
    if colon and not is_url(pattern) and os.path.isdir(folder):
        pattern, split = folder, named_split
    paths = storage.expand(pattern)
    if len(paths) == 1 and not is_url(paths[0]) and os.path.isdir(paths[0]):
        name, folder = printable(name or pathlib.Path(paths[0]).name), pathlib.Path(paths[0])
        return Source(name, _readable(_folder_shards(folder, split)), root or str(folder), outside_root)
    shards = []
    for path in paths:
        suffix = pathlib.PurePosixPath(path).suffix.lower()
        if suffix not in SHARD_KINDS:
            raise UserError(
                f"{path}: a source is one of {', '.join(SHARD_KINDS)}, a meta .json, or the name of a corpus"
            )
        shards.append(SHARD_KINDS[suffix](path))
    root = root or paths[0].rpartition("/")[0]
    name = printable(name or pathlib.PurePosixPath(str(pattern)).stem)
    return Source(name, _readable(tuple(shards)), root, outside_root)


def _readable(shards: tuple[Shard, ...]) -> tuple[Shard, ...]:
    """The shards; in the place of one that cannot be read, a LostShard. Raises UnreadableShard if none can be."""
    if len(shards) < 2:
        return shards
    lengths, lost = {}, {}
    for shard in shards:
        try:
            lengths[shard] = len(shard)
        except (UnreadableShard, OSError) as error:
            if is_url(shard.path):
                raise
            lost[shard] = error
    if not lengths:
        raise UnreadableShard(str(next(iter(lost.values()))))
    mean = max(1, round(sum(lengths.values()) / len(lengths)))
    return tuple(LostShard(s.path, printable(lost[s]), mean) if s in lost else s for s in shards)


def _folder_shards(folder, split):
    """The shards of a split, of a corpus that `prepare` wrote or of TFDS."""
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
