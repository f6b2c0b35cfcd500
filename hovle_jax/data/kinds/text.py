"""Plain text, of which every token is learned; long texts fill several rows."""

import dataclasses

import numpy as np

from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.batch import Sample, no_tiles
from hovle_jax.data.kinds.base import NO_ID, PackedKind, Reader, Room
from hovle_jax.data.kinds.needs import Needs
from hovle_jax.data.processor import Processor


@dataclasses.dataclass(frozen=True)
class TextReader(Reader):
    """Texts, and their parts that fill rows.

    Attributes:
      length: of a row.
    """

    length: int

    def needs(self, record):
        return Needs(len(self._ids(record)), first=2)

    def make(self, record, rng, part=0, max_tiles=None, augment=False):
        """Parts share one token, so that each token but the first is learned once."""
        tokens = np.asarray(self._ids(record)[part * (self.length - 1) :][: self.length], np.int32)
        if len(tokens) < 2:
            raise BadSample("nothing_supervised", f"its part {part} has {len(tokens)} tokens")
        return Sample(tokens, np.ones(len(tokens), bool), no_tiles())

    def room(self, costs, max_tiles=None):
        tokens = np.asarray(costs.text, np.int64)
        parts = np.maximum(-(-(tokens - 1) // max(self.length - 1, 1)), 1)
        return Room(tokens, np.zeros_like(tokens), parts, {})

    def _ids(self, record):
        text = record.text or record.caption
        if not text.strip():
            raise BadSample("no_text", "plain text is learned from 'text'")
        return [*self._begin, *self.tokenizer.encode(text), self.tokenizer.eos]


@dataclasses.dataclass(frozen=True)
class Text(PackedKind):
    """Rows of tokens alone."""

    def reader(self, config, tokenizer):
        return TextReader(self, Processor.of_run(config, tokenizer), config.data.sequence_length)

    def shape(self, config, tokenizer=None):
        return dataclasses.replace(super().shape(config), image_id=NO_ID, tiles=0, expansion=1)

    def fields(self, row):
        return row.text_fields() | row.target_fields()


TEXT = Text("text")
