"""Images with text of random ids, for distillation: the embedding learns to see, and to pass on any text."""

import dataclasses

import numpy as np

from hovle_jax.config import RunConfig
from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.batch import PackedRow
from hovle_jax.data.files.records import Record
from hovle_jax.data.kinds.base import PackedKind
from hovle_jax.data.kinds.tiled import TiledReader
from hovle_jax.data.processor import Processor
from hovle_jax.data.text.conversation import Encoded
from hovle_jax.data.text.tokenizer import Tokenizer
from hovle_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RandomTextReader(TiledReader):
    """Reads records with images; their own text is ignored.

    Attributes:
      count: random ids in the query, and as many in the response.
    """

    count: int

    def check(self, record: Record) -> None:
        if not record.images:
            raise BadSample("no_image", "random text goes with images")

    def encode(self, record: Record, counts: tuple, rng: np.random.Generator) -> Encoded:
        return self.processor.random_text(rng, self.count, counts)

    def index_key(self) -> list:
        return [*super().index_key(), self.count]


@dataclasses.dataclass(frozen=True)
class RandomText(PackedKind):
    """Rows of tokens and tiles, with separate weights for the outputs at visual tokens and at random ids."""

    def check(self, config: RunConfig) -> None:
        super().check(config)
        if config.data.random_tokens < 1:
            raise UserError(
                f"data.random_tokens={config.data.random_tokens} leaves no text to learn; set it to at least 1"
            )

    def reader(self, config: RunConfig, tokenizer: Tokenizer) -> RandomTextReader:
        data = config.data
        processor = Processor.of_run(config, tokenizer)
        limits = data.sequence_length, data.tiles, data.upright, data.max_pixels
        return RandomTextReader(self, processor, *limits, data.random_tokens)

    def fields(self, row: PackedRow) -> dict:
        length = len(row.short.tokens)
        return row.image_fields() | {
            "image_weights": (row.short.image_positions < length).astype(np.float32),
            "text_weights": row.supervised.astype(np.float32),
        }


RANDOM_TEXT = RandomText("random_text")
