"""Records with images as token sequences with tiles, truncated to a row."""

import abc
import contextlib
import dataclasses

import numpy as np

from hovle_jax.data.augmentation import recompress
from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.batch import Sample
from hovle_jax.data.files.records import Record, sizes_of
from hovle_jax.data.images import Tiling, decoded_image
from hovle_jax.data.kinds.base import Reader, Room
from hovle_jax.data.kinds.needs import Costs, Needs
from hovle_jax.data.text.conversation import Encoded


@dataclasses.dataclass(frozen=True)
class TiledReader(Reader):
    """Reads records with images: tiled, and truncated to a row.

    Attributes:
      length, tiles: the most tokens and tiles that a row, and so a sample, has.
      upright: rotate images as their EXIF orientation says.
      max_pixels: an image of more is a bad sample.
    """

    length: int
    tiles: int
    upright: bool
    max_pixels: int

    @abc.abstractmethod
    def encode(self, record: Record, counts: tuple, rng: np.random.Generator) -> Encoded:
        """The record's tokens, for images with `counts` tiles. Raises BadSample."""

    def check(self, record: Record) -> None:
        """Raises BadSample for a record that this kind does not use."""

    def tiling(self, max_tiles: int | None = None) -> Tiling:
        """The run's tiling, or the same with another limit; never more tiles than a row has."""
        if max_tiles is None:
            return self.processor.tiling
        return dataclasses.replace(self.processor.tiling, max_tiles=max_tiles).within(self.tiles)

    def needs(self, record: Record) -> Needs:
        self.check(record)
        encoded = self.encode(record, (0,) * len(record.images), np.random.default_rng(0))
        first = int(encoded.supervised.argmax())
        images_before = int((encoded.tokens[:first] == self._image_start).sum())
        return Needs(len(encoded.tokens), first + 1, images_before, sizes_of(record, self.upright, self.max_pixels))

    def make(
        self,
        record: Record,
        rng: np.random.Generator,
        piece: int = 0,
        max_tiles: int | None = None,
        augment: bool = False,
    ) -> Sample:
        self.check(record)
        images = len(record.images)
        # An image takes at least one tile, so images beyond the row's number of tiles would be truncated anyway.
        seen = min(images, self.tiles)
        processor = dataclasses.replace(self.processor, tiling=self.tiling(max_tiles))
        with contextlib.closing(self._decoded(record, seen)) as decoded:
            tiles = processor.cut(decoded, images)
        counts = (*map(len, tiles), *[1] * (images - seen))
        encoded = self.encode(record, counts, rng)
        keep, kept_images = self._kept(encoded.tokens, counts)
        if not encoded.supervised[1:keep].any():
            raise BadSample(
                "nothing_supervised",
                f"its first answer starts after {keep} of {len(encoded.tokens)} tokens, where it is truncated",
            )
        tiles = processor.joined(tiles[:kept_images])
        return Sample(encoded.tokens[:keep], encoded.supervised[:keep], recompress(tiles, rng) if augment else tiles)

    def _decoded(self, record, count):
        """One image at a time in memory."""
        for i in range(count):
            with decoded_image(record.image_bytes(i), self.upright, self.max_pixels) as image:
                yield image

    def _kept(self, tokens, counts):
        """-> (how many tokens fit into a row, how many images); an image is never split."""
        starts = np.flatnonzero(tokens == self._image_start)
        tiles, keep = 0, min(len(tokens), self.length)
        for image, (start, count) in enumerate(zip(starts.tolist(), counts)):
            tiles += count
            if tiles > self.tiles or start + count * self.processor.tokens_per_tile + 2 > keep:
                return min(keep, start), image
        return keep, min(len(counts), len(starts))  # a caption is about the first image only

    @property
    def _image_start(self):
        return self.tokenizer.special("<img>")

    def room(self, costs: Costs, max_tiles: int | None = None) -> Room:
        each = self.processor.tokens_per_tile
        text = np.asarray(costs.text, np.int64)
        tiles, tiles_before = costs.tiles(self.tiling(max_tiles))
        first = np.asarray(costs.first, np.int64) + tiles_before * each
        too_late = (text > 0) & ((first > self.length) | (tiles_before > self.tiles))
        unusable = {
            i: f"its first answer starts after {first[i]} tokens and {tiles_before[i]} tiles; "
            f"a row has {self.length} and {self.tiles}"
            for i in np.flatnonzero(too_late).tolist()
        }
        return Room(text + tiles * each, np.minimum(tiles, self.tiles), np.ones_like(text), unusable)

    def index_key(self) -> list:
        return [*super().index_key(), self.upright, self.max_pixels]

    def plan_key(self) -> list:
        return list(dataclasses.astuple(self.processor.tiling))
