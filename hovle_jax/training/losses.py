"""Losses as (sum, weight) pairs in float32: weights depend on the batch alone, and are divided by once, globally."""

import jax
import jax.numpy as jnp
import optax


def cosine(prediction, target, weights, epsilon=1e-8):
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


def cross_entropy(logits, targets, weights):
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


def contrastive(images, texts, log_scale):
    """CLIP's symmetric softmax loss over the global batch (Radford et al. 2021, figure 3).

    Args:
      images, texts: [N, E] unit vectors; pair i belongs together.
      log_scale: [] log of the logit scale.
    Returns:
      (sum over pairs, N).
    """
    logits = jnp.exp(log_scale) * jnp.einsum("ie,je->ij", images, texts, preferred_element_type=jnp.float32)
    diagonal = jnp.diagonal(logits)
    rows = jax.nn.logsumexp(logits, axis=1) - diagonal
    columns = jax.nn.logsumexp(logits, axis=0) - diagonal
    return jnp.sum(rows + columns) / 2, jnp.float32(logits.shape[0])


def divide(pair):
    """sum / weight, 0 where nothing counts."""
    total, weight = pair
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0.0)
