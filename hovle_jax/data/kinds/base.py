"""The interfaces of a kind of batch and of the reader of its records."""

import abc
import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np

from hovle_jax.config import RunConfig
from hovle_jax.data.batch import BatchShape, PackedRow, Sample, pack_row
from hovle_jax.data.files.records import Record
from hovle_jax.data.files.storage import hash_key
from hovle_jax.data.kinds.needs import Costs, Needs
from hovle_jax.data.processor import Processor
from hovle_jax.data.text.chat_template import IMAGE_MARK
from hovle_jax.data.text.tokenizer import Tokenizer
from hovle_jax.errors import UserError

NO_ID = -1  # an id that no token has


class RowLimits(NamedTuple):
    """The most that a row holds; samples: 0 = as many as fit."""

    tokens: int
    tiles: int
    samples: int


@dataclasses.dataclass(frozen=True)
class Room:
    """How much of a row each of the n records of a source takes.

    Attributes:
      tokens, tiles: [n] of each record; tokens beyond a row are truncated, or fill the record's next piece.
      pieces: [n] how many rows the record is split over.
      unusable: {record: why nothing of it would be learned in such a row}.
    """

    tokens: np.ndarray
    tiles: np.ndarray
    pieces: np.ndarray
    unusable: dict


@dataclasses.dataclass(frozen=True)
class Reader(abc.ABC):
    """Turns records into samples of one kind, with one run's settings.

    Its two halves must agree: `needs` says what a sample will take, from its text and the sizes of its images alone;
    `make` makes the sample.
    """

    kind: "Kind"
    processor: Processor

    @property
    def tokenizer(self) -> Tokenizer:
        """The processor's."""
        return self.processor.tokenizer

    @abc.abstractmethod
    def needs(self, record: Record) -> Needs:
        """What a record takes. Raises BadSample if it has nothing for this kind."""

    @abc.abstractmethod
    def make(
        self,
        record: Record,
        rng: np.random.Generator,
        piece: int = 0,
        max_tiles: int | None = None,
        augment: bool = False,
    ) -> Sample:
        """The sample of a record.

        Args:
          rng: a generator for this sample alone.
          piece: which piece, of a text that is split over several rows.
          max_tiles: of an image's grid, if its source has a limit of its own.
          augment: one JPEG compression of each tile, or what the kind does instead.
        Raises:
          BadSample: it cannot be made, or nothing of it would be learned.
        """

    @abc.abstractmethod
    def room(self, costs: Costs, max_tiles: int | None = None) -> Room:
        """How much of this run's rows the records of a source take."""

    def index_key(self) -> list:
        """What `needs` depends on besides the record; identifies the index of a source."""
        probe = [(f"{IMAGE_MARK}\nOne, 2: três?", "四 🙂.")]
        with_images = dataclasses.replace(self.processor, tokenizer=self.tokenizer.with_image_tokens())
        encoded = with_images.encode(probe, (0,))
        return [self.kind.name, self._vocabulary, encoded.tokens.tolist()]

    def plan_key(self) -> list:
        """What `room` depends on besides that and the limits of a row."""
        return []

    @functools.cached_property
    def _vocabulary(self):
        """A hash of the tokenizer: different ones may encode a short text alike."""
        return hash_key(self.tokenizer.pieces(range(self.tokenizer.vocab_size)), self.tokenizer.chat_template)

    @property
    def _begin(self) -> list:
        return [] if self.tokenizer.bos is None else [self.tokenizer.bos]


@dataclasses.dataclass(frozen=True)
class Kind(abc.ABC):
    """A kind of batch."""

    name: str

    def check(self, config: RunConfig) -> None:
        """Raises UserError if a config cannot give such batches."""

    @abc.abstractmethod
    def limits(self, config: RunConfig) -> RowLimits:
        """The most that a row of a run holds."""

    @abc.abstractmethod
    def reader(self, config: RunConfig, tokenizer: Tokenizer) -> Reader:
        """What turns records into its samples."""

    @abc.abstractmethod
    def shape(self, config: RunConfig, tokenizer: Tokenizer | None = None) -> Any:
        """What `row` needs to know of a run; without a tokenizer, for empty rows only."""

    @abc.abstractmethod
    def row(self, samples: list[Sample], shape: Any) -> dict:
        """Samples -> a row's arrays, by name. Raises UserError if they do not fit."""

    @abc.abstractmethod
    def empty_row(self, config: RunConfig) -> dict:
        """A row without samples: it has the fields of a run's batches, with their shapes and types."""

    def fits(self, sample: Sample, tokens: int, tiles: int) -> bool:
        """Whether a sample fits into a place that was planned for so many tokens and tiles."""
        return len(sample.tokens) <= tokens and len(sample.tiles) <= tiles


@dataclasses.dataclass(frozen=True)
class PackedKind(Kind):
    """Samples packed into rows of `data.sequence_length` tokens and `data.tiles` tiles."""

    @abc.abstractmethod
    def fields(self, row: PackedRow) -> dict:
        """Those of the row's fields that this kind has (see data/batch.py)."""

    def check(self, config: RunConfig) -> None:
        length, most = config.data.sequence_length, config.model.llm.max_length
        if length > most:
            raise UserError(f"data.sequence_length={length} exceeds the LLM's {most} positions (model.llm.max_length)")

    def limits(self, config: RunConfig) -> RowLimits:
        data = config.data
        return RowLimits(data.sequence_length, data.tiles, data.samples_per_row)

    def shape(self, config: RunConfig, tokenizer: Tokenizer | None = None) -> BatchShape:
        embedding = config.model.embedding
        assert embedding is not None, "a run has an embedding's sizes, whether it trains one or not"
        return BatchShape.of(config.data, embedding, tokenizer.image_id if tokenizer else NO_ID)

    def row(self, samples: list[Sample], shape: Any) -> dict:
        return self.fields(pack_row(samples, shape))

    def empty_row(self, config: RunConfig) -> dict:
        return self.row([], self.shape(config))
