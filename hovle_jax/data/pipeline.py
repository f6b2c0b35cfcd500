"""The batches of a run: batch = f(seed, step), on grain.

A corpus gives endless rows, each a function of (seed, its place in the global order) alone; here they become batches,
or one host's part of them. So a batch does not depend on hosts, on workers, or on where a run was resumed.
"""

import dataclasses
import os

import grain

from hovle_jax.config import RunConfig
from hovle_jax.data.batch import Found, stack
from hovle_jax.data.kinds import Kind
from hovle_jax.data.text.conversation import CAPTION_REQUEST
from hovle_jax.data.text.tokenizer import SentencePieceTokenizer, Tokenizer
from hovle_jax.errors import UserError

THREADS = min(os.cpu_count() or 1, 16)  # that make rows where no worker processes do
LINE = 1000  # characters; SentencePiece leaves lines of more than 4192 bytes out
ROWS_AHEAD = 2  # batches of rows that are made before they are asked for


@dataclasses.dataclass(frozen=True)
class Batches:
    """One host's part of the batches of a run.

    Attributes:
      rows: grain.MapDataset of Row, of this host, endless; row `step * size` begins the batch of a step.
      size: rows of a batch on this host.
      found: what the corpus knows before the first row.
    """

    rows: grain.MapDataset
    size: int
    found: Found

    def __getitem__(self, step):
        """The batch of a step: a dict of numpy arrays."""
        return stack([self.rows[step * self.size + i].arrays for i in range(self.size)])

    def iterate(self, first_step=0, workers=0, nobody_has=lambda step: True):
        """Batches from `first_step` on, prepared ahead: (batch, events with their step, samples drawn).

        Args:
          workers: processes that make rows; 0 = threads of this one.
          nobody_has: asked for a step in which nothing is supervised here: whether no host has anything supervised.
        Raises:
          UserError: a batch has nothing to learn from on any host.
        """
        ahead = ROWS_AHEAD * self.size
        options = grain.ReadOptions(num_threads=1 if workers else THREADS, prefetch_buffer_size=ahead)
        rows = self.rows[first_step * self.size :].to_iter_dataset(options)
        if workers:
            _allow_workers()
            buffer = max(1, ahead // workers)
            rows = rows.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=buffer))
        rows = iter(rows)
        step = first_step
        while True:
            made = [next(rows) for _ in range(self.size)]
            events = [dataclasses.replace(event, step=step) for row in made for event in row.events]
            batch = stack([row.arrays for row in made])
            if "loss_weights" in batch and not batch["loss_weights"].any() and nobody_has(step):
                raise UserError(_nothing_supervised(step, events))
            yield batch, events, sum(row.drawn for row in made)
            step += 1


def _nothing_supervised(step, events):
    reasons = f" ({', '.join(sorted({event.reason for event in events}))})" if events else ""
    return f"the batch of step {step} has no supervised token{reasons}; see the samples of data.source"


def _allow_workers():
    """Grain asks absl for flags in its workers, which absl refuses outside of its own apps."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


class _HostRows(grain.MapDataset):
    """The rows of one host: of each global batch those with the given numbers, in order."""

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


def build_dataset(config: RunConfig, kind: Kind, tokenizer: Tokenizer, corpus, held_out=False, numbers=None) -> Batches:
    """The batches of a run, randomly accessible: dataset[step].

    Args:
      kind: of `kinds`.
      corpus: what `load_corpus` gave for the training split, or for another one with held_out=True (no augmentation).
      numbers: which rows of each global batch, 0 to data.batch_size - 1, this host makes; None = all.
    Raises:
      UserError: a sample cannot fit into a row.
    """
    size = config.data.batch_size
    rows, found = corpus.rows(config, kind, tokenizer, held_out)
    if numbers is None or len(numbers) == size:
        return Batches(rows, size, found)
    return Batches(_HostRows(rows, tuple(numbers), size), len(numbers), found)


def train_tokenizer(config: RunConfig, corpus):
    """The tokenizer of a corpus: its text, and the template's role names so that each is one piece."""
    lines = [line[i : i + LINE] for line in corpus.texts() for i in range(0, len(line), LINE)]
    if not lines:
        raise UserError(f"{config.data.source} has no text to train a tokenizer on; give one with tokenizer.path")
    extra = ["system\n" + config.data.system_message, "user\n", "assistant\n", CAPTION_REQUEST]
    return SentencePieceTokenizer.train(lines + extra * (len(lines) // 20), config.tokenizer.vocab_size)
