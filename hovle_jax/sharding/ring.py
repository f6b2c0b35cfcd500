"""Rings of the devices that rows are sharded over: what one holds visits all the others, a block at a time."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from hovle_jax.sharding.matmul import axis_index
from hovle_jax.sharding.mesh import per_shard, sizes

Visit = Callable[[Any, Any, Any, jax.Array], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Ring:
    """The devices along the mesh axes of rows; by default one device. Hashable.

    Attributes:
      mesh: None for one device.
      axes: mesh axes that shard the rows, outermost first; over other axes every device does the same.
    """

    mesh: Mesh | AbstractMesh | None = None
    axes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Devices of the ring."""
        return math.prod(sizes(self.mesh)[axis] for axis in self.axes) if self.mesh else 1

    @property
    def rows(self) -> PartitionSpec:
        """Of arrays [N, ...] of all rows."""
        return PartitionSpec(self.axes) if self.axes else PartitionSpec()

    def per_shard(self, local: Callable, in_specs: Sequence[PartitionSpec], out_specs: Any) -> Callable:
        """`local`, run on each device's shards."""
        return local if self.mesh is None else per_shard(self.mesh, local, in_specs, out_specs)

    def index(self) -> jax.Array:
        """The place of this device; inside of `per_shard`."""
        return jnp.asarray(axis_index(self.axes), jnp.int32)

    def sum(self, tree: Any) -> Any:
        """The sum over the devices; inside of `per_shard`."""
        return jax.lax.psum(tree, self.axes) if self.axes else tree

    def around(self, visit: Visit, home: Any, block: Any, results: Any) -> tuple[Any, Any]:
        """Every device's block visits every device, its own first; inside of `per_shard`.

        Rings of the innermost axis within rings of the next: between slices of TPUs, which the outermost axis goes
        over, each block travels once for each slice.

        Args:
          visit: (home, block, results, source) -> (home, results): what a device does with the block of a source.
          home: stays on its device.
          block: travels, and never changes; sent size - 1 times.
          results: travels with its block, changed by every visit, and comes back; sent along each axis once more.
        Returns:
          (home, results) after all visits, the results those of the device's own block.
        """
        return self._along(self.axes, visit, home, block, results, jnp.int32(0))

    def _along(self, axes, visit, home, block, results, source):
        """`source`: the place of the blocks' devices along the axes before these."""
        if not axes:
            return visit(home, block, results, source)
        assert self.mesh is not None
        axis, size = axes[0], sizes(self.mesh)[axes[0]]
        index, following = jax.lax.axis_index(axis), [(i, (i + 1) % size) for i in range(size)]
        send = lambda tree: jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, axis, following), tree)

        def visits(home, block, results, i):
            return self._along(axes[1:], visit, home, block, results, source * size + (index - i) % size)

        def step(carry, i):
            home, block, results = carry
            home, results = visits(home, block, results, i)
            return (home, send(block), send(results)), None

        carry, _ = jax.lax.scan(step, (home, block, results), jnp.arange(size - 1, dtype=jnp.int32))
        home, results = visits(*carry, size - 1)
        return home, send(results)
