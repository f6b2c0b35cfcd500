"""Samples from sources of any size: indexed once, packed by a plan, and read when their row is made.

The plan of an epoch depends on the sources, the seed and the size of a row; it is made once and cached. All epochs have
the same rows, in different orders. A sample that cannot be made is replaced by the next one of its source that fits
into its place; the plan itself never changes.
"""

import collections
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from hovle_jax.config import RunConfig
from hovle_jax.data.bad_samples import NOT_FOR_THE_KIND, BadEvent, BadSample
from hovle_jax.data.batch import HELD_OUT_SEED, CorpusSummary, Row
from hovle_jax.data.files.mixture import Entry, open_mixture
from hovle_jax.data.files.shard import cached_arrays
from hovle_jax.data.files.sources import UNREADABLE
from hovle_jax.data.kinds import Kind, Reader
from hovle_jax.data.kinds.base import RowLimits
from hovle_jax.data.kinds.needs import Costs
from hovle_jax.data.rows.costs import costs_of
from hovle_jax.data.rows.packing import pack
from hovle_jax.data.text.tokenizer import Tokenizer
from hovle_jax.errors import UserError

REPLACEMENTS = 64  # how many samples after a bad one are tried in its place
TOKENIZER_TEXTS = 100_000  # how many samples a tokenizer is trained on


@dataclasses.dataclass(frozen=True)
class PlanSummary:
    """What a plan contains, for people.

    Attributes:
      samples, rows: of an epoch.
      token_fill, tile_fill: the shares of the rows' tokens and tiles that are used.
      unpacked_token_fill, unpacked_tile_fill: the same with one sample per row.
      sources: ((name, samples, tokens) of an epoch, ...).
      left_out: ((reason, number), ...) of samples that do not suit this kind of batch.
    """

    samples: int
    rows: int
    token_fill: float
    tile_fill: float
    unpacked_token_fill: float
    unpacked_tile_fill: float
    sources: tuple
    left_out: tuple = ()

    def __str__(self):
        left_out = "".join(f"; {number:,} left out ({reason})" for reason, number in self.left_out)
        return (
            f"{self.samples:,} samples an epoch in {self.rows:,} rows: {self.token_fill:.1%} of tokens and "
            f"{self.tile_fill:.1%} of tiles used ({self.unpacked_token_fill:.1%} and {self.unpacked_tile_fill:.1%} "
            f"with one sample a row){left_out}"
        )


class EpochPlan:
    """The rows of an epoch: which samples are in each, and how much of the row each may take.

    Worker processes receive its key alone, and map the same files.

    Attributes:
      ends: [R]; row r has the places ends[r - 1] to ends[r].
      entry, record, piece, tokens, tiles: of each place, the sample and the room planned for it.
    """

    ends: np.ndarray
    entry: np.ndarray
    record: np.ndarray
    piece: np.ndarray
    tokens: np.ndarray
    tiles: np.ndarray

    def __init__(self, key: Sequence, build: Callable[[], dict[str, np.ndarray]] | None = None):
        self.key = key
        self._arrays = cached_arrays(key, build)

    def __reduce__(self):
        return EpochPlan, (self.key,)

    def __getattr__(self, name: str) -> np.ndarray:
        try:
            return self.__dict__["_arrays"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __len__(self) -> int:
        return len(self.ends)

    def digest(self) -> str:
        """A hash of which samples are in which rows, wherever their files lie."""
        content = hashlib.sha256()
        for name in ("ends", "entry", "record", "piece", "tokens", "tiles"):
            content.update(np.ascontiguousarray(getattr(self, name)).data)
        return content.hexdigest()[:24]

    def row(self, index: int) -> list[tuple[int, ...]]:
        """The places of a row: [(entry, record, piece, tokens, tiles), ...]."""
        here = slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))
        fields = (self.entry, self.record, self.piece, self.tokens, self.tiles)
        return list(zip(*(field[here].tolist() for field in fields)))


@dataclasses.dataclass(frozen=True)
class IndexedCorpus:
    """The sources of a run as a `pipeline.Corpus`."""

    entries: tuple[Entry, ...]
    say: Callable[[str], object] = dataclasses.field(default=print, compare=False)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        split: str = "train",
        say: Callable[[str], object] = print,
        outside_root: bool = False,
    ) -> "IndexedCorpus":
        """The corpus of a meta file or a source, see `open_mixture`. Raises UserError if it cannot be opened."""
        return cls(tuple(open_mixture(path, split, outside_root)), say)

    def texts(self) -> Iterator[str]:
        """The text of the first samples of each source, for training a tokenizer."""
        for entry in self.entries:
            for i in range(min(entry.used, TOKENIZER_TEXTS // len(self.entries))):
                try:
                    record = entry.source.record(i)
                except BadSample:
                    continue
                yield from (line for line in _texts_of(record) if line.strip())

    def planned(
        self, config: RunConfig, kind: Kind, tokenizer: Tokenizer, in_order: bool = False
    ) -> tuple[EpochPlan, PlanSummary, list[BadEvent], Reader]:
        """-> (plan, its summary, events of samples that cannot be used, reader).

        Args:
          in_order: take samples in the order of the files, not in the random order of the seed.
        """
        seed = None if in_order else config.seed
        reader, limits = kind.reader(config, tokenizer), kind.limits(config)
        costs = [costs_of(entry.source, reader, self.say, config.workers) for entry in self.entries]
        by_entry, events = [], []
        for number, (entry, cost) in enumerate(zip(self.entries, costs)):
            of_entry, bad = _places(number, entry, cost, reader, limits)
            by_entry.append(of_entry)
            events += bad
        places = {name: np.concatenate([of_entry[name] for of_entry in by_entry]) for name in by_entry[0]}
        left_out = collections.Counter(event.reason for event in events if event.reason in NOT_FOR_THE_KIND)
        if not len(places["tokens"]):
            first = f"; the first: {events[0].reason}: {events[0].detail}" if events else ""
            raise UserError(f"none of the samples of {config.data.source} gives batches of {kind.name}{first}")
        sources = [
            [
                e.source.fingerprint(),
                e.source.root,
                e.source.outside_root,
                e.repeat,
                e.max_tiles,
                [i for i, *_ in cost.bad],
            ]
            for e, cost in zip(self.entries, costs)
        ]
        key = ("epoch plan", sources, reader.index_key(), reader.plan_key(), list(limits), seed)
        plan = EpochPlan(key, lambda: _pack_places(places, limits, seed))
        summary = dataclasses.replace(_summary(plan, limits, self.entries), left_out=tuple(left_out.most_common()))
        return plan, summary, [event for event in events if event.reason not in left_out], reader

    def rows(self, config: RunConfig, kind: Kind, tokenizer: Tokenizer) -> tuple[grain.MapDataset, CorpusSummary]:
        """-> (endless rows: a MapDataset of Row, what is known of the corpus)."""
        plan, summary, events, reader = self.planned(config, kind, tokenizer)
        maker = RowMaker(plan, self.entries, reader, kind.shape(config, tokenizer), config.data.augment)
        numbers = grain.MapDataset.range(len(plan)).seed(config.seed).shuffle()
        total = sum(entry.used for entry in self.entries)
        known = CorpusSummary(total, tuple(events), str(summary), summary.sources, plan.digest())
        return numbers.repeat().random_map(maker), known

    def held_out_rows(self, config: RunConfig, kind: Kind, tokenizer: Tokenizer) -> grain.MapDataset:
        """Every row once, in the order of the files, never augmented, and the same for every seed."""
        plan, _, _, reader = self.planned(config, kind, tokenizer, in_order=True)
        maker = RowMaker(plan, self.entries, reader, kind.shape(config, tokenizer), augment=False, held_out=True)
        return grain.MapDataset.range(len(plan)).seed(HELD_OUT_SEED).random_map(maker)


def _texts_of(record):
    yield from (*record.captions, *record.text.splitlines())
    for turn in record.turns:
        yield from turn


# ---------------------------------------------------------------------------------------------------------------------
# The plan


def _places(number: int, entry: Entry, cost: Costs, reader: Reader, limits: RowLimits):
    """The n places that an entry fills in an epoch, in its own order -> ({field: [n]}, events)."""
    room = reader.room(cost, entry.max_tiles)
    used = entry.copies() > 0
    events = [event for event, (i, *_) in zip(cost.events(entry.source), cost.bad) if used[i]]
    events += [
        BadEvent(-1, entry.source.name, *entry.source.where(i), "nothing_supervised", detail)
        for i, detail in room.unusable.items()
        if used[i]
    ]
    copies = np.where(np.asarray(cost.text) > 0, entry.copies(), 0)
    copies[list(room.unusable)] = 0
    times = room.pieces * copies
    record = np.repeat(np.arange(len(times)), times)
    begin = np.cumsum(times) - times
    piece = (np.arange(len(record)) - begin[record]) % room.pieces[record]
    # Adjacent pieces share one token, so that each token but the first is learned once.
    tokens = np.minimum(room.tokens[record] - piece * (limits.tokens - 1), limits.tokens)
    places = {"record": record, "piece": piece, "tokens": tokens, "tiles": room.tiles[record]}
    return places | {"entry": np.full(len(record), number)}, events


def _pack_places(places, limits, seed):
    if seed is not None:
        order = np.random.default_rng([seed, 0]).permutation(len(places["tokens"]))
        places = {name: values[order] for name, values in places.items()}
    packing = pack(places["tokens"], places["tiles"], *limits)
    arrays = {name: values[packing.members].astype(np.int32) for name, values in places.items()}
    return arrays | {"ends": packing.ends}


def _summary(plan, limits, entries):
    length, max_tiles, _ = limits
    tokens, tiles, places = int(plan.tokens.sum()), int(plan.tiles.sum()), len(plan.tokens)
    share = lambda used, rows, each: used / (rows * each) if each else 0.0
    by_entry = np.bincount(plan.entry, plan.tokens, len(entries)), np.bincount(plan.entry, minlength=len(entries))
    return PlanSummary(
        places,
        len(plan),
        share(tokens, len(plan), length),
        share(tiles, len(plan), max_tiles),
        share(tokens, places, length),
        share(tiles, places, max_tiles),
        tuple((e.source.name, int(n), int(t)) for e, t, n in zip(entries, *by_entry)),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@dataclasses.dataclass(frozen=True)
class RowMaker:
    """Makes a row from its number and its random generator."""

    plan: EpochPlan = dataclasses.field(repr=False)
    entries: tuple[Entry, ...] = dataclasses.field(repr=False)
    reader: Reader = dataclasses.field(repr=False)
    shape: object  # what the kind of batch needs to know
    augment: bool  # unless an entry says otherwise
    held_out: bool = False  # never augmented, whatever an entry says

    def __call__(self, number: int, rng: np.random.Generator) -> Row:
        places = self.plan.row(int(number))
        seeds = rng.integers(0, 2**63, len(places))  # one per place, so that a bad sample does not change the others'
        samples, events = [], []
        for place, seed in zip(places, seeds):
            sample, bad = self._fill(place, int(seed))
            samples += [sample] if sample is not None else []
            events += bad
        return Row(self.reader.kind.row(samples, self.shape), tuple(events), len(places))

    def _fill(self, place, seed):
        """-> (sample or None, events): the planned sample, or the next one of its source that fits into its place."""
        entry_number, record, piece, tokens, tiles = place
        entry = self.entries[entry_number]
        first_error, index = None, record
        for k in range(min(REPLACEMENTS, entry.used)):
            try:
                sample = self._make(entry, index, piece if k == 0 else 0, seed)
                if not self.reader.kind.fits(sample, tokens, tiles):
                    raise BadSample(
                        "size_differs",
                        f"it takes {len(sample.tokens)} tokens and {len(sample.tiles)} tiles instead of the planned "
                        f"{tokens} and {tiles}: its row states another size than its image has",
                    )
            except BadSample as error:
                first_error = first_error or error
                # Of a file that has become unreadable no other sample is tried.
                following = entry.source.after_shard(index) if error.reason == UNREADABLE else index + 1
                index = following % entry.used
                continue
            if first_error is None:
                return sample, []
            return sample, [self._event(entry, record, first_error, entry.source.where(index)[1])]
        return None, [self._event(entry, record, first_error, "")]

    def _make(self, entry, index, piece, seed):
        augment = self.augment if entry.augment is None else entry.augment
        record = entry.source.record(index)
        rng = np.random.default_rng(seed)
        return self.reader.make(record, rng, piece, entry.max_tiles, augment and not self.held_out)

    def _event(self, entry, record, error, replaced_by):
        shard, name = entry.source.where(record)
        return BadEvent(-1, entry.source.name, shard, name, error.reason, error.detail, replaced_by)
