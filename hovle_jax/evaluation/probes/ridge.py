"""Ridge regression on targets of +1 and -1, as scikit-learn's RidgeClassifier defines it, in closed form.

    minimise  |Y - X W - b|² + alpha |W|²         (b is not penalised: X and Y are taken about their means)

For one penalty by Cholesky, for several by one eigendecomposition; of the D x D Gram matrix, or of the N x N one where
there are fewer images than features. Gram matrices are float32 products, solved in float64.

Letters: N images, D width of the features, C classes.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from hovle_jax.evaluation.probes.linear import Linear
from hovle_jax.evaluation.probes.moments import Moments


def path(
    features: np.ndarray, labels: np.ndarray, classes: int, penalties: Sequence[float], used: np.ndarray
) -> Iterator[Linear]:
    """A fit for each penalty.

    Args:
      features: [N, D] float32.
      labels: [N] below `classes`.
      penalties: alpha in scikit-learn's words, above 0.
      used: [N] bool: the images that are fitted.
    """
    if not used.all():
        features, labels = features[used], labels[used]
    solve = _dual if len(features) < features.shape[1] else _primal
    yield from solve(features, labels, classes, penalties)


def _primal(features, labels, classes, penalties):
    """W = (XᵀX + alpha)⁻¹ XᵀY; of Y about its mean, XᵀY is twice the sums by class."""
    moments = Moments.of(features, labels, classes)
    for slopes in _solved(moments.gram, 2 * moments.sums, penalties):
        yield _linear(slopes, moments.mean, moments.counts)


def _dual(features, labels, classes, penalties):
    """W = Xᵀ(XXᵀ + alpha)⁻¹ Y, all in float64, as there are few images."""
    mean, counts = features.mean(0, dtype=np.float64), np.bincount(labels, minlength=classes)
    centred = features - mean
    targets = 2 * (np.eye(classes)[labels] - counts / counts.sum())
    for shares in _solved(centred @ centred.T, targets, penalties):
        yield _linear(centred.T @ shares, mean, counts)


def _linear(slopes, mean, counts):
    bias = 2 * counts / counts.sum() - 1
    return Linear.about(mean, np.concatenate([slopes, bias[None]]))


def _solved(gram, right, penalties):
    """(gram + penalty)⁻¹ right for each penalty; float64."""
    solution = (_by_cholesky if len(penalties) == 1 else _by_eigenvectors)(gram, right)
    return map(solution, penalties)


def _by_cholesky(gram, right):
    import scipy.linalg

    def at(penalty):
        whole = gram + penalty * np.eye(len(gram))
        scales = 1 / np.sqrt(np.diag(whole))  # a unit diagonal, for features of very different scales
        factor = scipy.linalg.cho_factor(scales[:, None] * whole * scales, overwrite_a=True, check_finite=False)
        return scales[:, None] * scipy.linalg.cho_solve(factor, scales[:, None] * right, check_finite=False)

    return at


def _by_eigenvectors(gram, right):
    values, vectors = np.linalg.eigh(gram)
    values, rotated = np.maximum(values, 0), vectors.T @ right
    return lambda penalty: vectors @ (rotated / (values + penalty)[:, None])
