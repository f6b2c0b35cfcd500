"""The batch contract: fixed shapes, and integer maps that the host computes, for samples packed side by side into rows.

| field | shape, type | meaning |
|---|---|---|
| tokens, positions, segment_ids | [B, L] int32 | packed sequences; segment 0 is padding; positions begin anew in each |
| targets, loss_weights | [B, L] int32, float32 | the next token, and its weight in the loss; 0 = not supervised |
| tiles | [B, M, S, S, 3] uint8 | tiles of the images; unused ones are zero |
| image_positions | [B, M * P] int32 | where each visual token stands in the sequence; L = nowhere |
| long_tokens, long_positions, long_segment_ids, long_image_positions | [B, L_long] ... | HD: the embedding's stream |
| long_text_positions | [B, L] int32 | HD: where each text token of the short stream stands in the long one |
| image_weights, text_weights | [B, M * P], [B, L] float32 | distillation: the positions that count |

Letters: B rows, L tokens of a row, M tiles of a row, S side of a tile, P visual tokens of a tile, T caption tokens.
The kind of batch says which of these fields it has (data/kinds).
"""

import dataclasses

import numpy as np

from hovle_jax.config import DataConfig
from hovle_jax.errors import UserError
from hovle_jax.model.config import EmbeddingConfig
from hovle_jax.model.streams import Stream

HELD_OUT_SEED = 0  # for what is drawn for held-out samples: the same in all runs, so that their losses compare

# Weight of each supervised token of a sample that has x of them; the loss is the weighted mean over the global batch.
WEIGHTINGS = {"token": lambda x: 1.0, "sample": lambda x: 1 / x, "square": lambda x: x**-0.5}


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sequence before batching.

    Attributes:
      tokens: [n] int32, image tokens included.
      supervised: [n] bool: the tokens that the model learns to produce; in distillation, the random ids.
      tiles: [m, S, S, 3] uint8, in the order of their tokens.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    tiles: np.ndarray


def no_tiles(size: int = 1) -> np.ndarray:
    """The tiles of a sample without images, an empty array; it concatenates with tiles of any size."""
    return np.zeros((0, size, size, 3), np.uint8)


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The static shapes of a batch, and how its samples are weighted.

    Attributes:
      length, tiles: L and M.
      tokens_per_tile: visual tokens of a tile in the short stream.
      expansion: how many visual tokens the embedding's stream has for each in the short stream (HD: 4, else 1).
      weighting: a key of `WEIGHTINGS`.
    """

    length: int
    tiles: int
    tile_size: int
    tokens_per_tile: int
    expansion: int
    image_id: int
    weighting: str = "token"

    @classmethod
    def of(cls, data: DataConfig, embedding: EmbeddingConfig, image_id: int) -> "BatchShape":
        expansion = embedding.stack_tokens_per_tile // embedding.tokens_per_tile
        return cls(
            data.sequence_length, data.tiles, embedding.tile_size, embedding.tokens_per_tile, expansion, image_id,
            data.loss_weights,
        )  # fmt: skip

    @property
    def long_length(self) -> int:
        """L of the embedding's stream."""
        return self.length + self.tiles * self.tokens_per_tile * (self.expansion - 1)


@dataclasses.dataclass(frozen=True)
class PackedRow:
    """Samples side by side in one row, each a segment of its own; no batch axis.

    Attributes:
      short: the stream that the LLM reads.
      targets, loss_weights: [L], see the table above.
      supervised: [L] bool, copied from the samples.
      tiles: [M, S, S, 3] uint8.
      long: HD: the stream of the embedding's layers; else None.
      long_text_positions: HD: [L] where each text token of `short` stands in `long`; else None.
    """

    short: Stream
    targets: np.ndarray
    loss_weights: np.ndarray
    supervised: np.ndarray
    tiles: np.ndarray
    long: Stream | None = None
    long_text_positions: np.ndarray | None = None

    def text_fields(self) -> dict:
        """The fields of text without images."""
        return dataclasses.replace(self.short, image_positions=None).fields()

    def image_fields(self) -> dict:
        """The fields of text with images: tokens, tiles, and their positions."""
        fields = self.short.fields() | {"tiles": self.tiles}
        if self.long is None:
            return fields
        return fields | self.long.fields(long=True) | {"long_text_positions": self.long_text_positions}

    def target_fields(self) -> dict:
        """The fields of the next-token loss."""
        return {"targets": self.targets, "loss_weights": self.loss_weights}


def pack_row(samples: list[Sample], shape: BatchShape) -> PackedRow:
    """Packs samples into one row.

    Raises:
      UserError: the samples do not fit, or a sample's image tokens and tiles disagree.
    """
    _check_room(samples, shape)
    row = _empty_row(shape)
    stream, at, tile_at = row.short, 0, 0
    for segment, sample in enumerate(samples, 1):
        n, m = len(sample.tokens), len(sample.tiles)
        is_image = sample.tokens == shape.image_id
        if is_image.sum() != m * shape.tokens_per_tile:
            raise UserError(
                f"a sample has {is_image.sum()} image tokens for {m} tiles of {shape.tokens_per_tile} tokens each"
            )
        here = slice(at, at + n)
        stream.tokens[here] = sample.tokens
        stream.positions[here] = np.arange(n)
        stream.segment_ids[here] = segment
        row.targets[at : at + n - 1] = sample.tokens[1:]
        row.supervised[here] = sample.supervised
        row.tiles[tile_at : tile_at + m] = sample.tiles
        visual = slice(tile_at * shape.tokens_per_tile, (tile_at + m) * shape.tokens_per_tile)
        stream.image_positions[visual] = at + np.flatnonzero(is_image)
        at, tile_at = at + n, tile_at + m
    row.tiles[tile_at:] = 0
    _weigh(row, len(samples), shape.weighting)
    return lengthen(row, shape) if shape.expansion > 1 else row


def _check_room(samples, shape):
    total, tiles = sum(len(s.tokens) for s in samples), sum(len(s.tiles) for s in samples)
    if total > shape.length:
        raise UserError(
            f"{len(samples)} sample(s) of {total} tokens in all do not fit into a row of "
            f"data.sequence_length={shape.length}; set it to at least {total}"
        )
    if tiles > shape.tiles:
        raise UserError(f"{tiles} image tiles do not fit into a row of data.tiles={shape.tiles}; raise it to {tiles}")


def _empty_row(shape):
    L, visual = shape.length, shape.tiles * shape.tokens_per_tile
    zeros = lambda: np.zeros(L, np.int32)
    return PackedRow(
        short=Stream(zeros(), zeros(), zeros(), np.full(visual, L, np.int32)),
        targets=zeros(),
        loss_weights=np.zeros(L, np.float32),
        supervised=np.zeros(L, bool),
        tiles=np.empty((shape.tiles, shape.tile_size, shape.tile_size, 3), np.uint8),  # filled by the caller
    )


def _weigh(row, samples, weighting):
    """Fills in the loss weights: a token is predicted from the one before it, never across segments."""
    segments = row.short.segment_ids[1:]
    counts = row.supervised[1:] & (segments == row.short.segment_ids[:-1])
    per_segment = np.bincount(segments[counts], minlength=samples + 1).tolist()
    weights = np.asarray([WEIGHTINGS[weighting](x) if x else 0.0 for x in per_segment], np.float32)
    row.loss_weights[:-1] = np.where(counts, weights[segments], 0)
    row.targets[row.loss_weights == 0] = 0


def lengthen(row: PackedRow, shape: BatchShape) -> PackedRow:
    """Adds HD's long stream, in which each visual token is repeated `expansion` times.

    With an expansion of 4 (T text, I visual, . padding):

        short             T  I  T  .          its positions   0 1 2 0
        long              T  I  I  I  I  T  . ...             0 1 2 3 4 5 0 ...
        long_text_positions  0  L_long  5  L_long             (L_long = nowhere: not text)
    """
    L, L_long, k, short = shape.length, shape.long_length, shape.expansion, row.short
    is_image = np.zeros(L, bool)
    is_image[short.image_positions[short.image_positions < L]] = True
    used = short.segment_ids > 0
    width = np.where(is_image, k, 1) * used
    start = np.cumsum(width) - width  # where each short token begins in the long stream
    tokens, positions, segments = (np.zeros(L_long, np.int32) for _ in range(3))
    source = np.repeat(np.arange(L), width)  # the short token that each long one comes from
    n = len(source)
    tokens[:n], segments[:n] = short.tokens[source], short.segment_ids[source]
    positions[:n] = np.arange(n) - start[np.arange(L) - short.positions][source]
    image_positions = np.full(len(short.image_positions) * k, L_long, np.int32)
    visual = np.flatnonzero(is_image[source])
    image_positions[: len(visual)] = visual
    return dataclasses.replace(
        row,
        long=Stream(tokens, positions, segments, image_positions),
        long_text_positions=np.where(used & ~is_image, start, L_long).astype(np.int32),
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a batch, and what happened while it was made.

    Attributes:
      arrays: the fields of its kind of batch, without the batch axis.
      events: a BadEvent, still without its step, for each sample that was drawn for it and could not be used.
      drawn: how many samples were drawn for it.
    """

    arrays: dict
    events: tuple
    drawn: int


@dataclasses.dataclass(frozen=True)
class CorpusSummary:
    """What is known of a corpus before its first row is made.

    Attributes:
      samples: how many it has.
      bad: a BadEvent for each that cannot be used.
      text: a line for people; empty = nothing to say.
      sources: ((name, samples, tokens) of an epoch, ...), where they are known.
      digest: a hash of the epoch's plan, which differs where the data differs; empty if there is no plan.
    """

    samples: int
    bad: tuple = ()
    text: str = ""
    sources: tuple = ()
    digest: str = ""


def stack(rows: list[dict]) -> dict:
    """Rows -> a batch, both as dicts of arrays."""
    if len(rows) == 1:  # no copy: tiles are large
        return {name: array[None] for name, array in rows[0].items()}
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
