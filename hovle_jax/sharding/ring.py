"""Rings of the devices that rows are sharded over: what one holds visits all the others, a block at a time."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
    def sizes(self) -> tuple[int, ...]:
        """Devices along each axis."""
        return tuple(sizes(self.mesh)[axis] for axis in self.axes) if self.mesh else ()

    @property
    def size(self) -> int:
        """Devices of the ring."""
        return math.prod(self.sizes)

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
          results: travels with its block, changed by every visit, and comes back: sent once more.
        Returns:
          (home, results) after all visits, the results those of the device's own block.
        """
        moved = jnp.zeros(len(self.axes), jnp.int32)  # how far the blocks have come along each axis
        home, _, results, _ = self._along(self.axes, visit, (home, block, results, moved))
        return home, self._back(results)

    def _along(self, axes, visit, carry):
        if not axes:
            home, block, results, moved = carry
            home, results = visit(home, block, results, self._source(moved))
            return home, block, results, moved
        axis, level = axes[0], len(self.axes) - len(axes)
        size = self.sizes[level]
        following = [(i, (i + 1) % size) for i in range(size)]
        send = lambda leaf: jax.lax.ppermute(leaf, axis, following)

        def step(carry, _):
            home, block, results, moved = self._along(axes[1:], visit, carry)
            return (home, *jax.tree.map(send, (block, results)), moved.at[level].add(1)), None

        carry, _ = jax.lax.scan(step, carry, length=size - 1)
        return self._along(axes[1:], visit, carry)

    def _source(self, moved):
        """The place of the device that the block here is from."""
        source = jnp.int32(0)
        for level, (axis, size) in enumerate(zip(self.axes, self.sizes)):
            source = source * size + (jax.lax.axis_index(axis) - moved[level]) % size
        return source

    def _back(self, results):
        """From where the last visit was: along an axis a ring of size s goes s - 1 steps, once in each ring outside."""
        if not self.axes:
            return results
        places = np.arange(self.size).reshape(self.sizes)
        moved = [math.prod(self.sizes[:level]) * (size - 1) for level, size in enumerate(self.sizes)]
        arrived = np.roll(places, moved, range(len(moved)))  # whose block lies there
        sends = list(zip(places.flat, arrived.flat))
        return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, self.axes, sends), results)
