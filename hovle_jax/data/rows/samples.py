"""Records -> the samples of a stage: decoded, tiled, tokenised, cut to what a row holds.

Each stage's way has two halves that must agree: `needs`, what a sample will take, told from its text and the sizes of
its pictures alone, and `make`, the sample itself.
"""

import dataclasses
import functools

import numpy as np

from hovle_jax.config import RunConfig
from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.batch import Sample
from hovle_jax.data.files.records import Record, sizes_of
from hovle_jax.data.files.storage import key_of
from hovle_jax.data.images import Tiling, decode_image, recompress, single_tile
from hovle_jax.data.text.chat_template import IMAGE_MARK
from hovle_jax.data.text.conversation import CAPTION_REQUEST, encode_conversation, encode_random_text
from hovle_jax.data.text.tokenizer import Tokenizer
from hovle_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a record takes, whatever the tiling.

    Attributes:
      text: tokens beside those of its tiles; of plain text all of them, also where they fill several rows.
      first: how many of these there are up to the first one that is learned, which is counted too.
      images_before: pictures in front of that.
      sizes: ((width, height), ...).
    """

    text: int
    first: int = 0
    images_before: int = 0
    sizes: tuple = ()


@dataclasses.dataclass(frozen=True)
class RecordSamples:
    """Samples of one stage.

    Attributes:
      length, tiles: what a row holds; no sample is larger.
    """

    stage: str
    tokenizer: Tokenizer
    length: int
    tiles: int
    tiling: Tiling
    tokens_per_tile: int
    system: str
    random_tokens: int
    upright: bool
    clip: tuple = ()  # contrast: the size of a picture and the number of text tokens

    @classmethod
    def of(cls, config: RunConfig, tokenizer):
        data, embedding = config.data, config.model.embedding
        clip = (config.clip.vision.image_size, config.clip.text.context, config.clip.text.end_id) if config.clip else ()
        tiling = Tiling(embedding.tile_size, data.min_tiles, data.max_tiles, data.thumbnail).within(data.tiles)
        return cls(
            config.stage, tokenizer, data.sequence_length, data.tiles, tiling, embedding.tokens_per_tile,
            data.system_message, data.random_tokens, data.upright, clip,
        )  # fmt: skip

    def tiling_of(self, max_tiles):
        """The run's tiling, with another maximum where a source has one of its own."""
        if max_tiles is None:
            return self.tiling
        return dataclasses.replace(self.tiling, max_tiles=max_tiles).within(self.tiles)

    def text_key(self):
        """What `needs` depends on beside the record: the index of a source is known by it."""
        probe = [(f"{IMAGE_MARK}\nOne, 2: três?", "四 🙂.")]
        encoded = encode_conversation(self._tokenizer_for_images, probe, self.system, (0,))
        return [self.kind, self._vocabulary, encoded.tokens.tolist(), self.random_tokens, self.upright]

    @functools.cached_property
    def _vocabulary(self):
        """A name for the tokenizer: two that differ may agree on one short text."""
        return key_of(self.tokenizer.pieces(range(self.tokenizer.vocab_size)), self.tokenizer.chat_template)

    @property
    def kind(self):
        return {"align": "conversation", "instruct": "conversation"}.get(self.stage, self.stage)

    @property
    def _tokenizer_for_images(self):
        return self.tokenizer.with_image_tokens()

    # -- what a record needs

    def needs(self, record: Record):
        """-> Needs. Raises BadSample where the stage finds nothing in it."""
        return getattr(self, f"_needs_{self.kind}")(record)

    def _needs_conversation(self, record):
        encoded = self._conversation(record, (0,) * len(record.images))
        first = int(encoded.supervised.argmax())
        images_before = int((encoded.tokens[:first] == self._image_start).sum())
        return Needs(len(encoded.tokens), first + 1, images_before, sizes_of(record, self.upright))

    def _needs_distill(self, record):
        _needs_image(record)
        encoded = self._random_text((0,) * len(record.images), np.random.default_rng(0))
        first = int(encoded.supervised.argmax())
        return Needs(len(encoded.tokens), first + 1, len(record.images), sizes_of(record, self.upright))

    def _needs_pretrain(self, record):
        return Needs(len(self._text(record)), first=2)

    def _needs_contrast(self, record):
        _needs_image(record)
        if not _description(record):
            raise BadSample("no_caption", "contrast learns from a picture with a text about it")
        return Needs(1, 1, 1, sizes_of(record, self.upright)[:1])

    # -- the sample

    def make(self, record: Record, rng, part=0, tiling=None, augment=False):
        """The sample of a record.

        Args:
          rng: numpy generator of this sample alone.
          part: of a text that fills several rows.
          tiling: instead of the run's own.
          augment: one JPEG compression of each tile.
        Raises:
          BadSample: it cannot be made, or nothing in it would be learned.
        """
        if self.kind == "pretrain":
            return self._part(self._text(record), part)
        if self.kind == "contrast":
            return self._pair(record)
        if self.kind == "distill":
            _needs_image(record)
        tiling = (tiling or self.tiling).shared_by(len(record.images))
        # An image takes a tile at least, so of more images than a row has tiles the rest is cut off anyway.
        seen = range(min(len(record.images), self.tiles))
        tiles = [tiling.cut(decode_image(record.image_bytes(i), self.upright)) for i in seen]
        counts = (*map(len, tiles), *[1] * (len(record.images) - len(seen)))
        make = self._random_text if self.kind == "distill" else lambda counts, rng: self._conversation(record, counts)
        encoded = make(counts, rng)
        keep, kept_images = self._cut(encoded.tokens, counts)
        if not encoded.supervised[1:keep].any():
            raise BadSample(
                "nothing_supervised",
                f"its first answer begins behind {keep} of {len(encoded.tokens)} tokens, where it is cut",
            )
        tiles = np.concatenate(tiles[:kept_images]) if kept_images else self._no_tiles()
        if augment:
            tiles = recompress(tiles, rng)
        return Sample(encoded.tokens[:keep], encoded.supervised[:keep], tiles)

    def _cut(self, tokens, counts):
        """-> (how many tokens are kept, how many images): what a row holds, and never a part of an image."""
        starts = np.flatnonzero(tokens == self._image_start)
        tiles, keep = 0, min(len(tokens), self.length)
        for image, (start, count) in enumerate(zip(starts.tolist(), counts)):
            tiles += count
            if tiles > self.tiles or start + count * self.tokens_per_tile + 2 > keep:
                return min(keep, start), image
        return keep, min(len(counts), len(starts))  # a caption is about the first image alone

    @property
    def _image_start(self):
        return self.tokenizer.special("<img>")

    def _conversation(self, record, counts):
        turns = record.turns
        if not turns:
            if not (record.images and record.caption):
                raise BadSample("no_conversation", "neither turns nor a picture with a caption")
            turns = ((f"{IMAGE_MARK}\n{CAPTION_REQUEST}", record.caption),)
            counts = counts[:1]
        try:
            encoded = encode_conversation(
                self.tokenizer, turns, record.system or self.system, counts, self.tokens_per_tile
            )
        except UserError as error:  # of this conversation: marks, or roles that a template does not take
            raise BadSample("wrong_conversation", error) from None
        if not encoded.supervised[1:].any():
            raise BadSample("nothing_supervised", "it has no answer")
        return encoded

    def _random_text(self, counts, rng):
        return encode_random_text(self.tokenizer, rng, self.random_tokens, self.system, counts, self.tokens_per_tile)

    def _text(self, record):
        text = record.text or record.caption
        if not text.strip():
            raise BadSample("no_text", "pretrain learns from 'text'")
        first = [] if self.tokenizer.bos is None else [self.tokenizer.bos]
        return [*first, *self.tokenizer.encode(text), self.tokenizer.eos]

    def _part(self, tokens, part):
        """Parts share one token, so that each token but the first is learned once."""
        tokens = np.asarray(tokens[part * (self.length - 1) :][: self.length], np.int32)
        if len(tokens) < 2:
            raise BadSample("nothing_supervised", f"its part {part} has {len(tokens)} tokens")
        return Sample(tokens, np.ones(len(tokens), bool), self._no_tiles())

    def _pair(self, record):
        size, context, end = self.clip
        _needs_image(record)
        tiles = single_tile(decode_image(record.image_bytes(0), self.upright), size)
        first = [] if self.tokenizer.bos is None else [self.tokenizer.bos]
        ids = [*first, *self.tokenizer.encode(_description(record))][: context - 1] + [end]
        return Sample(np.asarray(ids, np.int32), np.zeros(len(ids), bool), tiles)

    def _no_tiles(self):
        return np.zeros((0, self.tiling.size, self.tiling.size, 3), np.uint8)


def _needs_image(record):
    if not record.images:
        raise BadSample("no_image", "this stage learns from pictures")


def _description(record):
    """A text about the picture: its caption, or the first answer about it."""
    return record.caption or (record.turns[0][1].strip() if record.turns else "")
