"""A ring of the devices that rows are sharded over: what one holds visits all the others, a block at a time."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from hovle_jax.sharding.matmul import axis_index
from hovle_jax.sharding.mesh import per_shard, sizes

# Visits are steps of a loop, so that a program does not grow with the ring.
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
        size = 1
        for axis in self.axes:
            size *= sizes(self.mesh)[axis] if self.mesh else 1
        return size

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

        Args:
          visit: (home, block, results, source) -> (home, results): what a device does with the block of device `source`.
          home: stays on its device.
          block: travels, and never changes; sent size - 1 times.
          results: travels with its block, changed by every visit, and comes back; sent `size` times.
        Returns:
          (home, results) after all visits, the results those of the device's own block.
        """
        index, size = self.index(), self.size
        if size == 1:
            return visit(home, block, results, index)
        following = [(i, (i + 1) % size) for i in range(size)]
        send = lambda tree: jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, self.axes, following), tree)

        def step(carry, i):
            home, block, results = carry
            home, results = visit(home, block, results, (index - i) % size)
            return (home, send(block), send(results)), None

        (home, block, results), _ = jax.lax.scan(step, (home, block, results), jnp.arange(size - 1, dtype=jnp.int32))
        home, results = visit(home, block, results, (index + 1) % size)
        return home, send(results)
