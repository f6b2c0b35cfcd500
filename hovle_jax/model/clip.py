"""CLIP: an image tower and a text tower that meet in one normalised space (Radford et al. 2021).

Dimension letters: N images or texts, T text tokens, D width, E projection width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from hovle_jax.model.attention import AttentionMask
from hovle_jax.model.config import CLIPConfig, TextTowerConfig
from hovle_jax.model.execution import Execution
from hovle_jax.model.transformer import TokenTable, dense, partitioned
from hovle_jax.model.vit import LayerNorm, VisionTransformer, run_encoder

MAX_LOG_SCALE = 4.605170185988092  # ln 100: the logit scale is clamped to it after each step


class TextTower(nn.Module):
    """A causal transformer over text, read at the first end token."""

    config: TextTowerConfig
    execution: Execution

    @nn.compact
    def __call__(self, tokens):
        """[N, T] ids that contain `end_id` -> the final-norm state [N, D] at the first end token."""
        c = self.config
        T = tokens.shape[1]
        init = partitioned(nn.initializers.normal(c.width**-0.5), "positions", "embed")
        positions = self.param("position_embedding", init, (c.context, c.width))
        x = TokenTable(c.vocab_size, c.width, self.execution, name="token_embedding")(tokens)
        x = x + positions[:T].astype(x.dtype)
        allowed = AttentionMask.for_rows(jnp.ones_like(tokens)).dense()
        x = run_encoder(c, c.num_layers, self.execution, x, allowed, norm="layer_norm")
        x = LayerNorm(c.norm_eps, name="final_norm")(x)
        end = jnp.argmax(tokens == c.end_id, axis=1)
        return jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]


class CLIP(nn.Module):
    """Both towers, their projections, the learned temperature and, of a sigmoid loss, the bias of its scores."""

    config: CLIPConfig
    execution: Execution

    def setup(self) -> None:
        c, how = self.config, self.execution
        self.vision = VisionTransformer(c.vision, self.execution)
        self.text = TextTower(c.text, self.execution)
        self.vision_projection = dense(c.projection_width, ("embed", "embed_out"), "vision_projection", how)
        self.text_projection = dense(c.projection_width, ("embed", "embed_out"), "text_projection", how)
        start = c.sigmoid_scale_init if c.has_bias else c.logit_scale_init
        self.log_scale = self.param("log_scale", nn.initializers.constant(start), ())
        if c.has_bias:
            self.logit_bias = self.param("logit_bias", nn.initializers.constant(c.sigmoid_bias_init), ())

    def encode_images(self, tiles: jax.Array, patches: jax.Array | None = None) -> jax.Array:
        """[N, S, S, 3] -> unit vectors [N, E], float32; of the patches [N, kept] alone, where they are given."""
        return normalize(self.vision_projection(self.vision(tiles, patches)[1]))

    def encode_texts(self, tokens: jax.Array) -> jax.Array:
        """[N, T] -> unit vectors [N, E], float32."""
        return normalize(self.text_projection(self.text(tokens)))

    def __call__(self, tiles, tokens, patches=None):
        """-> (image vectors [N, E], text vectors [N, E])."""
        return self.encode_images(tiles, patches), self.encode_texts(tokens)


def normalize(x: jax.Array) -> jax.Array:
    """L2-normalises the last axis in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
