"""How a model is run: nothing here changes its parameters.

A module names the logical axes of its arrays and leaves to `Execution.placement` where they lie: whole on one device
here, sharded over a mesh by `sharding.placement.Placement`, which has the same methods.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint

LogicalAxes = Sequence[str | None]  # one name for each dimension; None: never sharded
Multiply = Callable[[jax.Array, jax.Array], jax.Array]  # x [..., D] and kernel [D, F] -> [..., F]


class OneDevice:
    """All arrays whole on one device."""

    def matmul(self, x: jax.Array, kernel: jax.Array, axes: LogicalAxes, multiply: Multiply | None = None) -> jax.Array:
        """x [..., D] @ kernel [D, F] -> [..., F], in the type of x.

        Args:
          axes: the kernel's.
          multiply: what does it on one device in the forward pass, `local_matmul` by default.
        """
        return (multiply or local_matmul)(x, kernel)

    def constrain(self, x: jax.Array, axes: LogicalAxes) -> jax.Array:
        """x, laid out by its axes."""
        return x

    def shards(self, axes: LogicalAxes, shape: Sequence[int]) -> tuple[int, ...]:
        """In how many shards each dimension of an array lies."""
        return (1,) * len(shape)

    def per_shard(
        self, local: Callable, inputs: Sequence[tuple], out_axes: LogicalAxes, out_shape: Sequence[int]
    ) -> Any:
        """local(*arrays) on each device's shards of its inputs.

        Args:
          inputs: (array, axes, shape) each; the shape is what decides whether shards divide an axis. In an array's
            place may be a pytree that knows how it is sharded, by a method `manual_sharding_spec` as splash's kernels.
        """
        return local(*(array for array, *_ in inputs))


def local_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., D] @ kernel [D, F] on one device.

    Rows are one dimension: the kernel's gradient then contracts one instead of two, which the CPU backend does
    markedly faster.
    """
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def row_major(x: jax.Array) -> jax.Array:
    """x, laid out in its dimensions' order.

    Of what a matmul contracts over rows libtpu would rather have the rows innermost, and turns it in passes over memory
    of their own, although matrix units take it as it is.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the modules of a model are run.

    Attributes:
      dtype: compute type, 'float32' or 'bfloat16'.
      attention: of `attention.IMPLEMENTATIONS`.
      unroll_layers: write the layers out instead of looping over them.
      remat: of `transformer.REMATS`, or names of `transformer.KEPT`: what the backward pass finds kept.
      placement: where arrays lie.
      int8: decoder layers multiply in int8 in the forward pass (`model.int8`).
    """

    dtype: str = "float32"
    attention: str = "xla"
    unroll_layers: bool = False
    remat: str = "none"
    placement: OneDevice = OneDevice()
    int8: bool = False

    def row_major(self, x: jax.Array) -> jax.Array:
        """`row_major` where the layers run on TPUs, as splash attention does alone; elsewhere x."""
        return row_major(x) if self.attention == "splash" else x

    def dot_general(self, axes: LogicalAxes, multiply: Multiply | None = None) -> Callable:
        """The placement's matmul as the dot_general of a Linen Dense whose kernel has these axes."""

        def dot(x, kernel, dimension_numbers, precision=None, preferred_element_type=None):
            assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ()))
            return self.placement.matmul(x, kernel, axes, multiply)

        return dot
