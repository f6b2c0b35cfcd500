"""CLIP and SigLIP: an image tower and a text tower that meet in one normalised space.

Radford et al. 2021; Zhai et al. 2023, whose text tower is bidirectional and whose logits have a bias.

Dimension letters: N images or texts, T text tokens, D width, E projection width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hovle_jax.model.attention import AttentionMask
from hovle_jax.model.clip_config import CLIPConfig, ResNetConfig, TextTowerConfig
from hovle_jax.model.dense import dense, partitioned
from hovle_jax.model.execution import Execution
from hovle_jax.model.resnet import ModifiedResNet
from hovle_jax.model.transformer import TokenTable
from hovle_jax.model.vit import LayerNorm, VisionTransformer, run_encoder, token_of

MAX_LOG_SCALE = 4.605170185988092  # ln 100: the logit scale is clamped to it after each step


class TextTower(nn.Module):
    """A transformer over text, read at one of its positions.

    Attributes:
      num_layers: how many of the config's layers to run; None = all.
      with_norm: whether the final norm exists.
    """

    config: TextTowerConfig
    execution: Execution
    num_layers: int | None = None
    with_norm: bool = True

    @nn.compact
    def __call__(self, tokens, mask=None, whole=True):
        """The states of texts.

        Args:
          tokens: [N, T] ids.
          mask: [N, T], 1 for what may be seen, 0 for padding; None = all. A row's first token may be seen.
          whole: static; without it the second result alone is made, in less time.
        Returns:
          (the final-norm states [N, T, D], those [N, D] at the positions that `config.pooling` names).
        """
        c = self.config
        T = tokens.shape[1]
        init = partitioned(nn.initializers.normal(c.width**-0.5), "positions", "embed")
        positions = self.param("position_embedding", init, (c.context, c.width))
        x = TokenTable(c.vocab_size, c.width, self.execution, name="token_embedding")(tokens)
        x = x + positions[:T].astype(x.dtype)
        num_layers = c.num_layers if self.num_layers is None else self.num_layers
        options: dict[str, Any] = dict(norm="layer_norm", layer_scale=c.layer_scale)
        at = read_at(c, tokens)
        x = run_encoder(self, c, num_layers, x, allowed(c, tokens, mask), None if whole else at, **options)
        if self.with_norm:
            x = LayerNorm(c.norm_eps, name="final_norm")(x)
        return x, token_of(x, at)[:, 0] if whole else x[:, 0]


def allowed(config: TextTowerConfig, tokens: jax.Array, mask: jax.Array | None) -> jax.Array | None:
    """Who may look at whom, [N, T, T] bool; None = everyone at everyone."""
    if mask is None and not config.causal:
        return None
    pairs = AttentionMask.for_rows(jnp.ones_like(tokens), config.causal).dense()
    return pairs if mask is None else pairs & mask.astype(bool)[:, None, :]


def read_at(config: TextTowerConfig, tokens: jax.Array) -> jax.Array:
    """[N, T] ids -> the position [N] at which a text is read."""
    if config.pooling == "end":
        return jnp.argmax(tokens == config.end_id, axis=1)
    if config.pooling == "highest":
        return jnp.argmax(tokens, axis=1)
    return jnp.full(len(tokens), tokens.shape[1] - 1 if config.pooling == "last" else 0)


class CLIP(nn.Module):
    """Both towers, their projections, the learned temperature and, of a sigmoid loss, the bias of its scores."""

    config: CLIPConfig
    execution: Execution

    def setup(self) -> None:
        c = self.config
        self.vision = image_tower(c, self.execution)
        self.text = TextTower(c.text, self.execution)
        # A ResNet projects where it pools.
        has_own = isinstance(c.vision, ResNetConfig)
        self.vision_projection = self.projection("none" if has_own else c.vision_projection, "vision_projection")
        self.text_projection = self.projection(c.text_projection, "text_projection")
        start = c.sigmoid_scale_init if c.has_bias else c.logit_scale_init
        self.log_scale = self.param("log_scale", nn.initializers.constant(start), ())
        if c.has_bias:
            self.logit_bias = self.param("logit_bias", nn.initializers.constant(c.logit_bias_init), ())

    def projection(self, kind: str, name: str) -> Any:
        """A tower's way into the common space."""
        if kind == "none":
            return lambda x: x
        axes = ("embed", "embed_out")
        return dense(self.config.projection_width, axes, name, self.execution, use_bias=kind == "bias")

    def image_states(
        self, tiles: jax.Array, patches: jax.Array | None = None, whole: bool = True, of_batch: bool = False
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[N, S, S, 3] -> the image tower's (hidden, pooled, projected [N, E]).

        Args:
          patches: [N, kept], those that the tower sees; None = all.
          whole: make `hidden`; without it what else is there takes less time.
          of_batch: a ResNet normalises by the batch's own statistics.
        """
        is_resnet = isinstance(self.config.vision, ResNetConfig)
        options = {"of_batch": of_batch} if is_resnet else {"kept": patches, "whole": whole}
        hidden, pooled = self.vision(tiles, **options)
        return hidden, pooled, self.vision_projection(pooled)

    def text_states(
        self, tokens: jax.Array, mask: jax.Array | None = None, whole: bool = True
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[N, T] -> the text tower's (hidden, pooled, projected [N, E]); whole: see `image_states`."""
        hidden, pooled = self.text(tokens, mask, whole)
        return hidden, pooled, self.text_projection(pooled)

    def project_images(self, pooled: jax.Array) -> jax.Array:
        """What the image tower has pooled, [N, D] -> unit vectors [N, E], float32."""
        return normalize(self.vision_projection(pooled))

    def encode_images(self, tiles: jax.Array, patches: jax.Array | None = None, of_batch: bool = False) -> jax.Array:
        """[N, S, S, 3] -> unit vectors [N, E], float32; patches, of_batch: see `image_states`."""
        return normalize(self.image_states(tiles, patches, False, of_batch)[2])

    def encode_texts(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """[N, T] -> unit vectors [N, E], float32."""
        return normalize(self.text_states(tokens, mask, whole=False)[2])

    def logits(self, images: jax.Array, texts: jax.Array) -> jax.Array:
        """Unit vectors [N, E] and [K, E] -> exp(log_scale) * cosines + bias, [N, K], float32."""
        logits = jnp.exp(self.log_scale) * jnp.einsum("ne,ke->nk", images, texts)
        return logits + self.logit_bias if self.config.has_bias else logits

    def __call__(self, tiles, tokens, patches=None, of_batch=False):
        """-> (image vectors [N, E], text vectors [N, E])."""
        return self.encode_images(tiles, patches, of_batch), self.encode_texts(tokens)


def image_tower(config: CLIPConfig, execution: Execution) -> Any:
    """The module that makes (hidden, pooled) of images."""
    if isinstance(config.vision, ResNetConfig):
        return ModifiedResNet(config.vision, config.projection_width, execution)
    return VisionTransformer(config.vision, execution)


def normalize(x: jax.Array) -> jax.Array:
    """L2-normalises the last axis in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
