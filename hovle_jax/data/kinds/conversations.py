"""Conversations, with images or without, whose answers are learned."""

import dataclasses

import numpy as np

from hovle_jax.config import RunConfig
from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.batch import PackedRow
from hovle_jax.data.files.records import Record
from hovle_jax.data.kinds.base import PackedKind
from hovle_jax.data.kinds.tiled import TiledReader
from hovle_jax.data.processor import Processor
from hovle_jax.data.text.chat_template import IMAGE_MARK
from hovle_jax.data.text.conversation import CAPTION_REQUEST, Encoded
from hovle_jax.data.text.tokenizer import Tokenizer
from hovle_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ConversationReader(TiledReader):
    """Reads conversations; a caption alone becomes the answer to a request for it."""

    def encode(self, record: Record, counts: tuple, rng: np.random.Generator) -> Encoded:
        turns = record.turns
        if not turns:
            if not (record.images and record.caption):
                raise BadSample("no_conversation", "neither turns nor an image with a caption")
            turns = ((f"{IMAGE_MARK}\n{CAPTION_REQUEST}", record.caption),)
            counts = counts[:1]
        try:
            encoded = self.processor.encode(turns, counts, record.system)
        except UserError as error:  # about this conversation: its marks, or roles that the template refuses
            raise BadSample("wrong_conversation", error) from None
        if not encoded.supervised[1:].any():
            raise BadSample("nothing_supervised", "it has no answer")
        return encoded


@dataclasses.dataclass(frozen=True)
class Conversations(PackedKind):
    """Rows of tokens and tiles, with the answers as targets."""

    def reader(self, config: RunConfig, tokenizer: Tokenizer) -> ConversationReader:
        data = config.data
        processor = Processor.of_run(config, tokenizer)
        return ConversationReader(self, processor, data.sequence_length, data.tiles, data.upright, data.max_pixels)

    def fields(self, row: PackedRow) -> dict:
        return row.image_fields() | row.target_fields()


CONVERSATIONS = Conversations("conversations")
