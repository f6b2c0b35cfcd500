"""Conversations about images or none, of which the answers are learned."""

import dataclasses

from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.kinds.base import PackedKind
from hovle_jax.data.kinds.tiled import TiledReader
from hovle_jax.data.processor import Processor
from hovle_jax.data.text.chat_template import IMAGE_MARK
from hovle_jax.data.text.conversation import CAPTION_REQUEST
from hovle_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ConversationReader(TiledReader):
    """A record with a caption alone is a conversation in which it is asked for."""

    def encode(self, record, counts, rng):
        turns = record.turns
        if not turns:
            if not (record.images and record.caption):
                raise BadSample("no_conversation", "neither turns nor an image with a caption")
            turns = ((f"{IMAGE_MARK}\n{CAPTION_REQUEST}", record.caption),)
            counts = counts[:1]
        try:
            encoded = self.processor.encode(turns, counts, record.system)
        except UserError as error:  # of this conversation: marks, or roles that a template does not take
            raise BadSample("wrong_conversation", error) from None
        if not encoded.supervised[1:].any():
            raise BadSample("nothing_supervised", "it has no answer")
        return encoded


@dataclasses.dataclass(frozen=True)
class Conversations(PackedKind):
    """Rows of tokens and tiles with the targets of the answers."""

    def reader(self, config, tokenizer):
        data = config.data
        processor = Processor.of_run(config, tokenizer)
        return ConversationReader(self, processor, data.sequence_length, data.tiles, data.upright)

    def fields(self, row):
        return row.image_fields() | row.target_fields()


CONVERSATIONS = Conversations("conversations")
