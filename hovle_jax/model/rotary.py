"""Half-split rotary positions (RoFormer, arXiv 2104.09864), and their scalings for longer texts.

Dimension letters: B batch, L tokens, H heads, C head dim.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.model.config import RopeScaling, StackConfig


def frequencies(config: StackConfig) -> tuple[np.ndarray, float]:
    """-> (angle per position of each pair [C / 2] float32, factor of cos and sin).

    Made on the host in float32, in the order of operations of the public code.
    """
    C, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    plain = (1.0 / theta ** (np.arange(0, C, 2, dtype=np.float32) / np.float32(C))).astype(np.float32)
    if scaling is None:
        return plain, 1.0
    return SCALINGS[scaling.kind](plain, scaling, C, theta)


def _linear(plain, scaling: RopeScaling, C, theta):
    """Position interpolation (arXiv 2306.15595)."""
    return plain / np.float32(scaling.factor), 1.0


def _llama3(plain, scaling: RopeScaling, C, theta):
    """Llama 3.1: slow pairs are interpolated, fast ones kept, those between blended by how often they turn."""
    turns = scaling.original_length * plain / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return (((1 - blend) / scaling.factor + blend) * plain).astype(np.float32), 1.0


def _yarn(plain, scaling: RopeScaling, C, theta):
    """YaRN (arXiv 2309.00071): a ramp over the pairs' indices, and a temperature by way of cos and sin."""

    def pair_that_turns(times):
        return C * math.log(scaling.original_length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, C - 1)
    ramp = np.clip((np.arange(C // 2) - low) / max(high - low, 1e-3), 0, 1)
    factor = scaling.attention_factor or (0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0)
    return (plain / scaling.factor * ramp + plain * (1 - ramp)).astype(np.float32), factor


def _factors(plain, scaling: RopeScaling, C, theta):
    """Each pair's own (as in LongRoPE, arXiv 2402.13753)."""
    return plain / np.asarray(scaling.factors, np.float32), scaling.attention_factor or 1.0


def _dynamic(plain, scaling: RopeScaling, C, theta):
    """Up to the original length; `stretch` is for what is longer."""
    return plain, 1.0


SCALINGS = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "factors": _factors, "dynamic": _dynamic}


def stretch(lengths: jax.Array, scaling: RopeScaling, C: int) -> jax.Array:
    """Dynamic NTK: what the plain frequencies are multiplied by in a text of a certain length.

    Public code raises the base to theta * r^(C / (C - 2)), r = factor * length / original - (factor - 1), for texts
    beyond the original length; of pair i that multiplies the frequency by r^(-2 i / (C - 2)).

    Args:
      lengths: [B, L] int32: how long the text is that each token is read in.
    Returns:
      [B, L, C / 2] float32; 1 for texts within the original length.
    """
    longer = jnp.maximum(lengths, scaling.original_length).astype(jnp.float32) / scaling.original_length
    ratio = scaling.factor * longer - (scaling.factor - 1)
    return ratio[..., None] ** (-np.arange(0, C, 2, dtype=np.float32) / np.float32(C - 2))


def text_lengths(positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """How long each token's text is so far, [B, L] int32: one more than the last position of its segment."""
    rows = jnp.arange(positions.shape[0])[:, None]
    ends = jnp.zeros((positions.shape[0], positions.shape[1] + 1), jnp.int32).at[rows, segment_ids].max(positions + 1)
    return jnp.take_along_axis(ends, segment_ids, axis=1)


def needs_lengths(config: StackConfig, longest: int) -> bool:
    """Whether angles depend on how long a text is: dynamic NTK, where texts can be longer than the original length."""
    scaling = config.rope_scaling
    return scaling is not None and scaling.kind == "dynamic" and longest > scaling.original_length


def rotary_angles(
    positions: jax.Array, config: StackConfig, lengths: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Angles in float32.

    With dynamic NTK a token is turned by the frequencies of the text's length when it is read, and its cached key keeps
    them: what public code does with one prompt. (In a padded batch it takes the longest row's length for all rows, and
    it remembers the longest text that it has ever seen; here a row does not depend on its company.)

    Args:
      positions: [B, L] int32.
      lengths: [B, L] int32: how long the text is that each token is read in; where `needs_lengths` says so.
    Returns:
      (cos, sin), each [B, L, 1, C / 2].
    """
    frequency, factor = frequencies(config)
    if lengths is not None:
        assert config.rope_scaling is not None
        frequency = frequency * stretch(lengths, config.rope_scaling, config.head_dim)[:, :, None]
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequency
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, by_matmul: bool = False) -> jax.Array:
    """Turns [B, L, H, C] by the angles; the first half of C is paired with the second.

    Args:
      by_matmul: the halves change places by a matmul with a permutation, which is exact for bfloat16. A TPU's vector
        registers hold 128 lanes: halves of 64 of a head leave them half empty, and moving them costs more than that.
    """
    if by_matmul and x.dtype == jnp.bfloat16:
        C = x.shape[-1]
        swap = jnp.asarray(np.roll(np.eye(C), C // 2, axis=1), x.dtype)
        swapped = jnp.einsum("blhc,cd->blhd", x, swap, preferred_element_type=jnp.float32)
        cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
        return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
