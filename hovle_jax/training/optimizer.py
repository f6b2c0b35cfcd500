"""AdamW with warm-up, cosine decay and clipping, on optax."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hovle_jax.config import OptimizerConfig

# Biases, norm gains, layer scales, the temperature and the scores' bias are not decayed.
NO_DECAY = ("bias", "scale", "scale1", "scale2", "log_scale", "logit_bias", "magnitude")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The schedule: linear from 0 over `warmup_steps`, then a cosine to `final_fraction` of the peak."""
    warmup = min(config.warmup_steps, max(steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, 1),
        end_value=config.final_fraction * config.learning_rate,
    )


def decay_mask(params: dict) -> dict:
    """True for parameters under weight decay."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in NO_DECAY, params)


@functools.cache  # equal runs have equal optimizers, so that a step is traced once for all of them
def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """Its `update` takes `good` too, a flag: where that is false, its state stays as it was, to the bit."""
    adamw = optax.chain(  # of one structure with `optax.adamw`, as the checkpoints have it
        adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        kept(optax.scale_by_learning_rate(learning_rate(config, steps))),
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam` with a flag `good`, as above.

    The update is made of the moments that stay, not of those that were made: equal where it counts, and each moment is
    overwritten in its place. An update that reads the old moments and the new ones needs a copy of all.
    """
    plain = optax.scale_by_adam(b1, b2)

    def update(updates: Any, state: Any, params: Any = None, *, good: jax.Array | bool = True, **extra: Any):
        state = keep(good, plain.update(updates, state)[1], state)
        corrected = optax.tree.bias_correction
        mu, nu = corrected(state.mu, b1, state.count), corrected(state.nu, b2, state.count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu), state

    return optax.GradientTransformationExtraArgs(plain.init, update)


def kept(plain: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A transformation with a flag `good`, as above."""

    def update(updates: Any, state: Any, params: Any = None, *, good: jax.Array | bool = True, **extra: Any):
        updates, made = plain.update(updates, state, params)
        return updates, keep(good, made, state)

    return optax.GradientTransformationExtraArgs(plain.init, update)


def keep(good: jax.Array | bool, made: Any, before: Any) -> Any:
    """A tree as it was made, or as it was before."""
    if good is True:
        return made
    return jax.tree.map(functools.partial(jnp.where, good), made, before)
