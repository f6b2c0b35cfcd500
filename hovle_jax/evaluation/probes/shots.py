"""K-shot probes: fitted to K images of each class, drawn by several seeds.

Letters: N images, D width of the features, C classes, K images of a class.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hovle_jax.errors import UserError
from hovle_jax.evaluation.probes.fitting import KINDS

STRENGTHS = (10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4)
JUDGES = 2000  # images that were not drawn, at most, on which the penalty is chosen


@dataclasses.dataclass(frozen=True)
class Shots:
    """Probes of K images a class.

    Attributes:
      shots: K.
      accuracies: on the test images, of each seed.
      strength: of the penalty, as a multiple of the features' scale; the one that is best over all seeds.
      fewest: images of the smallest class where it has fewer than K, else 0.
    """

    shots: int
    accuracies: tuple[float, ...]
    strength: float
    fewest: int = 0

    @property
    def mean(self) -> float:
        """Of the seeds."""
        return statistics.fmean(self.accuracies)

    @property
    def deviation(self) -> float:
        """The sample standard deviation over seeds; 0 of one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0

    def row(self) -> dict[str, Any]:
        """For reports, in percent."""
        percent = lambda share: round(100 * share, 2)
        found = {"shots": self.shots, "accuracy": percent(self.mean), "deviation": percent(self.deviation)}
        found |= {"accuracies": list(map(percent, self.accuracies)), "strength": self.strength}
        return found | ({"smallest class": self.fewest} if self.fewest else {})


def check_shots(shots: Sequence[int], seeds: int) -> None:
    """Raises UserError for numbers that are none."""
    if not shots or min(shots) < 1 or len(set(shots)) < len(shots):
        raise UserError(f"--shots={','.join(map(str, shots))}: give different numbers from 1, as 1,2,4,8,16")
    if seeds < 1:
        raise UserError(f"--seeds={seeds} must be at least 1")


def few_shot(
    kind: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    classes: int,
    shots: Sequence[int],
    seeds: int,
    say: Callable[[str], None] | None = None,
) -> list[Shots]:
    """A probe for each number of shots and seed.

    The draw of a seed for K holds that for fewer. One penalty for each K is chosen, by images that no seed's draw has;
    where all images are drawn, its strength is 1.

    Args:
      kind: of `probes.KINDS`.
      train, test: ([N, D] features, [N] labels).
    """
    orders = [_order(train[1], seed) for seed in range(seeds)]
    found = []
    for count in shots:
        drawn = [order < count for order in orders]
        made = _of_one(kind, train, test, classes, drawn)
        fewest = int(np.bincount(train[1], minlength=classes).min())
        found.append(Shots(count, *made, fewest if fewest < count else 0))
        if say:
            say(f"{count} shots: {100 * found[-1].mean:.2f}% +- {100 * found[-1].deviation:.2f}")
    return found


def _order(labels, seed):
    """[N]: the place of each image in a random order of its class."""
    rng, places = np.random.default_rng(seed), np.empty(len(labels), int)
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        places[mine] = rng.permutation(len(mine))
    return places


def _of_one(kind, train, test, classes, drawn):
    """-> (accuracy on the test images of each seed, the chosen strength)."""
    judged, right = np.zeros((len(drawn), len(STRENGTHS))), np.zeros((len(drawn), len(STRENGTHS)))
    features, labels = train
    for i, mine in enumerate(drawn):
        rest = np.flatnonzero(~mine)
        judges = np.random.default_rng(i).permutation(rest)[:JUDGES]
        x, y = features[mine], labels[mine]
        scale = KINDS[kind].scale(x, np.bincount(y, minlength=classes))
        penalties = [strength * scale for strength in STRENGTHS]
        fits = KINDS[kind].path(x, y, classes, penalties, np.ones(len(x), bool))
        for j, linear in enumerate(fits):
            judged[i, j] = linear.accuracy(features[judges], labels[judges]) if len(judges) else STRENGTHS[j] == 1
            right[i, j] = linear.accuracy(*test)
    best = int(judged.mean(0).argmax())
    return tuple(right[:, best].tolist()), STRENGTHS[best]
