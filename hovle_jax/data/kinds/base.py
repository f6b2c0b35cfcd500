"""What a kind of batch is, and what reads its records."""

import abc
import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np

from hovle_jax.config import RunConfig
from hovle_jax.data.batch import BatchShape, PackedRow, Sample, pack_row
from hovle_jax.data.files.records import Record
from hovle_jax.data.files.storage import key_of
from hovle_jax.data.kinds.needs import Costs, Needs
from hovle_jax.data.processor import Processor
from hovle_jax.data.text.chat_template import IMAGE_MARK
from hovle_jax.data.text.tokenizer import Tokenizer
from hovle_jax.errors import UserError

NO_ID = -1  # no token's


class RowLimits(NamedTuple):
    """What a row holds at most; 0 samples = as many as fit."""

    tokens: int
    tiles: int
    samples: int


@dataclasses.dataclass(frozen=True)
class Room:
    """What the n records of a source take in rows.

    Attributes:
      tokens, tiles: [n] of each record; more tokens than a row has are cut off, or fill the next of its `parts`.
      parts: [n] how many rows' places a record fills.
      unusable: {record: why nothing of it would be learned in such a row}.
    """

    tokens: np.ndarray
    tiles: np.ndarray
    parts: np.ndarray
    unusable: dict


@dataclasses.dataclass(frozen=True)
class Reader(abc.ABC):
    """Records -> the samples of one kind, under one run's settings.

    It has two halves that must agree: `needs`, what a sample will take, told from its text and the sizes of its images
    alone, and `make`, the sample itself.
    """

    kind: "Kind"
    processor: Processor

    @property
    def tokenizer(self) -> Tokenizer:
        return self.processor.tokenizer

    @abc.abstractmethod
    def needs(self, record: Record) -> Needs:
        """Raises BadSample where the kind finds nothing in the record."""

    @abc.abstractmethod
    def make(
        self,
        record: Record,
        rng: np.random.Generator,
        part: int = 0,
        max_tiles: int | None = None,
        augment: bool = False,
    ) -> Sample:
        """The sample of a record.

        Args:
          rng: of this sample alone.
          part: of a text that fills several rows.
          max_tiles: of the grid of an image, where its source has a limit of its own.
          augment: one JPEG compression of each tile.
        Raises:
          BadSample: it cannot be made, or nothing in it would be learned.
        """

    @abc.abstractmethod
    def room(self, costs: Costs, max_tiles: int | None = None) -> Room:
        """What the records of a source take in this run's rows."""

    def index_key(self) -> list:
        """What `needs` depends on beside the record: the index of a source is known by it."""
        probe = [(f"{IMAGE_MARK}\nOne, 2: três?", "四 🙂.")]
        with_images = dataclasses.replace(self.processor, tokenizer=self.tokenizer.with_image_tokens())
        encoded = with_images.encode(probe, (0,))
        return [self.kind.name, self._vocabulary, encoded.tokens.tolist()]

    def plan_key(self) -> list:
        """What `room` depends on beside that and the limits of a row."""
        return []

    @functools.cached_property
    def _vocabulary(self):
        """A name for the tokenizer: two that differ may agree on one short text."""
        return key_of(self.tokenizer.pieces(range(self.tokenizer.vocab_size)), self.tokenizer.chat_template)

    @property
    def _begin(self) -> list:
        return [] if self.tokenizer.bos is None else [self.tokenizer.bos]


@dataclasses.dataclass(frozen=True)
class Kind(abc.ABC):
    """A kind of batch."""

    name: str

    def check(self, config: RunConfig) -> None:
        """Raises UserError where a config cannot give such batches."""

    @abc.abstractmethod
    def limits(self, config: RunConfig) -> RowLimits:
        """What a row of a run holds."""

    @abc.abstractmethod
    def reader(self, config: RunConfig, tokenizer: Tokenizer) -> Reader:
        """What makes its samples of records."""

    @abc.abstractmethod
    def shape(self, config: RunConfig, tokenizer: Tokenizer | None = None) -> Any:
        """What `row` must know of a run; without a tokenizer for empty rows alone."""

    @abc.abstractmethod
    def row(self, samples: list[Sample], shape: Any) -> dict:
        """Samples -> a row's arrays, by name. Raises UserError where they do not fit."""

    @abc.abstractmethod
    def empty_row(self, config: RunConfig) -> dict:
        """A row in which nothing stands: the fields of a run's batches, their shapes and types."""

    def fits(self, sample: Sample, tokens: int, tiles: int) -> bool:
        """Whether a sample fits into the place that was planned for one of so many tokens and tiles."""
        return len(sample.tokens) <= tokens and len(sample.tiles) <= tiles


@dataclasses.dataclass(frozen=True)
class PackedKind(Kind):
    """Samples packed into rows of `data.sequence_length` tokens and `data.tiles` tiles."""

    @abc.abstractmethod
    def fields(self, row: PackedRow) -> dict:
        """The fields of the batch contract that it has."""

    def check(self, config):
        length, most = config.data.sequence_length, config.model.llm.max_length
        if length > most:
            raise UserError(f"data.sequence_length={length} exceeds the LLM's {most} positions (model.llm.max_length)")

    def limits(self, config):
        data = config.data
        return RowLimits(data.sequence_length, data.tiles, data.samples_per_row)

    def shape(self, config, tokenizer=None):
        embedding = config.model.embedding
        assert embedding is not None, "a run has an embedding's sizes, whether it trains one or not"
        return BatchShape.of(config.data, embedding, tokenizer.image_id if tokenizer else NO_ID)

    def row(self, samples, shape):
        return self.fields(pack_row(samples, shape))

    def empty_row(self, config):
        return self.row([], self.shape(config))
