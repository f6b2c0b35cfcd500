"""The holistic embedding: patches and text tokens in one sequence, through causal layers, into the LLM's input space.

Dimension letters: B batch, L tokens (short stream), M tiles, P visual tokens of a tile, D width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hovle_jax.model.config import EmbeddingConfig
from hovle_jax.model.dense import dense, partitioned
from hovle_jax.model.execution import Execution
from hovle_jax.model.streams import Stream
from hovle_jax.model.transformer import Stack, TokenTable
from hovle_jax.model.vision import in_block_order, normalized_patches, pixel_shuffle, resize_positions


def scatter_rows(sequence: jax.Array, values: jax.Array, positions: jax.Array) -> jax.Array:
    """Puts values [B, K, D] at positions [B, K] of sequence [B, L, D]; a position of L or more means nowhere."""
    set_row = lambda row, value, at: row.at[at].set(value.astype(row.dtype), mode="drop")
    return jax.vmap(set_row)(sequence, values, positions)


def gather_rows(sequence: jax.Array, positions: jax.Array) -> jax.Array:
    """Takes [B, K, D] from sequence [B, L, D] at positions [B, K]; nowhere (L or more) gives zeros."""
    return jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=0))(sequence, positions)


class PixelShuffleProjection(nn.Module):
    """2x2 tokens -> one: Linear(4D, D), exact GELU, Linear(D, D)."""

    width: int
    execution: Execution

    @nn.compact
    def __call__(self, x):
        """[M, P / 4, 4 D], as `pixel_shuffle` gives it, -> [M, P / 4, D]."""
        y = dense(self.width, ("patch", "embed"), "in", self.execution, use_bias=True)(x)
        return dense(self.width, ("embed", "embed_out"), "out", self.execution, use_bias=True)(
            nn.gelu(y, approximate=False)
        )


class HolisticEmbedding(nn.Module):
    """See the module's docstring; `batch` fields are those of data/batch.py."""

    config: EmbeddingConfig
    execution: Execution

    def setup(self) -> None:
        c, how = self.config, self.execution
        width = c.stack.width
        table_init = partitioned(nn.initializers.normal(width**-0.5), "positions", "embed")
        self.patch_embedding = dense(width, ("patch", "embed"), "patch_embedding", how, use_bias=True)
        self.position_embedding = self.param("position_embedding", table_init, (c.position_grid**2, width))
        # Stored in the public checkpoints and never used: kept so that an export returns what was imported.
        self.class_embedding = self.param("class_embedding", table_init, (1, width))
        self.class_position = self.param("class_position", table_init, (1, width))
        self.text_embedding = TokenTable(c.table_rows, width, how)
        if c.num_special_tokens:
            self.special_embedding = TokenTable(c.num_special_tokens, width, how, axis="special_tokens")
        if c.pixel_shuffle != "none":
            self.pixel_shuffle_projection = PixelShuffleProjection(width, how)
        self.stack = Stack(c.stack, self.execution)

    def embed_text(self, tokens: jax.Array) -> jax.Array:
        """[B, L] ids -> [B, L, D]; ids at and above `vocab_size` are rows of the special table."""
        x = self.text_embedding(tokens)
        if self.config.num_special_tokens:
            special = self.special_embedding(jnp.maximum(tokens - self.config.vocab_size, 0))
            x = jnp.where((tokens >= self.config.vocab_size)[..., None], special, x)
        return x

    def embed_tiles(self, tiles: jax.Array) -> jax.Array:
        """[B, M, S, S, 3] -> [B, M * P, D]: patches with positions, shuffled where the variant says 'pre'.

        The same positions serve every tile; a tile of another size than the table's gets resized positions.
        """
        B, M, S = tiles.shape[:3]
        size, shuffles = self.config.patch_size, self.config.pixel_shuffle == "pre"
        x = self.patch_embedding(normalized_patches(tiles.reshape(B * M, S, S, 3), size, in_blocks=shuffles))
        positions = resize_positions(self.position_embedding, S // size).astype(x.dtype)
        if shuffles:
            positions = in_block_order(positions[None])
            x = self.pixel_shuffle_projection((x + positions).reshape(B * M, -1, 4 * x.shape[-1]))
        else:
            x = x + positions
        return x.reshape(B, -1, x.shape[-1])

    def __call__(self, batch, cache=None):
        """The embedding's output for the short stream, and its cache.

        Without tiles in the batch, text alone. HD (pixel_shuffle='post') runs its layers over the long stream:
        `encode` gives that stream's raw output.

        Returns:
          ([B, L, D] before any normalisation, Cache or None).
        """
        x, cache = self.encode(batch, cache)
        return self.shorten(x, batch), cache

    def encode(self, batch: dict, cache: Any = None) -> tuple[jax.Array, Any]:
        """The raw output of the layers over the stream that they see: [B, L or L_long, D]."""
        stream = self.stream(batch)
        if "tiles" not in batch:
            x = self.embed_text(stream.tokens)
        elif self.config.pixel_shuffle != "post":
            x = scatter_rows(self.embed_text(stream.tokens), self.embed_tiles(batch["tiles"]), stream.image_positions)
        else:  # the short stream has the same text among fewer tokens to look up
            rows = lambda x: self.execution.placement.constrain(x, ("batch", None, None))
            vectors = [rows(self.embed_text(batch["tokens"])), self.embed_tiles(batch["tiles"])]
            vectors = rows(jnp.concatenate(vectors, axis=1))
            positions = jnp.concatenate([batch["long_text_positions"], stream.image_positions], axis=1)
            nothing = jnp.zeros((*stream.tokens.shape, vectors.shape[-1]), vectors.dtype)
            x = scatter_rows(nothing, vectors, positions)
        return self.stack(x, stream.positions, stream.segment_ids, cache)

    def stream(self, batch: dict) -> Stream:
        """The stream of a batch that the layers run over: HD's long one, else the short one."""
        return Stream.of(batch, long=self.config.pixel_shuffle == "post")

    def shorten(self, x: jax.Array, batch: dict) -> jax.Array:
        """HD: image outputs are shuffled and projected, and put back between the text outputs. Else x itself."""
        if self.config.pixel_shuffle != "post":
            return x
        short = gather_rows(x, batch["long_text_positions"])
        if "tiles" not in batch:
            return short
        return scatter_rows(short, self.image_outputs(x, batch), batch["image_positions"])

    def image_outputs(self, x: jax.Array, batch: dict) -> jax.Array:
        """The outputs at image positions as the LLM gets them: [B, M * tokens_per_tile, D], from `encode`'s result."""
        images = gather_rows(x, self.stream(batch).image_positions)
        if self.config.pixel_shuffle != "post":
            return images
        B, M = batch["tiles"].shape[:2]
        images = images.reshape(B * M, -1, images.shape[-1])
        return self.pixel_shuffle_projection(pixel_shuffle(images)).reshape(B, -1, x.shape[-1])

    def for_llm(self, x: jax.Array) -> jax.Array:
        """Optional L2 normalisation, in float32."""
        if not self.config.normalize_output:
            return x
        wide = x.astype(jnp.float32)
        norm = jnp.sqrt(jnp.sum(wide * wide, axis=-1, keepdims=True))
        return (wide / jnp.maximum(norm, 1e-12)).astype(x.dtype)
