"""What a linear probe has learned."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Linear:
    """A classifier of features.

    Attributes:
      weights: [D, C] float32.
      bias: [C] float32.
    """

    weights: np.ndarray
    bias: np.ndarray

    @classmethod
    def about(cls, mean: np.ndarray, weights: np.ndarray, basis: np.ndarray | None = None) -> "Linear":
        """Of float64 weights of features about their mean [D]: [D + 1, C], the last row the bias.

        Args:
          basis: [D, r] for weights [r + 1, C] of features that were projected onto it.
        """
        slopes = weights[:-1] if basis is None else basis @ weights[:-1]
        return cls(slopes.astype(np.float32), (weights[-1] - mean @ slopes).astype(np.float32))

    def logits(self, features: np.ndarray) -> np.ndarray:
        """[N, D] float32 -> [N, C] float32."""
        return np.asarray(_logits(features, self.weights, self.bias))

    def accuracy(self, features: np.ndarray, labels: np.ndarray) -> float:
        """The share of images whose class has the largest logit, from 0 to 1."""
        return float((self.logits(features).argmax(1) == labels).mean())


@jax.jit
def _logits(features, weights, bias):
    return jnp.matmul(features, weights, precision="highest") + bias
