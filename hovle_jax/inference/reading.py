"""How a prompt is read: index maps of both streams, in chunks of a few lengths so that few programs are compiled."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from hovle_jax.data.batch import BatchShape, Sample, pack_row
from hovle_jax.inference.slots import NOWHERE, Chunk


@dataclasses.dataclass(frozen=True)
class Reading:
    """A prompt as the two stacks read it: n tokens of the LLM's stream and m of the embedding's.

    Attributes:
      tokens: [n] int32.
      long_tokens: [m] int32: HD has more visual tokens here; other variants have the same.
      visual: [m] int32: the visual vector in a place of the embedding's stream; `NOWHERE` for text.
      short_visual: [n] int32: HD: that of the LLM's stream. Other variants: `NOWHERE`, as all comes from the layers.
      source: [n] int32: the place of the embedding's stream that a token of the LLM's comes from.
      tiles: [M, S, S, 3] uint8.
      identity: [n] int64: equal where two prompts read the same: an id, or a hash of the tile and the place in it.
    """

    tokens: np.ndarray
    long_tokens: np.ndarray
    visual: np.ndarray
    short_visual: np.ndarray
    source: np.ndarray
    tiles: np.ndarray
    identity: np.ndarray

    @classmethod
    def of_text(cls, tokens: np.ndarray) -> "Reading":
        """Text for an LLM alone."""
        nowhere = np.full(len(tokens), NOWHERE, np.int32)
        place = np.arange(len(tokens), dtype=np.int32)
        tiles = np.zeros((0, 1, 1, 3), np.uint8)
        return cls(tokens, tokens, nowhere, nowhere, place, tiles, tokens.astype(np.int64))

    @classmethod
    def of(cls, sample: Sample, shape: BatchShape) -> "Reading":
        """A sample; `shape` is that of a row which it just fills."""
        row = pack_row([sample], shape)
        stream = row.short if row.long is None else row.long
        visual = np.full(len(stream.tokens), NOWHERE, np.int32)
        visual[stream.image_positions] = np.arange(len(stream.image_positions))
        short_visual = np.full(len(sample.tokens), NOWHERE, np.int32)
        place = np.arange(len(sample.tokens), dtype=np.int32)
        if row.long is not None:
            short_visual[row.short.image_positions] = np.arange(len(row.short.image_positions))
            begins = stream.image_positions[:: shape.expansion]
            place = row.long_text_positions.copy()
            place[row.short.image_positions] = begins
        return cls(
            sample.tokens, stream.tokens, visual, short_visual, place, sample.tiles, _identity(sample, row, shape)
        )

    @property
    def length(self) -> int:
        """n."""
        return len(self.tokens)

    @property
    def long_length(self) -> int:
        """m."""
        return len(self.long_tokens)

    def tile_starts(self, tokens_per_tile: int) -> np.ndarray:
        """[M] int32: where each tile begins in the embedding's stream."""
        return np.flatnonzero(self.visual >= 0)[::tokens_per_tile].astype(np.int32)

    def shared(self, identity: np.ndarray, tokens_per_tile: int) -> int:
        """How many of the first tokens need not be read again after a request whose tokens were `identity`.

        The last one is read in any case, for its logits; of a tile all or nothing.
        """
        most = min(len(identity), self.length - 1)
        differs = np.flatnonzero(identity[:most] != self.identity[:most])
        count = int(differs[0]) if len(differs) else most
        is_image = self.identity < 0
        if count and is_image[count] and is_image[count - 1]:
            first = int(np.flatnonzero(~is_image[:count])[-1]) + 1 if not is_image[:count].all() else 0
            count = first + (count - first) // tokens_per_tile * tokens_per_tile
        return count

    def long_place(self, count: int) -> int:
        """How many tokens of the embedding's stream come before token `count` of the LLM's."""
        return int(self.source[count]) if count < self.length else self.long_length

    def embedding_chunks(self, start: int, sizes: Sequence[int]) -> Iterator[tuple[int, Chunk]]:
        """(the first visual vector, chunk) of the embedding's stream from a place on."""
        for at, size, count in _cuts(start, self.long_length, sizes):
            first, visual = _relative(self.visual[at : at + count])
            yield first, _chunk(self.long_tokens, visual, None, at, size, count, self.long_length)

    def llm_chunks(self, start: int, sizes: Sequence[int]) -> Iterator[tuple[int, Chunk]]:
        """(the first visual vector, chunk) of the LLM's stream from a place on."""
        for at, size, count in _cuts(start, self.length, sizes):
            first, visual = _relative(self.short_visual[at : at + count])
            yield first, _chunk(self.tokens, visual, self.source, at, size, count, self.length)


def _identity(sample, row, shape):
    identity = sample.tokens.astype(np.int64)
    places = row.short.image_positions.reshape(len(sample.tiles), shape.tokens_per_tile)
    for tile, at in zip(sample.tiles, places):
        digest = int.from_bytes(hashlib.sha256(tile.tobytes()).digest()[:6], "little")
        identity[at] = -1 - (digest * 4096 + np.arange(len(at)))
    return identity


def _cuts(start, end, sizes):
    """(begin, padded size, tokens) of chunks: of the largest size, and for the rest the smallest that holds it."""
    while start < end:
        count = min(end - start, sizes[-1])
        yield start, next(size for size in sizes if size >= count), count
        start += count


def _relative(visual):
    """-> (the first visual vector of a chunk, the places counted from it)."""
    if (visual < 0).all():
        return NOWHERE, visual
    first = int(visual[visual >= 0].min())
    return first, np.where(visual >= 0, visual - first, NOWHERE).astype(np.int32)


def _chunk(tokens, visual, source, at, size, count, length):
    padded = lambda values, filler=0: np.pad(values, (0, size - count), constant_values=filler)
    text = np.zeros(0, np.int32) if source is None else padded(source[at : at + count])
    return Chunk(padded(tokens[at : at + count]), padded(visual, NOWHERE), text, np.int32(count), np.int32(length))
