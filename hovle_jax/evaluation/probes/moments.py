"""Sums over features that linear probes start from: the mean, the Gram matrix, sums by class.

Products over all images are float32 on the device; what is made of their small results is float64 on the host.

Letters: N images, D width of the features, C classes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Moments:
    """Of features about their mean; float64.

    Attributes:
      mean: [D].
      gram: [D, D], the sum of x xᵀ over images, x about the mean.
      sums: [D, C], the sum of x over the images of each class.
      counts: [C] images of each class.
    """

    mean: np.ndarray
    gram: np.ndarray
    sums: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, labels: np.ndarray, classes: int) -> "Moments":
        """Of [N, D] features and [N] labels below `classes`."""
        mean, gram, sums = _moments(jnp.asarray(features, jnp.float32), jnp.asarray(labels), classes)
        as_double = lambda array: np.asarray(array, np.float64)
        counts = np.bincount(labels, minlength=classes).astype(np.float64)
        return cls(as_double(mean), as_double(gram), as_double(sums), counts)


def bend(counts: np.ndarray) -> float:
    """How curved a softmax is where only the classes' frequencies are known: the mean of share (1 - share)."""
    shares = counts / counts.sum()
    return float((shares * (1 - shares)).mean())


@jax.jit(static_argnames="classes")
def _moments(features, labels, classes):
    mean = features.mean(0)
    centred = features - mean
    sums = jax.ops.segment_sum(centred, labels, classes).T
    return mean, jnp.matmul(centred.T, centred, precision="highest"), sums


def check_features(features: np.ndarray, labels: np.ndarray, classes: int) -> None:
    """Raises UserError for features that no probe can be fitted to."""
    if features.ndim != 2 or len(features) != len(labels):
        raise UserError(
            f"features {features.shape} and {len(labels)} labels do not go together: one row for each label"
        )
    if not np.isfinite(features).all():
        bad = int((~np.isfinite(features).all(1)).sum())
        raise UserError(f"{bad} of {len(features)} rows of features have a number that is not finite")
    found = np.unique(labels)
    if len(found) < 2 or found[0] < 0 or found[-1] >= classes:
        raise UserError(f"the labels {found[:5].tolist()} are no 2 or more classes of {classes}")
