"""Linear probes: the penalty that does best on a held-out part, then a fit to all images.

Letters: N images, D width of the features, C classes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hovle_jax.errors import UserError
from hovle_jax.evaluation.probes import logistic, ridge
from hovle_jax.evaluation.probes.linear import Linear
from hovle_jax.evaluation.probes.moments import bend, check_features

STRENGTHS = tuple(10 ** (-exponent / 2) for exponent in range(-2, 11))  # 10 to 1e-5, of what the features' scale is
HELD_OUT = 0.2  # of the images, on which the penalty is chosen


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of probe.

    Attributes:
      path: (features, labels, classes, penalties, used) -> a `Linear` for each penalty.
      scale: (features, images of each class) -> a penalty that is neither weak nor strong.
      setting: (scikit-learn's name of the penalty, its value).
    """

    path: Callable
    scale: Callable[[np.ndarray, np.ndarray], float]
    setting: Callable[[float], tuple[str, float]]


def _spread(features):
    """The mean eigenvalue of their Gram matrix about the mean; 1 where they are all alike."""
    return float(len(features) * features.var(0, dtype=np.float64).mean()) or 1.0


KINDS = {
    "logistic": Kind(logistic.path, lambda x, counts: _spread(x) * bend(counts), lambda penalty: ("C", 1 / penalty)),
    "ridge": Kind(ridge.path, lambda x, counts: _spread(x), lambda penalty: ("alpha", penalty)),
}


@dataclasses.dataclass(frozen=True)
class Probe:
    """A fitted probe.

    Attributes:
      kind: of KINDS.
      linear: the fit to all images.
      penalty: the one it was fitted with.
      tried: {penalty: share of the held-out images that are right}; empty where none was chosen.
    """

    kind: str
    linear: Linear
    penalty: float
    tried: dict[float, float]

    def settings(self) -> dict[str, Any]:
        """What a report says: the penalty as scikit-learn has it, and how the held-out images came out."""
        name, value = KINDS[self.kind].setting(self.penalty)
        held_out = {"held_out_accuracy": self.tried[self.penalty]} if self.tried else {}
        return {"kind": self.kind, name: float(f"{value:.4g}"), **held_out}


def fit(kind: str, features: np.ndarray, labels: np.ndarray, classes: int, penalty: float) -> Probe:
    """A probe with a given penalty: 1 / C, or alpha."""
    check_features(features, labels, classes)
    (linear,) = KINDS[kind].path(features, labels, classes, [penalty], np.ones(len(labels), bool))
    return Probe(kind, linear, penalty, {})


def fit_best(
    kind: str,
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    held_out: np.ndarray | None = None,
    strengths: Sequence[float] = STRENGTHS,
) -> Probe:
    """A probe with the penalty that does best on the held-out images; of equals the strongest. Fitted to all.

    Args:
      features: [N, D] float32.
      labels: [N] int32 below `classes`.
      held_out: [N] bool; None = a fifth of each class.
      strengths: penalties to try, strongest first, as multiples of the scale of the features.
    Raises:
      UserError: the features or labels can have no probe.
    """
    check_features(features, labels, classes)
    held_out = part_of_each_class(labels, HELD_OUT) if held_out is None else held_out
    if not held_out.any():
        raise UserError(f"{len(labels)} images are too few to hold a fifth of a class out; give the penalty")
    used, own = ~held_out, KINDS[kind]
    scale = own.scale(features[used], np.bincount(labels[used], minlength=classes))
    penalties = [strength * scale for strength in strengths]
    tried = {}
    for penalty, linear in zip(penalties, own.path(features, labels, classes, penalties, used), strict=True):
        tried[penalty] = linear.accuracy(features[held_out], labels[held_out])
    best = max(tried, key=lambda penalty: tried[penalty])
    return dataclasses.replace(fit(kind, features, labels, classes, best), tried=tried)


def part_of_each_class(labels: np.ndarray, share: float, seed: int = 0) -> np.ndarray:
    """[N] bool: a share of each class drawn at random, rounded down, so that none loses all of its images."""
    rng, chosen = np.random.default_rng(seed), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        mine = rng.permutation(np.flatnonzero(labels == label))
        chosen[mine[: int(share * len(mine))]] = True
    return chosen
