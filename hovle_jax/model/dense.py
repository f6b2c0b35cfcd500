"""Matmuls with weights: the one dense layer of all models.

Dimension letters: D inputs, F outputs, r rank of an adapter.
"""

from collections.abc import Callable

import flax.linen as nn
import jax

from hovle_jax.model.adapters import MAGNITUDE, A, B, column_lengths
from hovle_jax.model.execution import Execution, LogicalAxes, Multiply


def partitioned(init: Callable, *names) -> Callable:
    """An initialiser whose parameter carries logical axis names; sharding/rules.py maps them to the mesh."""
    return nn.with_logical_partitioning(init, names)


class Dense(nn.Module):
    """x W + b, of a kernel W [D, F] with logical axes; where an adapter lies beside W, what it adds.

    Kernels start with a variance of 1 / fan-in, which at the paper's width of 2048 is the usual 0.02 and at small
    widths keeps the signal.

    Attributes:
      axes: of the kernel; the second is the bias's.
      branches: how many such outputs are added up in a residual stream.
      multiply: see `OneDevice.matmul`.
    """

    features: int
    axes: tuple[str | None, ...]
    execution: Execution
    use_bias: bool = False
    branches: int = 1
    multiply: Multiply | None = None

    @nn.compact
    def __call__(self, x):
        """[..., D] -> [..., F] in the compute type."""
        init = nn.initializers.variance_scaling(1.0 / self.branches, "fan_in", "normal")
        kernel = self.param("kernel", partitioned(init, *self.axes), (x.shape[-1], self.features))
        zeros = partitioned(nn.initializers.zeros, self.axes[1])
        bias = self.param("bias", zeros, (self.features,)) if self.use_bias else None
        x, kernel = (array.astype(self.execution.dtype) for array in (x, kernel))
        y = self._multiplied(x, kernel, self.axes, self.multiply)
        if self.has_variable("params", A):
            y = self._adapted(x, kernel, y)
        return y if bias is None else y + bias.astype(y.dtype)

    def _multiplied(self, x, kernel, axes, multiply=None):
        return self.execution.placement.matmul(x, kernel, axes, multiply)

    def _adapted(self, x, kernel, y):
        """y = x W, with the adapter that `adapters.attached` has put beside the kernel."""
        a, b = (self.get_variable("params", name).astype(x.dtype) for name in (A, B))
        y += self._multiplied(self._multiplied(x, a, (self.axes[0], None)), b, (None, self.axes[1]))
        if not self.has_variable("params", MAGNITUDE):
            return y
        magnitude = self.get_variable("params", MAGNITUDE)
        lengths = jax.lax.stop_gradient(column_lengths(kernel, a, b))
        return (y * (magnitude / lengths)).astype(x.dtype)


def dense(
    features: int,
    axes: LogicalAxes,
    name: str,
    execution: Execution,
    use_bias: bool = False,
    branches: int = 1,
    multiply: Multiply | None = None,
) -> Dense:
    """A `Dense` by name."""
    return Dense(features, tuple(axes), execution, use_bias, branches, multiply, name=name)
