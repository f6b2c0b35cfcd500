"""The batches of a run: batch = f(seed, step), on grain.

A corpus gives endless rows, each a function of (seed, its place in the global order) alone. Here they become batches,
or one host's share of them. So a batch depends neither on hosts and workers nor on the step at which a run resumed.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import grain
import numpy as np

from hovle_jax.config import RunConfig
from hovle_jax.data.bad_samples import BadEvent
from hovle_jax.data.batch import CorpusSummary, Row, stack
from hovle_jax.data.kinds import Kind
from hovle_jax.data.text.conversation import CAPTION_REQUEST
from hovle_jax.data.text.tokenizer import SentencePieceTokenizer, Tokenizer
from hovle_jax.data.workers import made_by_processes
from hovle_jax.errors import UserError

THREADS = min(os.cpu_count() or 1, 16)  # that make rows if no worker processes do
LINE = 1000  # characters; SentencePiece skips lines of more than 4192 bytes
ROWS_AHEAD = 2  # batches whose rows are made in advance


class Corpus(Protocol):
    """What gives rows: the samples of one split, indexed from files or kept in memory."""

    def texts(self) -> Iterable[str]:
        """Its text, for training a tokenizer."""
        ...

    def rows(self, config: RunConfig, kind: Kind, tokenizer: Tokenizer) -> tuple[grain.MapDataset, CorpusSummary]:
        """-> (endless rows: a MapDataset of Row, what is known of the corpus)."""
        ...

    def held_out_rows(self, config: RunConfig, kind: Kind, tokenizer: Tokenizer) -> grain.MapDataset:
        """Every row once, in a fixed order, never augmented."""
        ...


@dataclasses.dataclass(frozen=True)
class Batches:
    """One host's share of the batches of a run.

    Attributes:
      rows: this host's rows, a MapDataset of Row, endless; row `step * size` begins the batch of a step.
      size: how many rows of a batch are on this host.
      summary: what is known of the corpus before its first row.
    """

    rows: grain.MapDataset
    size: int
    summary: CorpusSummary

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step: a dict of numpy arrays."""
        return stack([self.rows[step * self.size + i].arrays for i in range(self.size)])

    def iterate(
        self,
        first_step: int = 0,
        workers: int = 0,
        nobody_has: Callable[[int], bool] = lambda step: True,
        timeout: float = 0.0,
    ) -> Iterator[tuple[dict, list[BadEvent], int]]:
        """Batches from `first_step` on, prepared in advance.

        Yields:
          (batch, bad events, number of samples drawn).

        Args:
          workers: processes that make rows; 0 = threads of this process.
          nobody_has: called with a step in which this host supervises nothing; says whether that holds on every host.
          timeout: seconds that a process may take for a row before it is started again; 0 = any time.
        Raises:
          UserError: a batch has no supervised token on any host, or processes fail again and again.
        """
        first, ahead = first_step * self.size, ROWS_AHEAD * self.size
        if workers:
            rows = made_by_processes(self.rows, first, workers, ahead, timeout)
        else:
            options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=ahead)
            rows = iter(self.rows[first:].to_iter_dataset(options))
        step = first_step
        while True:
            taken = [next(rows) for _ in range(self.size)]
            events = [dataclasses.replace(event, step=step) for row in taken for event in row.events]
            batch = stack([row.arrays for row in taken])
            if "loss_weights" in batch and not batch["loss_weights"].any() and nobody_has(step):
                raise UserError(_nothing_supervised(step, events))
            yield batch, events, sum(row.drawn for row in taken)
            step += 1


def _nothing_supervised(step, events):
    reasons = f" ({', '.join(sorted({event.reason for event in events}))})" if events else ""
    return f"the batch of step {step} has no supervised token{reasons}; see the samples of data.source"


class _HostRows(grain.MapDataset):
    """One host's rows: those with the given numbers in each global batch, in order."""

    def __init__(self, parent, numbers, batch_size):
        super().__init__(parent)
        self._numbers, self._batch_size = numbers, batch_size

    def __len__(self):
        return len(self._parent) // self._batch_size * len(self._numbers)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        step, place = divmod(index, len(self._numbers))
        return self._parent[step * self._batch_size + self._numbers[place]]

    def __str__(self):
        return f"_HostRows[{len(self._numbers)} of {self._batch_size}]"


class _Padded(grain.MapDataset):
    """Rows, followed by empty ones up to a given length."""

    def __init__(self, parent, empty: Row, length: int):
        super().__init__(parent)
        self._empty, self._length = empty, length

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        return self._parent[index] if index < len(self._parent) else self._empty

    def __str__(self):
        return f"_Padded[{self._length}]"


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """One host's share of the batches of a run's held-out rows, each row once.

    Attributes:
      rows: this host's rows, a MapDataset of Row.
      size: how many rows of a batch are on this host.
      count: rows on all hosts, not counting the empty ones that fill the last batch.
    """

    rows: grain.MapDataset
    size: int
    count: int

    def __iter__(self) -> Iterator[dict]:
        """Batches as dicts of numpy arrays."""
        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=ROWS_AHEAD * self.size)
        rows = iter(self.rows.to_iter_dataset(options))
        for _ in range(len(self.rows) // self.size):
            yield stack([next(rows).arrays for _ in range(self.size)])


def build_dataset(
    config: RunConfig, kind: Kind, tokenizer: Tokenizer, corpus: Corpus, numbers: Sequence[int] | None = None
) -> Batches:
    """The batches of a run, randomly accessible: dataset[step].

    Args:
      kind: one of `kinds`.
      corpus: the training split, from `load_corpus`.
      numbers: which rows of each global batch, 0 to data.batch_size - 1, this host makes; None = all.
    Raises:
      UserError: a sample cannot fit into a row.
    """
    rows, summary = corpus.rows(config, kind, tokenizer)
    return Batches(*_of_host(rows, config.data.batch_size, numbers), summary)


def build_held_out(
    config: RunConfig,
    kind: Kind,
    tokenizer: Tokenizer,
    corpus: Corpus,
    numbers: Sequence[int] | None = None,
    may_fill: bool = True,
) -> HeldOut:
    """The first `config.eval_rows` held-out rows (0: all), in the order of the files.

    Args:
      corpus, numbers: as for `build_dataset`; the corpus of another split.
      may_fill: whether empty rows fill up the last batch; else its rows are left out, unless it is the only batch.
    """
    rows, size = corpus.held_out_rows(config, kind, tokenizer), config.data.batch_size
    if config.eval_rows:
        rows = rows[: config.eval_rows]
    if not may_fill and len(rows) > size:
        rows = rows[: len(rows) // size * size]
    count = len(rows)
    empty = Row(kind.empty_row(config), (), 0)
    return HeldOut(*_of_host(_Padded(rows, empty, -(-count // size) * size), size, numbers), count)


def _of_host(rows, batch_size, numbers):
    """-> (this host's rows, how many of them a batch has)."""
    if numbers is None or len(numbers) == batch_size:
        return rows, batch_size
    return _HostRows(rows, tuple(numbers), batch_size), len(numbers)


def train_tokenizer(config: RunConfig, corpus: Corpus) -> SentencePieceTokenizer:
    """Trains a tokenizer on the text of a corpus, and on the template's role names so that each becomes one piece."""
    lines = [line[i : i + LINE] for line in corpus.texts() for i in range(0, len(line), LINE)]
    if not lines:
        raise UserError(f"{config.data.source} has no text to train a tokenizer on; give one with tokenizer.path")
    extra = ["system\n" + config.data.system_message, "user\n", "assistant\n", CAPTION_REQUEST]
    return SentencePieceTokenizer.train(lines + extra * (len(lines) // 20), config.tokenizer.vocab_size)
