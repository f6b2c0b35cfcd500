"""What becomes of samples that cannot be used: a reason for each, a list of all, and a ceiling.

A bad sample never moves another one: it is known before the rows are planned, or another sample of the same source
takes its place in the row (`indexed.RowMaker`).
"""

import collections
import dataclasses
import json
import pathlib

from hovle_jax.errors import UserError

FILE_NAME = "bad_samples.jsonl"
FILE_OF_HOST = "bad_samples.host_{:05}.jsonl"  # beside it while a run of several hosts goes on
OF_ALL_HOSTS = "bad_samples.host_*.jsonl"
# Reasons that are no fault of a sample: text alone, in batches of images. Such are left out, and counted apart.
NOT_FOR_THE_KIND = ("no_image",)
FEWEST_DRAWN = 1000  # a ceiling is a share: of fewer samples than these it says nothing
SHARDS_NAMED = 5


class BadSample(Exception):
    """A sample that cannot be used.

    Attributes:
      reason: one of a few words, to be counted by: 'missing_image', 'truncated_image', ...
      detail: what exactly is wrong.
    """

    def __init__(self, reason: str, detail: object = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, printable(" ".join(str(detail).split())[:300])


def printable(text):
    """A text without half characters, which no file takes: names of files and keys of rows may hold them."""
    return text.encode("utf-8", "backslashreplace").decode()


@dataclasses.dataclass(frozen=True, order=True)
class BadEvent:
    """One bad sample, as a line of `bad_samples.jsonl`.

    Attributes:
      step: the step whose batch it was drawn for; -1 = found while the source was indexed, so never drawn.
      source, shard, sample: the source's name, the file, and the sample's own name in it.
      replaced_by: the sample in its place; empty where the place stayed empty, or was never planned.
    """

    step: int
    source: str
    shard: str
    sample: str
    reason: str
    detail: str
    replaced_by: str = ""


class BadSamples:
    """The list of a run, in its folder. Each host lists, and judges, the samples of its own rows.

    Args:
      folder: the run's, or None to count alone.
      ceiling: the share of samples that may be bad.
      stays: whether the folder is there when the ceiling is exceeded.
      host: index of this one.
    """

    def __init__(self, folder, ceiling, stays=True, host=0):
        self.stays = stays
        self.path = pathlib.Path(folder) / (FILE_OF_HOST.format(host) if host else FILE_NAME) if folder else None
        self.ceiling = ceiling
        self.drawn = self.found = 0  # since this process began
        self._shards, self._reasons = collections.Counter(), collections.Counter()

    def start(self, step, indexed, total):
        """A run begins or goes on: what an earlier one listed for this step and later ones will be found again.

        Called on the first host alone, before the others list anything.

        Args:
          indexed: the events of samples that indexing found bad.
          total: the number of all samples.
        Raises:
          UserError: the share of `indexed` is above the ceiling.
        """
        if self.path:
            earlier = [event for event in read_bad_samples(self.path.parent) if -1 < event.step < step]
            if self.path.exists() or indexed or earlier:
                _write(self.path, [*indexed, *earlier], "w")
            _remove_others(self.path.parent)
        if len(indexed) > self.ceiling * max(total, 1):
            self._count(indexed)
            raise UserError(self._message(len(indexed), total))

    def add(self, events, drawn):
        """Takes a batch's events. Raises UserError above the ceiling."""
        self.drawn += drawn
        if not events:
            return
        self.found += len(events)
        self._count(events)
        if self.path:
            _write(self.path, events, "a")
        if self.found > self.ceiling * max(self.drawn, FEWEST_DRAWN):
            raise UserError(self._message(self.found, self.drawn))

    def _count(self, events):
        self._shards.update(event.shard for event in events)
        self._reasons.update(event.reason for event in events)

    def _message(self, bad, total):
        named = ", ".join(f"{shard} ({count})" for shard, count in self._shards.most_common(SHARDS_NAMED))
        reasons = ", ".join(f"{reason} {count}" for reason, count in self._reasons.most_common())
        where = f"; all are listed in {self.path}" if self.path and self.stays else ""
        return (
            f"{bad} of {total} samples cannot be used, more than bad_ceiling={self.ceiling:g} allows: {reasons}; "
            f"most are in {named}{where}; mend these files, or raise the ceiling"
        )


def _write(path, events, mode):
    with path.open(mode, encoding="utf-8") as file:
        for event in events:
            file.write(json.dumps(dataclasses.asdict(event), ensure_ascii=False) + "\n")


def count_reasons(events):
    """{reason: number of different samples}, the most frequent first."""
    different = {(event.source, event.shard, event.sample, event.reason) for event in events}
    return dict(collections.Counter(sorted(reason for *_, reason in different)).most_common())


def merge_bad_samples(folder):
    """Makes one list of those of all hosts, in the order of steps; none of them may be written to any more."""
    folder = pathlib.Path(folder)
    if any(folder.glob(OF_ALL_HOSTS)):
        _write(folder / FILE_NAME, read_bad_samples(folder), "w")
        _remove_others(folder)


def _remove_others(folder):
    for path in folder.glob(OF_ALL_HOSTS):
        path.unlink()


def read_bad_samples(folder):
    """The events of a run's folder in the order of steps, those of all hosts; empty where there is no list."""
    folder = pathlib.Path(folder)
    paths = [folder / FILE_NAME, *sorted(folder.glob(OF_ALL_HOSTS))]
    return sorted((event for path in paths for event in _read(path)), key=lambda event: event.step)


def _read(path):
    if not path.is_file():
        return []
    *lines, cut = path.read_text("utf-8").split("\n")  # after the last line's end: what a killed run was writing
    return [BadEvent(**json.loads(line)) for line in lines]
