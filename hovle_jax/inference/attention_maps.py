"""Where the LLM looks: attention maps of a prompt with images and its answer (paper, figure 5).

The model itself keeps nothing for this. A layer hands its queries and keys to its cache, if it has one; here a `Watch`
takes the cache's place in the layers that are looked at, and the others run as always.

Dimension letters: B batch, L tokens of the padded row, n tokens without padding, H heads, K kv heads, G = H / K,
C head dim, M tiles, A tokens of the answer.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.data.batch import Sample
from hovle_jax.data.images import as_image
from hovle_jax.errors import UserError
from hovle_jax.inference.engine import REACHES, TILES
from hovle_jax.inference.generate import Answerer, Prompt, prompt_batch
from hovle_jax.inference.limits import check_lengths
from hovle_jax.model.attention import AttentionMask, prepare
from hovle_jax.model.hovle import HoVLE
from hovle_jax.model.rotary import needs_lengths, rotary_angles, text_lengths
from hovle_jax.model.transformer import DecoderLayer


@dataclasses.dataclass(frozen=True)
class Cut:
    """How an image lies in the tiles: so many of them, in a grid of so many columns; `thumbnail`: the last is the whole
    image."""

    tiles: int
    columns: int
    thumbnail: bool

    @classmethod
    def of(cls, size: tuple[int, int], tiles: int, thumbnail: bool) -> "Cut":
        """Of an image of (width, height): of the grids with as many tiles, the one that is nearest to its ratio.

        Args:
          thumbnail: whether one follows a grid of more than one tile.
        """
        thumbnail = thumbnail and tiles > 1
        cells, ratio = tiles - thumbnail, size[0] / size[1]
        columns = (c for c in range(1, cells + 1) if cells % c == 0)
        return cls(tiles, min(columns, key=lambda c: abs(ratio - c * c / cells)), thumbnail)


@dataclasses.dataclass(frozen=True)
class AttentionMaps:
    """What tokens attend to in some layers of the LLM.

    Attributes:
      layers: which ones, counted from 0.
      num_layers: how many the LLM has.
      weights: [layers, n, n] float32: how much each token (row) takes from each (column), the mean over the heads. A
        row sums to 1.
      is_image: [n] bool: visual tokens.
      answer: the place of the answer's first token.
      texts: [n] what each token says, for display.
      tiles: [M, S, S, 3] uint8, which the visual tokens fill in order.
      images: whose tiles they are.
    """

    layers: tuple[int, ...]
    num_layers: int
    weights: np.ndarray
    is_image: np.ndarray
    answer: int
    texts: tuple[str, ...]
    tiles: np.ndarray
    images: tuple["Cut", ...]

    @property
    def text_after_images(self) -> slice:
        """The tokens after the last visual one, which can see all images."""
        return slice(int(np.flatnonzero(self.is_image)[-1]) + 1, len(self.is_image))

    @property
    def text_to_image(self) -> np.ndarray:
        """[layers, T, visual tokens] float32: what the text after the images takes from them."""
        return self.weights[:, self.text_after_images][:, :, self.is_image]

    @property
    def of_answer(self) -> np.ndarray:
        """[layers, A, M, g, g] float32: what a tile of g x g visual tokens gave to each token of the answer.

        A token is made at the place before it, so these are the rows from the prompt's last token on.
        """
        rows = self.weights[:, self.answer - 1 : -1][:, :, self.is_image]
        side = math.isqrt(int(self.is_image.sum()) // len(self.tiles))
        return rows.reshape(*rows.shape[:2], len(self.tiles), side, side)

    @property
    def image_share(self) -> np.ndarray:
        """[layers]: the part of its attention that text after the images gives to visual tokens, the mean."""
        return self.text_to_image.sum(-1).mean(-1)

    @property
    def sparsity(self) -> np.ndarray:
        """[layers]: see `sparsity`, of `text_to_image`."""
        return np.asarray([sparsity(rows) for rows in self.text_to_image])


def sparsity(rows: np.ndarray) -> float:
    """How unevenly rows of weights are spread, from 0 (all equal) to 1 (all on one): the mean over the rows.

    Of a row x of N weights, (sqrt(N) - |x|_1 / |x|_2) / (sqrt(N) - 1), which its scale does not change (P. Hoyer,
    "Non-negative matrix factorization with sparseness constraints", 2004). A row of zeros counts as 0.

    Args:
      rows: [T, N], not below 0, N at least 2.
    """
    rows = np.asarray(rows, np.float64)
    root, norm = math.sqrt(rows.shape[1]), np.linalg.norm(rows, axis=1)
    ratio = np.divide(rows.sum(1), norm, out=np.full(len(rows), root), where=norm > 0)
    return float(((root - ratio) / (root - 1)).mean())


def usual_layers(num_layers: int) -> tuple[int, ...]:
    """The first, the middle and the last layer, counted from 0."""
    return tuple(dict.fromkeys((0, num_layers // 2, num_layers - 1)))


@dataclasses.dataclass(frozen=True)
class Passage:
    """A prompt with its answer, ready to be looked at.

    Attributes:
      sample: up to the end of the answer.
      answer: the place of the answer's first token.
      images: how each became tiles.
      layers: of the LLM, counted from 0.
    """

    sample: Sample
    answer: int
    images: tuple[Cut, ...]
    layers: tuple[int, ...]


def attention_maps(
    answerer: Answerer, prompt: Prompt, answer: str, layers: Sequence[int] | None = None
) -> AttentionMaps:
    """The maps of a prompt and its answer, from one forward pass over both; see `passage`."""
    return watch(answerer, passage(answerer, prompt, answer, layers))


def passage(answerer: Answerer, prompt: Prompt, answer: str, layers: Sequence[int] | None = None) -> Passage:
    """The host's part of `attention_maps`: tokens and tiles.

    Args:
      layers: of the LLM, counted from 0; None = `usual_layers`.
    Raises:
      UserError: no image, no answer, marks and images disagree, a layer that is not there, or a text that is too long.
    """
    layers = check_layers(answerer.hovle, layers)
    if not prompt.images:
        raise UserError("attention maps show what a text takes from its images: give at least one image")
    if not answer.strip():
        raise UserError("the answer is empty, so there is no token of it that looks anywhere")
    sample, start, images = _answered(answerer.processor, prompt, answer)
    check_lengths(answerer.hovle.config.llm, start, len(sample.tokens) - start, len(sample.tiles))
    return Passage(sample, start, images, layers)


def watch(answerer: Answerer, passage: Passage) -> AttentionMaps:
    """The devices' part of `attention_maps`: one forward pass, up to the last layer that is looked at."""
    sample, hovle = passage.sample, answerer.hovle
    n, tiles = len(sample.tokens), len(sample.tiles)
    # Few shapes, as each is a program of its own.
    batch = prompt_batch(answerer, [sample], _next(REACHES, n), _next(TILES, tiles))
    weights = np.asarray(_watched(answerer.params, batch, hovle=hovle, layers=passage.layers))[:, :n, :n]
    return AttentionMaps(
        passage.layers,
        hovle.config.llm.stack.num_layers,
        weights,
        sample.tokens == answerer.tokenizer.image_id,
        passage.answer,
        _texts(answerer.tokenizer, sample),
        sample.tiles,
        passage.images,
    )


def check_layers(hovle: HoVLE, layers: Sequence[int] | None = None) -> tuple[int, ...]:
    """The layers to look at, counted from 0, without repetitions; None = `usual_layers`.

    Raises:
      UserError: one that is not there, or a model that sees no images.
    """
    if hovle.config.embedding is None:
        raise UserError("this model is an LLM alone and sees no images, so it has no attention to them")
    count = hovle.config.llm.stack.num_layers
    layers = usual_layers(count) if layers is None else tuple(dict.fromkeys(layers))
    absent = [layer for layer in layers if not 0 <= layer < count]
    if absent:
        raise UserError(f"there is no layer {absent[0] + 1}: the LLM has layers 1 to {count}")
    return layers


def _answered(processor, prompt, answer):
    """-> (the sample up to the end of the answer, the place of the answer's first token, a Cut of each image)."""
    images = [as_image(image) for image in prompt.images]
    cut = processor.cut(images, max_tiles=prompt.max_tiles)
    turns = (*prompt.turns[:-1], (prompt.turns[-1][0], answer))
    encoded = processor.encode(turns, tuple(map(len, cut)), prompt.system)
    marked = np.flatnonzero(encoded.supervised)
    start = int(marked[np.flatnonzero(np.diff(marked, prepend=-2) > 1)[-1]])  # of the last run: earlier turns have some
    stops = np.flatnonzero(np.isin(encoded.tokens[start:], processor.tokenizer.stop_ids))
    end = min([int(marked[-1]) + 1, *(start + stops[:1]).tolist()])
    sample = Sample(encoded.tokens[:end], encoded.supervised[:end], processor.joined(cut))
    thumbnail = processor.tiling.thumbnail
    return sample, start, tuple(Cut.of(x.size, len(tiles), thumbnail) for x, tiles in zip(images, cut))


def _next(sizes, count):
    return next((size for size in sizes if size >= count), count)


def _texts(tokenizer, sample):
    pieces = tokenizer.pieces(sample.tokens)
    is_image = sample.tokens == tokenizer.image_id
    return tuple(
        piece if visual else tokenizer.decode([token]) or piece
        for piece, token, visual in zip(pieces, sample.tokens, is_image)
    )


# ---------------------------------------------------------------------------------------------------------------------
# On the devices


@flax.struct.dataclass
class Watch:
    """Takes a cache's place in a layer (see `transformer.LayerCache`): no key is kept, but who attended to whom.

    Attributes:
      weights: [B, L, S] float32, the mean over the heads; None before.
    """

    weights: Any = None

    def attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, where: jax.Array, execution: Any
    ) -> tuple[jax.Array, "Watch"]:
        """Plain softmax attention; `where` is a dense mask [B, L, S]."""
        B, L, H, C = query.shape
        query = query.reshape(B, L, key.shape[2], -1, C)  # [B, L, K, G, C]
        scores = jnp.einsum("blkgc,bskc->bkgls", query, key, preferred_element_type=jnp.float32) * C**-0.5
        scores = jnp.where(where[:, None, None], scores, jnp.finfo(jnp.float32).min)
        probabilities = jax.nn.softmax(scores, axis=-1)
        out = jnp.einsum("bkgls,bskc->blkgc", probabilities.astype(value.dtype), value)
        return out.reshape(B, L, H, C), Watch(probabilities.mean((1, 2)))


@functools.partial(jax.jit, static_argnames=("hovle", "layers"))
def _watched(params: dict, batch: dict, *, hovle: HoVLE, layers: tuple[int, ...]) -> jax.Array:
    """[layers, L, L] float32 of the batch's one row."""
    embedding = hovle.embedding.bind({"params": params["embedding"]})
    x, _ = embedding(batch)
    return _llm_weights(params["llm"]["stack"]["layers"], embedding.for_llm(x), batch, hovle, layers)


def _llm_weights(stacked, x, batch, hovle, layers):
    """The layers of the LLM over x [1, L, D], as `transformer.Stack` runs them, up to the last that is looked at."""
    config, execution = hovle.config.llm.stack, dataclasses.replace(hovle.execution, attention="xla")
    positions, segments = batch["positions"], batch["segment_ids"]
    lengths = text_lengths(positions, segments) if needs_lengths(config, x.shape[1]) else None
    angles = rotary_angles(positions, config, lengths)
    mask = prepare(AttentionMask.for_rows(segments), execution.attention, config.head_dim)
    layer, seen, x = DecoderLayer(config, execution), {}, x.astype(execution.dtype)
    watch: Any
    for index in range(max(layers) + 1):
        params = jax.tree.map(lambda leaf, index=index: leaf[index], stacked)
        watch = Watch() if index in layers else None
        x, watch = layer.apply({"params": params}, x, watch, angles, mask)
        if watch is not None:
            seen[index] = watch.weights[0]
    return jnp.stack([seen[index] for index in layers])
