"""Pre-norm transformer encoders: InternViT, CLIP's image tower and CLIP's text tower are made of one block.

Dimension letters: M tiles, T tokens of a tower, D width, H heads, C head dim, P patches.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hovle_jax.model.attention import attend
from hovle_jax.model.clip_config import TextTowerConfig
from hovle_jax.model.config import ViTConfig
from hovle_jax.model.dense import dense, partitioned
from hovle_jax.model.execution import Execution
from hovle_jax.model.transformer import RMSNorm, rematerialised, scanned
from hovle_jax.model.vision import normalized_patches, resize_positions

ACTIVATIONS = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}


class LayerNorm(nn.Module):
    """LayerNorm in float32, cast back."""

    epsilon: float

    @nn.compact
    def __call__(self, x):
        axes = ("embed_vector",)
        norm = nn.LayerNorm(
            epsilon=self.epsilon,
            dtype=jnp.float32,
            use_fast_variance=False,
            scale_init=partitioned(nn.initializers.ones, *axes),
            bias_init=partitioned(nn.initializers.zeros, *axes),
            name="norm",
        )
        return norm(x).astype(x.dtype)


NORMS = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}


class EncoderLayer(nn.Module):
    """x += ls1 * attention(norm1 x); x += ls2 * mlp(norm2 x)."""

    width: int
    num_heads: int
    mlp_width: int
    norm: str
    norm_eps: float
    activation: str
    execution: Execution
    branches: int = 1  # residual branches of the whole encoder, for the initialisation
    qkv_bias: bool = True
    layer_scale: bool = False
    qk_norm: bool = False

    @nn.compact
    def __call__(self, x, _, allowed, at=None):
        """One layer.

        Args:
          x: [M, T, D].
          allowed: [M, T, T] bool or None.
          at: [M] int32: the token of each row whose output is wanted; None = all.
        Returns:
          ([M, T, D], or [M, 1, D] of the tokens that are wanted; None).
        """
        how = self.execution
        norm = functools.partial(NORMS[self.norm], self.norm_eps)

        def projection(name, y):
            y = dense(self.width, ("embed", "heads"), name, how, use_bias=self.qkv_bias)(y)
            if self.qk_norm and name != "value":
                y = RMSNorm(self.norm_eps, name=f"{name}_norm")(y)
            return y.reshape(*y.shape[:2], self.num_heads, self.width // self.num_heads)

        y = norm(name="norm1")(x)
        asking = y
        if at is not None:
            x, asking, allowed = (None if each is None else token_of(each, at) for each in (x, y, allowed))
        query, key, value = projection("query", asking), projection("key", y), projection("value", y)
        y = attend(query, key, value, allowed, how.attention, how.placement)
        y = dense(self.width, ("heads", "embed"), "output", how, use_bias=True, branches=self.branches)(
            y.reshape(x.shape)
        )
        x = x + self.scaled(y, "scale1")
        y = dense(self.mlp_width, ("embed", "mlp"), "up", how, use_bias=True)(norm(name="norm2")(x))
        y = dense(self.width, ("mlp", "embed"), "down", how, use_bias=True, branches=self.branches)(
            ACTIVATIONS[self.activation](y)
        )
        return x + self.scaled(y, "scale2"), None

    def scaled(self, y: jax.Array, name: str) -> jax.Array:
        if not self.layer_scale:
            return y
        init = partitioned(nn.initializers.constant(0.1), "embed_vector")
        return y * self.param(name, init, (self.width,)).astype(y.dtype)


def token_of(x: jax.Array, at: jax.Array) -> jax.Array:
    """Rows x [M, T, D] -> [M, 1, D]: of each the token at [M]."""
    return jnp.take_along_axis(x, at[:, None, None], axis=1)


def run_encoder(
    parent: Any,
    config: ViTConfig | TextTowerConfig,
    num_layers: int,
    x: jax.Array,
    allowed: jax.Array | None = None,
    at: jax.Array | None = None,
    **options,
) -> jax.Array:
    """Runs `num_layers` scanned encoder layers named 'layers' over x [M, T, D], inside a compact method of `parent`.

    Args:
      parent: a module with an `execution`.
      at: [M] int32: the one token of each row whose output is wanted. Then the last layer makes keys and values of all
        tokens, and all else of these alone: most of a layer is saved.
    Returns:
      [M, T, D], or [M, 1, D] of these.
    """
    if num_layers == 0:
        return x if at is None else token_of(x, at)
    execution: Execution = parent.execution
    sizes: dict[str, Any] = dict(
        width=config.width,
        num_heads=config.num_heads,
        mlp_width=config.mlp_width,
        norm_eps=config.norm_eps,
        activation=config.activation,
        execution=execution,
        branches=2 * num_layers,
        **options,
    )
    layers = lambda count, **named: scanned(EncoderLayer, execution, count, broadcast=1)(**sizes, **named)
    if at is None or parent.is_initializing():
        x, _ = layers(num_layers, name="layers")(x, None, allowed)
        return x if at is None else token_of(x, at)
    stacked = parent.variables["params"]["layers"]
    if num_layers > 1:
        before = jax.tree.map(lambda leaf: leaf[:-1], stacked)
        x, _ = layers(num_layers - 1, parent=None).apply({"params": before}, x, None, allowed)
    last = rematerialised(EncoderLayer, execution)(**sizes, parent=None)
    x, _ = last.apply({"params": jax.tree.map(lambda leaf: leaf[-1], stacked)}, x, None, allowed, at)
    return x


class MAPHead(nn.Module):
    """Attention pooling (Zhai et al. 2022): one learned probe attends to all tokens; an MLP with a residual follows."""

    config: ViTConfig
    execution: Execution

    @nn.compact
    def __call__(self, x):
        """[M, T, D] -> [M, D]."""
        c, how = self.config, self.execution
        M, D = x.shape[0], c.width
        probe = self.param("probe", partitioned(nn.initializers.normal(D**-0.5), "positions", "embed"), (1, D))

        def heads(name, y):
            y = dense(D, ("embed", "heads"), name, how, use_bias=True)(y)
            return y.reshape(*y.shape[:2], c.num_heads, D // c.num_heads)

        query = heads("query", jnp.broadcast_to(probe.astype(x.dtype), (M, 1, D)))
        y = attend(query, heads("key", x), heads("value", x), None, how.attention, how.placement)
        y = dense(D, ("heads", "embed"), "output", how, use_bias=True)(y.reshape(M, D))
        z = dense(c.mlp_width, ("embed", "mlp"), "up", how, use_bias=True)(LayerNorm(c.norm_eps, name="norm")(y))
        return y + dense(D, ("mlp", "embed"), "down", how, use_bias=True)(ACTIVATIONS[c.activation](z))


class VisionTransformer(nn.Module):
    """Patches, class token, learned positions, encoder layers, and what pools their tokens.

    Attributes:
      num_layers: how many of the config's layers to run (a CLIP teacher leaves the last one out); None = all.
      with_post_norm: whether the tower's `post_norm` and pooling exist (a teacher never pools).
    """

    config: ViTConfig
    execution: Execution
    num_layers: int | None = None
    with_post_norm: bool = True

    @nn.compact
    def __call__(self, tiles, kept=None, whole=True):
        """Tiles to features.

        Args:
          tiles: [M, S, S, 3], uint8, or float already normalised.
          kept: [M, P] int32, the patches of each tile that are seen, with their positions (FLIP, Li et al. 2023); None
            = all.
          whole: static; without it `pooled` alone is made, in less time where it is of one token.
        Returns:
          (hidden [M, T, D], pooled [M, D]); T = P, or 1 + P with the class token in front. `pooled` is for a tower that
          has a post-norm (CLIP, SigLIP), else None; `hidden` is after that norm where it is of all tokens.
        """
        c = self.config
        M, S = tiles.shape[:2]
        side = S - S % c.patch_size  # SigLIP's 384 pixels are 27 patches of 14
        tiles = tiles[:, :side, :side]
        patches = normalized_patches(tiles, c.patch_size, c.image_mean, c.image_std)
        x = dense(c.width, ("patch", "embed"), "patch_embedding", self.execution, use_bias=c.patch_bias)(patches)
        init = partitioned(nn.initializers.normal(c.width**-0.5), "positions", "embed")
        # Linen numbers the parameters of a module as they are made, and draws each by its number.
        names = ("class_embedding", "class_position") if c.class_token else ()
        vectors = [self.param(name, init, (1, c.width)) for name in names]
        positions = self.param("position_embedding", init, (c.grid**2, c.width))
        x = x + resize_positions(positions, S // c.patch_size).astype(x.dtype)
        if kept is not None:
            x = jnp.take_along_axis(x, kept[..., None], axis=1)
        if vectors:
            first = jnp.broadcast_to((vectors[0] + vectors[1]).astype(x.dtype), (M, 1, c.width))
            x = jnp.concatenate([first, x], axis=1)
        if c.pre_norm:
            x = LayerNorm(c.norm_eps, name="pre_norm")(x)
        num_layers = c.num_layers if self.num_layers is None else self.num_layers
        options: dict[str, Any] = dict(norm=c.norm, qkv_bias=c.qkv_bias, layer_scale=c.layer_scale, qk_norm=c.qk_norm)
        is_class = c.pooling == "class" and c.post_norm and self.with_post_norm
        at = jnp.zeros(M, jnp.int32) if is_class and not whole else None
        x = run_encoder(self, c, num_layers, x, at=at, **options)
        if not (c.post_norm and self.with_post_norm):
            return x, None
        norm = LayerNorm(c.norm_eps, name="post_norm")
        if c.norm_tokens:
            x = norm(x)
            return x, self.pooled(x)
        return x, norm(self.pooled(x))

    def pooled(self, x: jax.Array) -> jax.Array:
        """Tokens [M, T, D] -> [M, D]."""
        c = self.config
        if c.pooling == "map":
            return MAPHead(c, self.execution, name="head")(x)
        if c.pooling == "mean":
            return jnp.mean(x[:, c.class_token :], axis=1, dtype=jnp.float32).astype(x.dtype)
        return x[:, 0]
