"""Samples that cannot be used: a reason for each, a list of all of them, and a ceiling.

A bad sample never moves another one. Either the index finds it before the rows are planned, or another sample of the
same source takes its place in the row (`indexed.RowMaker`).
"""

import collections
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Sequence

from hovle_jax.errors import UserError
from hovle_jax.system.files import write_whole
from hovle_jax.system.printable import printable

FILE_NAME = "bad_samples.jsonl"
FILE_OF_HOST = "bad_samples.host_{:05}.jsonl"  # beside it while a run on several hosts is going on
OF_ALL_HOSTS = "bad_samples.host_*.jsonl"
MERGED = "bad_samples.merged.jsonl"  # where it is, it counts alone: it takes the place of all others
# Not the sample's fault: these batches need an image, and it has none. Left out, and counted separately.
NOT_FOR_THE_KIND = ("no_image",)
FEWEST_DRAWN = 1000  # the ceiling is a share, which says nothing of a handful of samples
SHARDS_NAMED = 5


class BadSample(Exception):
    """A sample that cannot be used.

    Attributes:
      reason: one of a few fixed words, so that they can be counted: 'missing_image', 'truncated_image', ...
      detail: what exactly is wrong.
    """

    def __init__(self, reason: str, detail: object = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, printable(" ".join(str(detail).split())[:300])


@dataclasses.dataclass(frozen=True, order=True)
class BadEvent:
    """One bad sample, as a line of `bad_samples.jsonl`.

    Attributes:
      step: the step whose batch it was drawn for; -1 = found while the source was indexed, so never drawn.
      source, shard, sample: the source's name, the file, and the sample's own name in it.
      replaced_by: the sample that took its place; empty if the place stayed empty or was never planned.
      samples: how many it counts for; a file that cannot be read at all for as many as others hold on average.
    """

    step: int
    source: str
    shard: str
    sample: str
    reason: str
    detail: str
    replaced_by: str = ""
    samples: int = 1


class BadSamples:
    """A run's list of bad samples, in its folder. Each host lists and counts those of its own rows.

    Args:
      folder: the run's; None = only count.
      ceiling: the share of samples that may be bad.
      folder_remains: whether the folder outlives an exceeded ceiling, so that the message can name the list.
      host: this host's index.
    """

    def __init__(self, folder: str | os.PathLike | None, ceiling: float, folder_remains: bool = True, host: int = 0):
        self.folder_remains = folder_remains
        self.path = pathlib.Path(folder) / (FILE_OF_HOST.format(host) if host else FILE_NAME) if folder else None
        self.ceiling = ceiling
        self.drawn = self.bad = 0  # since this process began
        self._shards, self._reasons = collections.Counter(), collections.Counter()

    def start(self, step: int, indexed: Sequence[BadEvent], total: int) -> None:
        """Begins the list, or resumes it: entries for `step` and later ones are dropped, as they will be found again.

        Only the first host calls it, before the others list anything.

        Args:
          step: the first step that will be taken.
          indexed: the bad samples that indexing found.
          total: the number of all samples.
        Raises:
          UserError: the share of `indexed` is above the ceiling.
        """
        if self.path:
            folder = self.path.parent
            earlier = [event for event in read_bad_samples(folder) if -1 < event.step < step]
            if indexed or self.path.exists() or _others(folder):
                _put_in_place_of_all(folder, [*indexed, *earlier])
        bad, total = _samples_of(indexed), total + _samples_of(indexed) - len(indexed)
        if bad > self.ceiling * max(total, 1):
            self._count(indexed)
            raise UserError(self._message(bad, total))

    def add(self, events: Sequence[BadEvent], drawn: int) -> None:
        """Adds a batch's events, of so many samples drawn. Raises UserError above the ceiling."""
        self.drawn += drawn
        if not events:
            return
        self.bad += _samples_of(events)
        self._count(events)
        if self.path:
            _append(self.path, events)
        if self.bad > self.ceiling * max(self.drawn, FEWEST_DRAWN):
            raise UserError(self._message(self.bad, self.drawn))

    def _count(self, events):
        for event in events:
            self._shards[event.shard] += event.samples
            self._reasons[event.reason] += event.samples

    def _message(self, bad, total):
        named = ", ".join(f"{shard} ({count})" for shard, count in self._shards.most_common(SHARDS_NAMED))
        reasons = ", ".join(f"{reason} {count}" for reason, count in self._reasons.most_common())
        where = f"; all are listed in {self.path}" if self.path and self.folder_remains else ""
        return (
            f"{bad} of {total} samples cannot be used, more than bad_ceiling={self.ceiling:g} allows: {reasons}; "
            f"most are in {named}{where}; mend these files, or raise the ceiling"
        )


def _samples_of(events):
    return sum(event.samples for event in events)


def _append(path, events):
    with path.open("a", encoding="utf-8") as file:
        file.writelines(map(_line, events))


def _line(event):
    return json.dumps(dataclasses.asdict(event), ensure_ascii=False) + "\n"


def count_reasons(events: Iterable[BadEvent]) -> dict[str, int]:
    """{reason: number of distinct samples}, the most frequent first."""
    different = {(event.source, event.shard, event.sample, event.reason) for event in events}
    return dict(collections.Counter(sorted(reason for *_, reason in different)).most_common())


def merge_bad_samples(folder: str | os.PathLike) -> None:
    """Merges the lists of all hosts into one, ordered by step. No host may write to its list any more."""
    folder = pathlib.Path(folder)
    if _others(folder):
        _put_in_place_of_all(folder, read_bad_samples(folder))


def _put_in_place_of_all(folder, events):
    """Makes one list of all. A kill at any moment leaves those that were, or the one."""
    write_whole(folder / MERGED, "".join(map(_line, events)))
    for path in folder.glob(OF_ALL_HOSTS):
        path.unlink()
    (folder / MERGED).replace(folder / FILE_NAME)


def _others(folder):
    """The lists beside the first host's."""
    return [*folder.glob(OF_ALL_HOSTS), *folder.glob(MERGED)]


def read_bad_samples(folder: str | os.PathLike) -> list[BadEvent]:
    """The events listed in a run's folder, of all hosts, ordered by step; empty if there is no list."""
    folder = pathlib.Path(folder)
    paths = [folder / FILE_NAME, *sorted(folder.glob(OF_ALL_HOSTS))]
    paths = [folder / MERGED] if (folder / MERGED).is_file() else paths
    return sorted((event for path in paths for event in _read(path)), key=lambda event: event.step)


def _read(path):
    if not path.is_file():
        return []
    *lines, _ = path.read_bytes().split(b"\n")  # after the last line's end: what a killed run was writing
    return [_event(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _event(line, where):
    try:
        return BadEvent(**json.loads(line))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{where} is damaged ({error}); remove that line, or the file") from None
