"""Images with text of random ids, for distillation: an embedding learns to see, and to pass any text through."""

import dataclasses

import numpy as np

from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.kinds.base import PackedKind
from hovle_jax.data.kinds.tiled import TiledReader
from hovle_jax.data.processor import Processor
from hovle_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RandomTextReader(TiledReader):
    """Records with images; their own text is not read.

    Attributes:
      count: random ids in the query and again in the response.
    """

    count: int

    def check(self, record):
        if not record.images:
            raise BadSample("no_image", "random text goes with images")

    def encode(self, record, counts, rng):
        return self.processor.random_text(rng, self.count, counts)

    def index_key(self):
        return [*super().index_key(), self.count]


@dataclasses.dataclass(frozen=True)
class RandomText(PackedKind):
    """Rows of tokens and tiles with the weights of their outputs: visual tokens apart from random ids."""

    def check(self, config):
        super().check(config)
        if config.data.random_tokens < 1:
            raise UserError(
                f"data.random_tokens={config.data.random_tokens} leaves no text to learn; set it to 1 at least"
            )

    def reader(self, config, tokenizer):
        data = config.data
        processor = Processor.of_run(config, tokenizer)
        return RandomTextReader(self, processor, data.sequence_length, data.tiles, data.upright, data.random_tokens)

    def fields(self, row):
        length = len(row.short.tokens)
        return row.image_fields() | {
            "image_weights": (row.short.image_positions < length).astype(np.float32),
            "text_weights": row.supervised.astype(np.float32),
        }


RANDOM_TEXT = RandomText("random_text")
