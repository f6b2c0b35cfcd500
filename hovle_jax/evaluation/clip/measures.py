"""How good a classifier's choices are, and how far its probabilities can be believed. Numpy alone.

Letters: N images, C classes.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from hovle_jax.evaluation.wilson import wilson_interval

BINS = 15  # of confidence, as in Guo et al. 2017


@dataclasses.dataclass(frozen=True)
class Choices:
    """What a classifier made of images.

    Attributes:
      labels: [N] the right classes.
      chosen: [N] the likeliest ones.
      ranks: [N] how many classes were likelier than the right one.
      confidences: [N] the probability of the chosen one.
    """

    labels: np.ndarray
    chosen: np.ndarray
    ranks: np.ndarray
    confidences: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """[N] bool."""
        return self.ranks == 0

    def top(self, count: int) -> float:
        """The share of images whose class is among the `count` likeliest."""
        return float(np.mean(self.ranks < count))

    def per_class(self, classes: int) -> np.ndarray:
        """[C] the accuracy on the images of each class; not a number where it has none."""
        totals = np.bincount(self.labels, minlength=classes)
        with np.errstate(invalid="ignore"):
            return np.bincount(self.labels, self.right, classes) / totals

    def confusion(self, classes: int) -> np.ndarray:
        """[C, C] int64: images of the class of the row that were taken for that of the column."""
        pairs = self.labels.astype(np.int64) * classes + self.chosen
        return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)

    def confused(self, most: int) -> list[tuple[int, int, int]]:
        """The commonest mistakes [(class, taken for, images)], without a table of all pairs."""
        pairs = np.stack([self.labels, self.chosen], axis=1)[~self.right]
        if not len(pairs):
            return []
        found, counts = np.unique(pairs, axis=0, return_counts=True)
        order = np.argsort(-counts, kind="stable")[:most]
        return [(int(found[i][0]), int(found[i][1]), int(counts[i])) for i in order]

    def calibration(self) -> "Calibration":
        """See there."""
        return Calibration.of(self.confidences, self.right)

    def scores(self, classes: int) -> dict[str, Any]:
        """{name: number}: percents, with 95% intervals (Wilson's), and the calibration error as a share."""
        count, found = len(self.labels), {}
        for k in (1, 5):
            if k < classes:
                low, high = wilson_interval(round(self.top(k) * count), count)
                found[f"top-{k}"] = round(100 * self.top(k), 2)
                found[f"top-{k} 95% interval"] = [round(100 * low, 2), round(100 * high, 2)]
        found["mean of classes"] = round(100 * float(np.nanmean(self.per_class(classes))), 2)
        found["calibration error"] = round(self.calibration().error, 4)
        return found


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy, in bins of equal width.

    Guo et al. 2017, "On calibration of modern neural networks", section 2: bin b holds confidences in
    ((b - 1) / B, b / B]; the expected calibration error is sum over b of n_b / N * |accuracy_b - confidence_b|.

    Attributes:
      counts: [B] images of each bin.
      confidences, accuracies: [B] their means; 0 in an empty bin.
    """

    counts: np.ndarray
    confidences: np.ndarray
    accuracies: np.ndarray

    @classmethod
    def of(cls, confidences: np.ndarray, right: np.ndarray, bins: int = BINS) -> "Calibration":
        """Of probabilities [N] and whether each choice was right [N]."""
        places = np.clip(np.ceil(np.asarray(confidences, np.float64) * bins).astype(int) - 1, 0, bins - 1)
        counts = np.bincount(places, minlength=bins)
        mean = lambda values: np.bincount(places, values, bins) / np.maximum(counts, 1)
        return cls(counts, mean(confidences), mean(right))

    @property
    def error(self) -> float:
        """The expected calibration error."""
        gaps = np.abs(self.accuracies - self.confidences)
        return float(np.sum(self.counts * gaps) / max(1, np.sum(self.counts)))


def named(pairs: Sequence[tuple[int, int, int]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Mistakes as JSON."""
    return [{"class": names[a], "taken for": names[b], "images": n} for a, b, n in pairs]
