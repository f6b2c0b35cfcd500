"""The batch contract: fixed shapes and host-made integer maps, from samples laid side by side in rows.

Letters: B rows, L tokens of a row, M tiles of a row, S tile side, T caption tokens.
"""

import dataclasses

import numpy as np

from hovle_jax.config import DataConfig, RunConfig
from hovle_jax.errors import UserError
from hovle_jax.model.config import EmbeddingConfig

# stage -> the kind of its batches
KINDS = {"pretrain": "text", "contrast": "captions", "distill": "distill", "align": "images", "instruct": "images"}

# What each supervised token of a sample weighs that has x of them; the loss is the weighted mean over the global batch.
WEIGHTINGS = {"token": lambda x: 1.0, "sample": lambda x: 1 / x, "square": lambda x: x**-0.5}


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sequence before batching.

    Attributes:
      tokens: [n] int32, image tokens included.
      supervised: [n] bool; in `distill` the random ids, else the tokens that the model learns to produce.
      tiles: [m, S, S, 3] uint8, in the order of their tokens.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    tiles: np.ndarray


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The static shapes of a batch, and how its samples count.

    Attributes:
      length, tiles: L and M of a row.
      tokens_per_tile: visual tokens of a tile in the short stream.
      expansion: visual tokens in the embedding's stream for one in the short stream (HD: 4, else 1).
      weighting: of `WEIGHTINGS`.
    """

    length: int
    tiles: int
    tile_size: int
    tokens_per_tile: int
    expansion: int
    image_id: int
    weighting: str = "token"

    @classmethod
    def of(cls, data: DataConfig, embedding: EmbeddingConfig, image_id):
        expansion = embedding.stack_tokens_per_tile // embedding.tokens_per_tile
        return cls(
            data.sequence_length, data.tiles, embedding.tile_size, embedding.tokens_per_tile, expansion, image_id,
            data.loss_weights,
        )  # fmt: skip

    @property
    def long_length(self):
        """L of the embedding's stream."""
        return self.length + self.tiles * self.tokens_per_tile * (self.expansion - 1)


def pack_row(samples, shape: BatchShape):
    """Lays samples into one row, each a segment of its own -> dict of arrays without the batch axis.

    Raises:
      UserError: the samples do not fit, or a sample's image tokens and tiles disagree.
    """
    total, tiles = sum(len(s.tokens) for s in samples), sum(len(s.tiles) for s in samples)
    if total > shape.length:
        raise UserError(
            f"{len(samples)} sample(s) of {total} tokens in all do not fit into a row of "
            f"data.sequence_length={shape.length}; set it to at least {total}"
        )
    if tiles > shape.tiles:
        raise UserError(f"{tiles} image tiles do not fit into a row of data.tiles={shape.tiles}; raise it to {tiles}")
    row = _empty_row(shape)
    at = tile_at = 0
    for segment, sample in enumerate(samples, 1):
        n, m = len(sample.tokens), len(sample.tiles)
        is_image = sample.tokens == shape.image_id
        if is_image.sum() != m * shape.tokens_per_tile:
            raise UserError(
                f"a sample has {is_image.sum()} image tokens for {m} tiles of {shape.tokens_per_tile} tokens each"
            )
        here = slice(at, at + n)
        row["tokens"][here] = sample.tokens
        row["positions"][here] = np.arange(n)
        row["segment_ids"][here] = segment
        row["targets"][at : at + n - 1] = sample.tokens[1:]
        row["supervised"][here] = sample.supervised
        row["tiles"][tile_at : tile_at + m] = sample.tiles
        visual = slice(tile_at * shape.tokens_per_tile, (tile_at + m) * shape.tokens_per_tile)
        row["image_positions"][visual] = at + np.flatnonzero(is_image)
        at, tile_at = at + n, tile_at + m
    row["tiles"][tile_at:] = 0
    # A supervised token is predicted from the one before it, never from another segment's.
    same = row["segment_ids"][1:] == row["segment_ids"][:-1]
    counts = row["supervised"][1:] & same
    segments = row["segment_ids"][1:]
    per_segment = np.bincount(segments[counts], minlength=len(samples) + 1).tolist()
    weights = np.asarray([WEIGHTINGS[shape.weighting](x) if x else 0.0 for x in per_segment], np.float32)
    row["loss_weights"][:-1] = np.where(counts, weights[segments], 0)
    row["targets"][row["loss_weights"] == 0] = 0
    return row


def _empty_row(shape):
    L, visual = shape.length, shape.tiles * shape.tokens_per_tile
    row = {name: np.zeros(L, np.int32) for name in ("tokens", "positions", "segment_ids", "targets")}
    row["loss_weights"] = np.zeros(L, np.float32)
    row["supervised"] = np.zeros(L, bool)
    row["tiles"] = np.empty((shape.tiles, shape.tile_size, shape.tile_size, 3), np.uint8)  # filled by the caller
    row["image_positions"] = np.full(visual, L, np.int32)
    return row


def lengthen(row, shape: BatchShape):
    """The maps of HD's longer stream, in which each visual token stands `expansion` times: adds the long_* fields."""
    L, L_long, k = shape.length, shape.long_length, shape.expansion
    is_image = np.zeros(L, bool)
    is_image[row["image_positions"][row["image_positions"] < L]] = True
    used = row["segment_ids"] > 0
    width = np.where(is_image, k, 1) * used
    start = np.cumsum(width) - width  # where each short token begins in the long stream
    tokens, positions, segments = (np.zeros(L_long, np.int32) for _ in range(3))
    source = np.repeat(np.arange(L), width)
    n = len(source)
    tokens[:n], segments[:n] = row["tokens"][source], row["segment_ids"][source]
    positions[:n] = np.arange(n) - start[np.arange(L) - row["positions"]][source]
    image_positions = np.full(len(row["image_positions"]) * k, L_long, np.int32)
    visual = np.flatnonzero(np.isin(source, np.flatnonzero(is_image)))
    image_positions[: len(visual)] = visual
    return row | {
        "long_tokens": tokens,
        "long_positions": positions,
        "long_segment_ids": segments,
        "long_image_positions": image_positions,
        "long_text_positions": np.where(used & ~is_image, start, L_long).astype(np.int32),
    }


LANGUAGE_FIELDS = ("tokens", "positions", "segment_ids", "targets", "loss_weights")
IMAGE_FIELDS = ("tiles", "image_positions")


def finish_row(row, shape: BatchShape, kind):
    """Keeps the fields that a kind of batch has: 'text', 'images' or 'distill'."""
    if shape.expansion > 1 and kind != "text":
        row = lengthen(row, shape)
    long_fields = tuple(name for name in row if name.startswith("long_"))
    if kind == "text":
        return {name: row[name] for name in LANGUAGE_FIELDS}
    if kind == "images":
        return {name: row[name] for name in LANGUAGE_FIELDS + IMAGE_FIELDS + long_fields}
    weights = {
        "image_weights": (row["image_positions"] < shape.length).astype(np.float32),
        "text_weights": row["supervised"].astype(np.float32),
    }
    return {name: row[name] for name in ("tokens", "positions", "segment_ids") + IMAGE_FIELDS + long_fields} | weights


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a batch, and what happened on its way.

    Attributes:
      arrays: the fields of its kind of batch, without the batch axis.
      events: `bad.BadEvent`s of samples that were drawn for it and could not be used, without their step.
      drawn: how many samples were drawn for it.
    """

    arrays: dict
    events: tuple
    drawn: int


@dataclasses.dataclass(frozen=True)
class Found:
    """What a corpus knows about itself before the first row.

    Attributes:
      samples: how many it has.
      bad: `bad.BadEvent`s of those that cannot be used.
      summary: a line for people; empty = nothing to say.
      sources: ((name, samples, tokens) of an epoch, ...), where they are known.
      digest: of the epoch's plan; another one means other data. Empty where there is no plan.
    """

    samples: int
    bad: tuple = ()
    summary: str = ""
    sources: tuple = ()
    digest: str = ""


def make_row(samples, shape: BatchShape, kind):
    """Samples -> the fields of a row of this kind."""
    return finish_row(pack_row(samples, shape), shape, kind)


def caption_row(sample, context, end_id):
    """A captioned image -> {'tiles': [1, S, S, 3], 'tokens': [T]}, the caption padded with the end token."""
    if len(sample.tokens) > context:
        raise UserError(f"a caption has {len(sample.tokens)} tokens and the text tower's context is {context}")
    tokens = np.full(context, end_id, np.int32)
    tokens[: len(sample.tokens)] = sample.tokens
    return {"tiles": sample.tiles, "tokens": tokens}


def stack(rows):
    """Rows as dicts -> a batch."""
    if len(rows) == 1:  # tiles are large: no copy
        return {name: array[None] for name, array in rows[0].items()}
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def empty_row(config: RunConfig):
    """A row of a run's batches in which nothing stands: its fields, shapes and types."""
    if KINDS[config.stage] == "captions":
        size = config.clip.vision.image_size
        nothing = Sample(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros((1, size, size, 3), np.uint8))
        return caption_row(nothing, config.clip.text.context, config.clip.text.end_id)
    return make_row([], BatchShape.of(config.data, config.model.embedding, image_id=-1), KINDS[config.stage])
