"""Losses of pairs of answers, one of which is preferred: each a value for every pair, in float32.

They are functions of log-probabilities: of an answer, summed over its tokens, or their mean where it says so. With
r(y) = log p(y) - log p_reference(y), the implicit reward of an answer is beta r(y) (Rafailov et al. 2023, section 4).

Dimension letters: B pairs, N answers.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp

log_sigmoid = jax.nn.log_sigmoid


class Answers(typing.NamedTuple):
    """What the losses read of answers, each [B].

    Attributes:
      policy, reference: their log-probabilities under the model that learns, and under the one that it started from.
      lengths: tokens of each.
    """

    policy: jax.Array
    reference: jax.Array
    lengths: jax.Array

    @property
    def gain(self) -> jax.Array:
        """r(y) = log p(y) - log p_reference(y), [B]."""
        return self.policy - self.reference

    @property
    def mean_gain(self) -> jax.Array:
        """r(y) for each token, [B]."""
        return self.gain / self.lengths

    @property
    def mean(self) -> jax.Array:
        """The mean log-probability of a token, [B]."""
        return self.policy / self.lengths


@dataclasses.dataclass(frozen=True)
class Preference:
    """What the losses are told.

    Attributes:
      beta: how far from the reference the policy may go: the smaller, the farther.
      smoothing: the share of pairs that are taken to be labelled the wrong way around, below 0.5.
      margin: SimPO: what the chosen answer's reward must exceed the other's by.
    """

    beta: float = 0.1
    smoothing: float = 0.0
    margin: float = 0.0


def sigmoid(chosen: Answers, rejected: Answers, how: Preference) -> jax.Array:
    """DPO: -log sigmoid(beta (r_c - r_r)) (Rafailov et al. 2023, equation 7), with the labels smoothed."""
    difference = how.beta * (chosen.gain - rejected.gain)
    return -(1 - how.smoothing) * log_sigmoid(difference) - how.smoothing * log_sigmoid(-difference)


def robust(chosen: Answers, rejected: Answers, how: Preference) -> jax.Array:
    """DPO, unbiased where `smoothing` of the labels are wrong (Chowdhury et al. 2024, equation 12)."""
    difference, e = how.beta * (chosen.gain - rejected.gain), how.smoothing
    return (-(1 - e) * log_sigmoid(difference) + e * log_sigmoid(-difference)) / (1 - 2 * e)


def hinge(chosen: Answers, rejected: Answers, how: Preference) -> jax.Array:
    """max(0, 1 - beta (r_c - r_r)): the loss of SLiC on DPO's rewards (Liu et al. 2023, section 3)."""
    return jax.nn.relu(1 - how.beta * (chosen.gain - rejected.gain))


def ipo(chosen: Answers, rejected: Answers, how: Preference) -> jax.Array:
    """(r_c - r_r - 1 / (2 beta))^2, r being means over tokens (Azar et al. 2023, equation 17)."""
    return (chosen.mean_gain - rejected.mean_gain - 1 / (2 * how.beta)) ** 2


def ipo_sum(chosen: Answers, rejected: Answers, how: Preference) -> jax.Array:
    """The same with sums over tokens, as the paper has it."""
    return (chosen.gain - rejected.gain - 1 / (2 * how.beta)) ** 2


def simpo(chosen: Answers, rejected: Answers, how: Preference) -> jax.Array:
    """-log sigmoid(beta (mean_c - mean_r) - margin); no reference (Meng et al. 2024, equation 6)."""
    return -log_sigmoid(how.beta * (chosen.mean - rejected.mean) - how.margin)


def orpo(chosen: Answers, rejected: Answers, how: Preference) -> jax.Array:
    """-beta log sigmoid(log odds_c - log odds_r), odds of the mean probability of a token; no reference.

    Cross-entropy of the chosen answers is added to it (Hong et al. 2024, equations 6 and 7).
    """
    return -how.beta * log_sigmoid(log_odds(chosen.mean) - log_odds(rejected.mean))


def log_odds(logp: jax.Array) -> jax.Array:
    """log(p / (1 - p)) of log p < 0."""
    return logp - jnp.log1p(-jnp.exp(logp))


# Of pairs, by name. All but simpo and orpo read the reference.
LOSSES = {"sigmoid": sigmoid, "robust": robust, "hinge": hinge, "ipo": ipo, "ipo_sum": ipo_sum}
LOSSES |= {"simpo": simpo, "orpo": orpo}
WITHOUT_REFERENCE = ("simpo", "orpo")


def kto(
    answers: Answers, desired: jax.Array, reference_point: jax.Array, how: Preference, weights: tuple[float, float]
) -> jax.Array:
    """Of single answers, each desired or not: w (1 - sigmoid(s (beta r - z))), s = +1 or -1, [N].

    Ethayarajh et al. 2024, equation 8, less its constants.

    Args:
      desired: [N] bool.
      reference_point: z, the policy's KL divergence from the reference times beta, see `reference_point`; no gradient.
      weights: w of a desired answer, and of another.
    """
    z = jax.lax.stop_gradient(reference_point)
    sign = jnp.where(desired, 1.0, -1.0)
    return jnp.where(desired, *weights) * (1 - jax.nn.sigmoid(sign * (how.beta * answers.gain - z)))


def reference_point(mismatched: Answers, how: Preference) -> jax.Array:
    """KTO's z: max(0, beta times the mean of r over answers to questions that are not theirs), [] (section 4.1)."""
    return jnp.maximum(how.beta * jnp.mean(mismatched.gain), 0.0)


def quality(chosen: Answers, rejected: Answers, shift: jax.Array | float, how: Preference) -> jax.Array:
    """BCO: -log sigmoid(beta r_c - shift) - log sigmoid(-(beta r_r - shift)): each answer is good or not by itself.

    Jung et al. 2024; the quality loss of InternVL's mixed preference optimisation (Wang et al. 2024, equation 5).

    Args:
      shift: the running mean of the rewards.
    """
    return -log_sigmoid(how.beta * chosen.gain - shift) - log_sigmoid(-(how.beta * rejected.gain - shift))


def reward_model(
    chosen: jax.Array, rejected: jax.Array, margin: jax.Array | float = 0.0, centering: float = 0.0
) -> jax.Array:
    """Bradley-Terry: -log sigmoid(c - r - margin) + centering (c + r)^2 of rewards [B] (Ouyang et al. 2022, equation 1;
    Touvron et al. 2023, equation 2, for the margin; Eisenstein et al. 2023 for the centering)."""
    return -log_sigmoid(chosen - rejected - margin) + centering * (chosen + rejected) ** 2
