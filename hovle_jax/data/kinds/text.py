"""Plain text, of which every token is learned; a long text is split over several rows."""

import dataclasses

import numpy as np

from hovle_jax.config import RunConfig
from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.batch import BatchShape, PackedRow, Sample, no_tiles
from hovle_jax.data.files.records import Record
from hovle_jax.data.kinds.base import NO_ID, PackedKind, Reader, Room
from hovle_jax.data.kinds.needs import Costs, Needs
from hovle_jax.data.processor import Processor
from hovle_jax.data.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TextReader(Reader):
    """Reads texts, and splits long ones into pieces that fill a row.

    Attributes:
      length: of a row, in tokens.
    """

    length: int

    def needs(self, record: Record) -> Needs:
        return Needs(len(self._ids(record)), first=2)

    def make(
        self,
        record: Record,
        rng: np.random.Generator,
        piece: int = 0,
        max_tiles: int | None = None,
        augment: bool = False,
    ) -> Sample:
        """Adjacent pieces share one token, so that each token but the first is learned once."""
        tokens = np.asarray(self._ids(record)[piece * (self.length - 1) :][: self.length], np.int32)
        if len(tokens) < 2:
            raise BadSample("nothing_supervised", f"its piece {piece} has {len(tokens)} tokens")
        return Sample(tokens, np.ones(len(tokens), bool), no_tiles())

    def room(self, costs: Costs, max_tiles: int | None = None) -> Room:
        tokens = np.asarray(costs.text, np.int64)
        pieces = np.maximum(-(-(tokens - 1) // max(self.length - 1, 1)), 1)
        return Room(tokens, np.zeros_like(tokens), pieces, {})

    def _ids(self, record):
        text = record.text or record.caption
        if not text.strip():
            raise BadSample("no_text", "plain text is learned from 'text'")
        return [*self._begin, *self.tokenizer.encode(text), self.tokenizer.eos]


@dataclasses.dataclass(frozen=True)
class Text(PackedKind):
    """Rows of tokens, without images."""

    def reader(self, config: RunConfig, tokenizer: Tokenizer) -> TextReader:
        return TextReader(self, Processor.of_run(config, tokenizer), config.data.sequence_length)

    def shape(self, config: RunConfig, tokenizer: Tokenizer | None = None) -> BatchShape:
        return dataclasses.replace(super().shape(config), image_id=NO_ID, tiles=0, expansion=1)

    def fields(self, row: PackedRow) -> dict:
        return row.text_fields() | row.target_fields()


TEXT = Text("text")
