"""AdamW with warm-up, cosine decay and clipping, on optax."""

import functools

import jax
import optax

from hovle_jax.config import OptimizerConfig

# Biases, norm gains, layer scales and the temperature are not decayed.
NO_DECAY = ("bias", "scale", "scale1", "scale2", "log_scale")


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
def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )
