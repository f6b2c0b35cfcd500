"""Reinforcement learning of answers: rewards of tokens, advantages, the losses of PPO and GRPO, in float32.

Dimension letters: N answers, T tokens of an answer, padded at the end.
"""

import typing

import jax
import jax.numpy as jnp

from hovle_jax.training.losses.tokens import Pair

EPSILON = 1e-8  # added to a variance


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Of x where the mask is set; 0 where it is set nowhere."""
    return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def whitened(x: jax.Array, mask: jax.Array, keep_mean: bool = False) -> jax.Array:
    """x [N, T] with mean 0 (unless it is kept) and variance 1 where the mask is set: the unbiased variance."""
    mean = masked_mean(x, mask)
    count = jnp.sum(mask)
    variance = masked_mean((x - mean) ** 2, mask) * count / jnp.maximum(count - 1, 1)
    return (x - mean) * jax.lax.rsqrt(variance + EPSILON) + (mean if keep_mean else 0.0)


KL_ESTIMATORS = {
    "k1": lambda logratio: -logratio,  # unbiased, of large variance
    "k3": lambda logratio: jnp.expm1(logratio) - logratio,  # never negative (Schulman 2020)
}


def kl(logps: jax.Array, reference: jax.Array, estimator: str = "k3") -> jax.Array:
    """Of the policy from the reference, estimated at each drawn token: log-probabilities [...] -> [...]."""
    return KL_ESTIMATORS[estimator](reference - logps)


def token_rewards(scores: jax.Array, penalties: jax.Array, last: jax.Array) -> jax.Array:
    """Rewards [N, T] of the tokens: minus each one's penalty, and the answer's score at its end.

    Args:
      scores: [N].
      penalties: [N, T]: of a token, the coefficient times its KL divergence; 0 at padding.
      last: [N] int32: where the answer's last token stands. The score is given for what follows it (the end token),
        or for itself in an answer that fills the row.
    """
    T = penalties.shape[1]
    end = jnp.minimum(last + 1, T - 1)
    return -penalties + jnp.where(jnp.arange(T) == end[:, None], scores[:, None], 0.0)


def generalized_advantages(rewards: jax.Array, values: jax.Array, gamma: float, decay: float) -> jax.Array:
    """GAE, [N, T]: A_t = d_t + gamma decay A_{t+1}, d_t = r_t + gamma V_{t+1} - V_t (Schulman et al. 2016, eq. 16).

    Args:
      rewards, values: [N, T]; 0 after the end.
    """
    following = jnp.concatenate([values[:, 1:], jnp.zeros_like(values[:, :1])], axis=1)
    errors = rewards + gamma * following - values

    def step(advantage, error):
        advantage = error + gamma * decay * advantage
        return advantage, advantage

    _, made = jax.lax.scan(step, jnp.zeros(len(rewards)), errors.T, reverse=True)
    return made.T


class Clipped(typing.NamedTuple):
    """A loss with its weight, and the share of tokens whose ratio was clipped."""

    loss: Pair
    clipped: jax.Array


def policy_loss(
    logps: jax.Array,
    before: jax.Array,
    advantages: jax.Array,
    weights: jax.Array,
    low: float = 0.2,
    high: float | None = None,
) -> Clipped:
    """PPO's: max(-A ratio, -A clip(ratio, 1 - low, 1 + high)) (Schulman et al. 2017, equation 7).

    Args:
      logps, before: [N, T]: of the tokens, by the policy as it is, and as it was when it drew them.
      advantages: [N, T] or [N, 1].
      weights: [N, T]; 0 at padding.
      low, high: how far the ratio counts (Yu et al. 2025 let it rise farther than fall); no `high` is `low`.
    Returns:
      Clipped, whose loss is (sum, sum of weights).
    """
    there = weights > 0
    ratio = jnp.exp(jnp.where(there, logps - before, 0.0))
    bounded = jnp.clip(ratio, 1 - low, 1 + (low if high is None else high))
    losses = jnp.maximum(-advantages * ratio, -advantages * bounded)
    is_clipped = -advantages * bounded > -advantages * ratio
    return Clipped((jnp.sum(losses * weights), jnp.sum(weights)), masked_mean(is_clipped, there))


def value_loss(
    values: jax.Array, before: jax.Array, returns: jax.Array, weights: jax.Array, clip: float = 0.2
) -> Clipped:
    """Half of the squared error, of the value or of one that moved by `clip` at most, whichever is larger [N, T]."""
    bounded = jnp.clip(values, before - clip, before + clip)
    plain, limited = (values - returns) ** 2, (bounded - returns) ** 2
    losses = 0.5 * jnp.maximum(plain, limited)
    return Clipped((jnp.sum(losses * weights), jnp.sum(weights)), masked_mean(limited > plain, weights > 0))


def group_advantages(rewards: jax.Array, scale: bool = True) -> jax.Array:
    """GRPO's: rewards [groups, answers], less their group's mean, over its standard deviation (Shao et al. 2024).

    Args:
      scale: divide by the deviation; without it groups of easy and hard questions weigh alike (Liu et al. 2025).
    """
    centred = rewards - jnp.mean(rewards, axis=1, keepdims=True)
    if not scale:
        return centred
    return centred / (jnp.std(rewards, axis=1, ddof=1, keepdims=True) + 1e-4)
