"""CLIP's modified ResNet (Radford et al. 2021, section 2.4), an image tower beside the ViT.

Of ResNet-50 differ: a stem of three convolutions, average pooling before a convolution instead of a stride in it, and
attention over the last feature map instead of its mean. Batch norm uses the stored statistics, or those of the batch.

Dimension letters: M tiles, S side, H and W of a feature map, C channels, P its places, E projection width.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from hovle_jax.model.attention import attend
from hovle_jax.model.clip_config import ResNetConfig
from hovle_jax.model.dense import dense, partitioned
from hovle_jax.model.execution import Execution
from hovle_jax.model.vision import normalize_tiles

STATISTICS = "statistics"  # the collection of batches' own


class BatchNorm(nn.Module):
    """Batch norm: (x - mean) / sqrt(variance + epsilon) * scale + bias, in float32.

    `batches` counts what the stored statistics were gathered over.

    Attributes:
      of_batch: by the batch's own statistics, which are sown as STATISTICS; without it by the stored ones.
      scale_init: of a fresh one.
    """

    epsilon: float
    of_batch: bool = False
    scale_init: Callable = nn.initializers.ones

    @nn.compact
    def __call__(self, x):
        vector = lambda name, init: self.param(name, partitioned(init, "embed_vector"), (x.shape[-1],))
        scale, bias = vector("scale", self.scale_init), vector("bias", nn.initializers.zeros)
        mean, variance = vector("mean", nn.initializers.zeros), vector("variance", nn.initializers.ones)
        self.param("batches", nn.initializers.zeros, ())
        wide = x.astype(jnp.float32)
        if self.of_batch:
            mean, variance = jnp.mean(wide, axis=(0, 1, 2)), jnp.var(wide, axis=(0, 1, 2))
            self.sow(STATISTICS, "mean", mean)
            self.sow(STATISTICS, "variance", variance)
        factor = scale * jax.lax.rsqrt(variance + self.epsilon)
        return ((wide - mean) * factor + bias).astype(x.dtype)


class Block(nn.Module):
    """A bottleneck: 1x1, 3x3, pooling by `stride`, 1x1 to 4 `width` channels; added to its input.

    Where the input has another shape it is pooled by `stride` and projected.
    """

    width: int
    stride: int
    epsilon: float
    execution: Execution
    of_batch: bool = False

    @nn.compact
    def __call__(self, x):
        norm = lambda name, **how: BatchNorm(self.epsilon, self.of_batch, name=name, **how)
        y = nn.relu(norm("norm1")(convolution(self.width, 1, "conv1", self.execution)(x)))
        y = nn.relu(norm("norm2")(convolution(self.width, 3, "conv2", self.execution)(y)))
        # A fresh block adds nothing at first, as in CLIP's own initialisation.
        last = norm("norm3", scale_init=nn.initializers.zeros)
        y = last(convolution(4 * self.width, 1, "conv3", self.execution)(pooled(y, self.stride)))
        if self.stride > 1 or x.shape[-1] != 4 * self.width:
            projected = convolution(4 * self.width, 1, "projection", self.execution)(pooled(x, self.stride))
            x = norm("projection_norm")(projected)
        return nn.relu(x + y)


def convolution(features: int, size: int, name: str, execution: Execution, stride: int = 1) -> nn.Conv:
    """A convolution without bias that keeps the size, or divides it by `stride`."""
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=size // 2,
        use_bias=False,
        dtype=execution.dtype,
        kernel_init=partitioned(nn.initializers.he_normal(), *[None] * 4),
        name=name,
    )


def pooled(x: jax.Array, stride: int) -> jax.Array:
    """The means of stride x stride places: [M, H, W, C] -> [M, H / stride, W / stride, C]."""
    return x if stride == 1 else nn.avg_pool(x, (stride, stride), (stride, stride))


class AttentionPool(nn.Module):
    """Attention of the places' mean over the places and itself; all have learned positions."""

    num_heads: int
    features: int
    execution: Execution

    @nn.compact
    def __call__(self, x):
        """[M, P, C] -> [M, features]."""
        M, P, C = x.shape
        init = partitioned(nn.initializers.normal(C**-0.5), "positions", "embed")
        positions = self.param("position_embedding", init, (P + 1, C))
        x = jnp.concatenate([jnp.mean(x, axis=1, keepdims=True, dtype=jnp.float32).astype(x.dtype), x], axis=1)
        x = x + positions.astype(x.dtype)
        how = self.execution

        def heads(name, y):
            y = dense(C, ("embed", "heads"), name, how, use_bias=True)(y)
            return y.reshape(M, -1, self.num_heads, C // self.num_heads)

        query, key, value = heads("query", x[:, :1]), heads("key", x), heads("value", x)
        y = attend(query, key, value, None, how.attention, how.placement).reshape(M, C)
        return dense(self.features, ("heads", "embed"), "output", how, use_bias=True)(y)


class ModifiedResNet(nn.Module):
    """Stem, four stages of blocks, attention pooling.

    Attributes:
      features: E, of what it pools: the projection is a part of the pooling; 0 = it does not pool.
      stages: how many of the four stages to run; fewer than all are not pooled.
    """

    config: ResNetConfig
    features: int
    execution: Execution
    stages: int = 4

    @nn.compact
    def __call__(self, tiles, of_batch=False):
        """[M, S, S, 3] (uint8, or float already normalised) -> (last feature map [M, P, C], pooled [M, features] or
        None).

        The stages' feature maps [M, H, W, C] are sown as `intermediates`: stage1 to stage4. `of_batch` (static): see
        `BatchNorm`.
        """
        c, how = self.config, self.execution
        x = normalize_tiles(tiles, c.image_mean, c.image_std).astype(how.dtype)
        for i, (width, stride) in enumerate(((c.width // 2, 2), (c.width // 2, 1), (c.width, 1)), start=1):
            y = convolution(width, 3, f"conv{i}", how, stride)(x)
            x = nn.relu(BatchNorm(c.norm_eps, of_batch, name=f"norm{i}")(y))
        x = pooled(x, 2)
        for stage, blocks in enumerate(c.layers[: self.stages]):
            for i in range(blocks):
                stride = 2 if stage and not i else 1
                x = Block(c.width * 2**stage, stride, c.norm_eps, how, of_batch, name=f"stage{stage + 1}_block{i}")(x)
            self.sow("intermediates", f"stage{stage + 1}", x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        if not self.features:
            return x, None
        return x, AttentionPool(c.num_heads, self.features, how, name="pool")(x)


def with_statistics(params: dict, gathered: list[dict]) -> dict:
    """Parameters whose stored statistics are those of batches: the mean of their means, and the variance of all.

    Args:
      gathered: for each batch what was sown, {norm: {'mean': ([C],), 'variance': ([C],)}} as the parameters are nested.
    """
    flat: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(params))
    sown: list[dict[tuple[str, ...], Any]] = [traverse_util.flatten_dict(each) for each in gathered]
    for path in sown[0]:
        if path[-1] != "mean":
            continue
        means, variances = (jnp.stack([each[*path[:-1], name][0] for each in sown]) for name in ("mean", "variance"))
        made = {"mean": jnp.mean(means, axis=0), "variance": jnp.mean(variances, axis=0) + jnp.var(means, axis=0)}
        for name, value in (made | {"batches": jnp.float32(len(sown))}).items():
            old = flat[*path[:-1], name]
            flat[*path[:-1], name] = jax.device_put(value, old.sharding)
    return traverse_util.unflatten_dict(flat)
