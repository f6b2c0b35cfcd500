"""Losses as (sum, weight) pairs in float32: weights depend on the batch alone, and are divided by once, globally.

Dimension letters: B batch, L tokens, T = B L, D width, V vocabulary.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from hovle_jax.components import Models
from hovle_jax.model.transformer import keeps_logits
from hovle_jax.sharding.placement import Placement
from hovle_jax.training.losses.chunked import chunked_cross_entropy

Pair = tuple[jax.Array, jax.Array]  # (sum, weight)


def cosine(prediction: jax.Array, target: jax.Array, weights: jax.Array, epsilon: float = 1e-8) -> Pair:
    """The negative cosine between vectors, at weighted positions (paper, section 3.2).

    Args:
      prediction, target: [..., D].
      weights: [...] float32.
    Returns:
      (sum of -cos, sum of weights).
    """
    prediction, target = prediction.astype(jnp.float32), target.astype(jnp.float32)
    dot = jnp.sum(prediction * target, axis=-1)
    # sqrt(x + eps^2) keeps the gradient finite at a zero vector.
    norms = [jnp.sqrt(jnp.sum(x * x, axis=-1) + epsilon**2) for x in (prediction, target)]
    return -jnp.sum(weights * dot / (norms[0] * norms[1])), jnp.sum(weights)


def cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> Pair:
    """Next-token cross-entropy.

    Args:
      logits: [B, L, V] float32.
      targets: [B, L] int32.
      weights: [B, L] float32, 0 where not supervised.
    Returns:
      (weighted sum in nats, sum of weights).
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    return jnp.sum(losses * weights), jnp.sum(weights)


def token_losses(models: Models, params: dict, hidden: jax.Array, batch: dict) -> dict[str, Pair]:
    """Cross-entropy of the tokens that follow, from the LLM's hidden states before the final norm.

    Returns:
      {"loss": (weighted sum in nats, sum of weights)}.
    """
    llm, targets, weights = models.config.llm, batch["targets"], batch["loss_weights"]
    chunk = models.config.execution.vocab_chunk
    if not chunk:
        return {"loss": cross_entropy(models.hovle.hidden_to_logits(params, hidden), targets, weights)}
    x: Any = models["llm"].apply({"params": params["llm"]}, hidden, method="normalize")
    kernel = models.hovle.head_kernel(params).astype(x.dtype)
    placement = cast(Placement, models.placement)
    sharding = placement.matmul_sharding(x.shape, kernel.shape, ("embed", "vocab"))
    keeps = keeps_logits(models.config.execution.remat)
    return {"loss": chunked_cross_entropy(x, kernel, targets, weights, llm.vocab_size, chunk, sharding, keeps)}


def answer_losses(models: Models, params: dict, batch: dict) -> dict[str, Pair]:
    """`token_losses` of the whole model: embedding and LLM."""
    return token_losses(models, params, models.hovle.hidden(params, batch)[0], batch)


def divide(pair: Pair) -> jax.Array:
    """sum / weight, 0 where nothing counts."""
    total, weight = pair
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0.0)
