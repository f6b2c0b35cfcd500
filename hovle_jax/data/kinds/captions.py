"""Pairs of an image and a text about it, one per row, for contrastive training. The text has a tower of its own."""

import dataclasses
from typing import NamedTuple

import numpy as np

from hovle_jax.config import PairsConfig, RunConfig
from hovle_jax.data.augmentation import PairAugmentation
from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.batch import Sample
from hovle_jax.data.files.records import Record, sizes_of
from hovle_jax.data.images import MAX_PIXELS, decoded_image
from hovle_jax.data.kinds.base import Kind, Reader, Room, RowLimits
from hovle_jax.data.kinds.needs import Costs, Needs
from hovle_jax.data.processor import Processor
from hovle_jax.data.resizing import Resizing
from hovle_jax.data.text.tokenizer import Tokenizer
from hovle_jax.errors import UserError
from hovle_jax.model.clip_config import CLIPConfig


class PairShape(NamedTuple):
    """What the towers read: how an image becomes their square, tokens of the text, and the ids that end and pad it."""

    resizing: Resizing
    context: int
    end_id: int
    pad_id: int

    @classmethod
    def of(cls, towers: CLIPConfig) -> "PairShape":
        """What the towers of a model read."""
        text = towers.text
        return cls(Resizing.of(towers), text.context, text.end_id, text.padding_id)

    def ids(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """The ids of a text: between the tokenizer's start, if it has one, and the end; a longer text is cut off."""
        begin = [] if tokenizer.bos is None else [tokenizer.bos]
        return [*[*begin, *tokenizer.encode(text)][: self.context - 1], self.end_id]


@dataclasses.dataclass(frozen=True)
class PairReader(Reader):
    """Records with an image and a text about it.

    Attributes:
      shape: of the towers' inputs.
      upright: rotate images as their EXIF orientation says.
      max_pixels: an image of more is a bad sample.
      augmentation: what changes images where they are to be changed.
    """

    shape: PairShape
    upright: bool
    max_pixels: int = MAX_PIXELS
    augmentation: PairAugmentation = PairAugmentation(PairsConfig())

    def needs(self, record: Record) -> Needs:
        _check_image(record)
        if not _descriptions(record):
            raise BadSample("no_caption", "a pair is an image with a text about it")
        return Needs(1, 1, 1, sizes_of(record, self.upright, self.max_pixels)[:1])

    def make(
        self,
        record: Record,
        rng: np.random.Generator,
        piece: int = 0,
        max_tiles: int | None = None,
        augment: bool = False,
    ) -> Sample:
        _check_image(record)
        with decoded_image(record.image_bytes(0), self.upright, self.max_pixels) as image:
            resizing = self.shape.resizing
            tile = self.augmentation.tile(image, resizing, rng) if augment else resizing.tile(image)
        texts = _descriptions(record)
        text = texts[int(rng.integers(len(texts)))]
        return pair(tile[None], self.shape.ids(self.tokenizer, text))

    def room(self, costs: Costs, max_tiles: int | None = None) -> Room:
        one = np.minimum(np.asarray(costs.text, np.int64), 1)
        return Room(one, one, np.ones_like(one), {})

    def index_key(self) -> list:
        return [*super().index_key(), self.upright, self.max_pixels]


def _check_image(record):
    if not record.images:
        raise BadSample("no_image", "a pair has an image")


def _descriptions(record) -> tuple[str, ...]:
    """Texts about the image, of which a sample has one: its captions, or the first answer about it."""
    return record.captions or ((record.turns[0][1].strip(),) if record.turns else ())


def pair(tiles: np.ndarray, ids: list) -> Sample:
    """An image [1, S, S, 3] uint8 and its caption's ids, the end token included."""
    return Sample(np.asarray(ids, np.int32), np.zeros(len(ids), bool), tiles)


def caption_tokens(ids: np.ndarray | list, context: int, pad_id: int) -> np.ndarray:
    """A caption's ids -> [context] int32, padded with `pad_id`. Raises UserError if it is longer."""
    if len(ids) > context:
        raise UserError(f"a caption has {len(ids)} tokens and the text tower's context is {context}")
    tokens = np.full(context, pad_id, np.int32)
    tokens[: len(ids)] = ids
    return tokens


@dataclasses.dataclass(frozen=True)
class Captions(Kind):
    """Rows {'tiles': [1, S, S, 3], 'tokens': [T]}."""

    def check(self, config: RunConfig) -> None:
        self._towers(config)
        config.pairs.check()

    def _towers(self, config) -> CLIPConfig:
        if config.clip is None:
            raise UserError(f"batches of {self.name} need the sizes of two towers: set clip, or take the preset tiny")
        return config.clip

    def limits(self, config: RunConfig) -> RowLimits:
        return RowLimits(1, 1, 1)

    def reader(self, config: RunConfig, tokenizer: Tokenizer) -> PairReader:
        data, processor = config.data, Processor.of_run(config, tokenizer)
        augmentation = PairAugmentation(config.pairs)
        return PairReader(self, processor, self.shape(config), data.upright, data.max_pixels, augmentation)

    def shape(self, config: RunConfig, tokenizer: Tokenizer | None = None) -> PairShape:
        return PairShape.of(self._towers(config))

    def row(self, samples: list[Sample], shape: PairShape) -> dict:
        if not samples:
            raise UserError("no image could be read in place of a bad one; see the source's files")
        return {"tiles": samples[0].tiles, "tokens": caption_tokens(samples[0].tokens, shape.context, shape.pad_id)}

    def fits(self, sample: Sample, tokens: int, tiles: int) -> bool:
        return True

    def empty_row(self, config: RunConfig) -> dict:
        size = self.shape(config).resizing.size
        return self.row([pair(np.zeros((1, size, size, 3), np.uint8), [])], self.shape(config))


CAPTIONS = Captions("captions")
