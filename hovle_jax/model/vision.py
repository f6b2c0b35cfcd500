"""What every tower does to an image: normalise, split into patches, place them, shuffle pixels into channels.

Dimension letters: M tiles, S tile side, P patches, D width.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize_tiles(
    tiles: jax.Array, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> jax.Array:
    """uint8 [..., 3] (or several pixels, [..., 3 n]) -> float32 normalised; floats are taken as normalised already."""
    if tiles.dtype != jnp.uint8:
        return tiles
    middle, scale = (np.tile(np.asarray(of, np.float32), tiles.shape[-1] // len(of)) for of in (mean, std))
    return (tiles.astype(jnp.float32) / 255.0 - middle) / scale


def patchify(tiles: jax.Array, patch_size: int) -> jax.Array:
    """[M, S, S, 3] -> [M, P, patch_size^2 * 3], patches row-major, each flattened as (row, column, channel).

    A convolution whose stride is its kernel is a matmul over these vectors.
    """
    M, S, _, channels = tiles.shape
    side = S // patch_size
    x = tiles.reshape(M, side, patch_size, side, patch_size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(M, side * side, patch_size * patch_size * channels)


def normalized_patches(
    tiles: jax.Array,
    patch_size: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    in_blocks: bool = False,
) -> jax.Array:
    """`patchify` and `normalize_tiles`: [M, S, S, 3] -> [M, P, patch_size^2 * 3].

    Bytes are moved before they are floats; without the barriers the compiler for TPUs does it the other way around, and
    in one step that costs more than two.

    Args:
      in_blocks: patches in the order of `pixel_shuffle`, which is then a reshape of what becomes of them.
    """
    patches = jax.lax.optimization_barrier(patchify(tiles, patch_size))
    if in_blocks:
        patches = jax.lax.optimization_barrier(in_block_order(patches))
    return normalize_tiles(patches, mean, std)


def in_block_order(x: jax.Array) -> jax.Array:
    """Tokens [M, P, D], row-major, -> the four of each 2x2 block together."""
    return pixel_shuffle(x).reshape(x.shape)


def pixel_shuffle(x: jax.Array) -> jax.Array:
    """Each 2x2 block of tokens becomes one: [M, P, D] on a square grid -> [M, P / 4, 4 D].

    Channel blocks are in the order (r0c0, r0c1, r1c0, r1c1), tokens row-major: InternVL's `ps_version=v2`.
    """
    M, P, D = x.shape
    side = int(P**0.5)
    x = x.reshape(M, side // 2, 2, side // 2, 2, D)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(M, P // 4, 4 * D)


def _bicubic_weights(source, target):
    """[target, source] float64 weights of PyTorch's bicubic resize: a = -0.75, align_corners=False, edges clamped."""
    a = -0.75
    weights = np.zeros((target, source))
    for row in range(target):
        centre = (row + 0.5) * source / target - 0.5
        left = int(np.floor(centre))
        for tap in range(left - 1, left + 3):
            t = abs(centre - tap)
            near = (a + 2) * t**3 - (a + 3) * t**2 + 1
            far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
            weights[row, min(max(tap, 0), source - 1)] += near if t <= 1 else far
    return weights


def resize_positions(table: jax.Array, side: int) -> jax.Array:
    """Learned positions [P, D] of a square grid, brought to side x side in float32 -> [side^2, D].

    PyTorch's bicubic kernel, as the public weights were used with; `jax.image.resize('cubic')` has another one.
    """
    source = int(table.shape[0] ** 0.5)
    if source == side:
        return table
    weights = jnp.asarray(_bicubic_weights(source, side), jnp.float32)
    grid = table.astype(jnp.float32).reshape(source, source, -1)
    resized = jnp.einsum("ip,jq,pqd->ijd", weights, weights, grid, precision=jax.lax.Precision.HIGHEST)
    return resized.reshape(side * side, -1).astype(table.dtype)


def resize_features(x: jax.Array, side: int) -> jax.Array:
    """Bilinear resize of token features [M, P, D] on a square grid to side x side, in float32."""
    M, P, D = x.shape
    source = int(P**0.5)
    if source == side:
        return x
    grid = x.astype(jnp.float32).reshape(M, source, source, D)
    return jax.image.resize(grid, (M, side, side, D), "bilinear").reshape(M, side * side, D).astype(x.dtype)
