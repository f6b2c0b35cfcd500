"""What a mesh does to a model: where each array lies, by the rules table, and matmuls with their collectives."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from hovle_jax.errors import UserError
from hovle_jax.model.execution import LogicalAxes, Multiply, OneDevice, local_matmul
from hovle_jax.sharding.matmul import MatmulSharding, sharded_matmul
from hovle_jax.sharding.mesh import of_a_copy, per_shard, sizes, torus
from hovle_jax.sharding.ring import Ring
from hovle_jax.sharding.rules import Rule, as_axes, padded, partition_spec, rules

# Logical axes of what no module names: a batch's fields are sharded by rows, and what is inside a row by constraints in
# the model; keys and values of a cache are [N, B, S, K, C], its lengths [B].
BATCH_AXES = ("batch",)
CACHE_AXES = {5: ("layers", "batch", None, "kv_heads", None), 1: ("batch",)}


@dataclasses.dataclass(frozen=True)
class Placement(OneDevice):
    """Arrays on a mesh; hashable, so that a step can be compiled for it.

    Attributes:
      zero: what the mesh axis `fsdp` shards (see `rules`).
      in_copy: whether it is used inside a `shard_map` over `data`, where nothing is sharded along it or summed over it.
    """

    mesh: Mesh
    zero: int = 3
    in_copy: bool = False

    @functools.cached_property
    def phases(self) -> tuple[int, ...]:
        """See `mesh.torus`."""
        return torus(self.mesh)

    @functools.cached_property
    def view(self) -> Mesh | AbstractMesh:
        """The mesh, as the program that is traced sees it."""
        return of_a_copy(self.mesh) if self.in_copy else self.mesh

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """See `mesh.sizes`."""
        return sizes(self.view)

    @functools.cached_property
    def is_one_device(self) -> bool:
        return math.prod(self.sizes.values()) == 1

    def rules(self, use: str = "parameters") -> Mapping[str, Rule]:
        """The rows of the table for a use (see `rules.ZERO`)."""
        return rules(self.zero, use)

    def spec(self, axes: LogicalAxes, shape: Sequence[int], use: str = "parameters") -> PartitionSpec:
        """Of an array with these logical axes; a dimension that its shards do not divide stays whole."""
        return self.spec_and_refused(axes, shape, use)[0]

    def spec_and_refused(
        self, axes: LogicalAxes, shape: Sequence[int], use: str = "parameters"
    ) -> tuple[PartitionSpec, list[tuple]]:
        """-> (PartitionSpec, rules that cannot apply: see `partition_spec`)."""
        return partition_spec(axes, shape, self.sizes, self.rules(use))

    def sharding(self, spec: PartitionSpec = PartitionSpec()) -> NamedSharding:
        """Of arrays with this spec; without one they are whole on every device."""
        return NamedSharding(self.view, spec)

    # -- what modules ask for

    def matmul(self, x: jax.Array, kernel: jax.Array, axes: LogicalAxes, multiply: Multiply | None = None) -> jax.Array:
        if self.is_one_device:
            return (multiply or local_matmul)(x, kernel)  # whose gradient is the compiler's own business
        return sharded_matmul(self.matmul_sharding(x.shape, kernel.shape, axes), multiply or local_matmul, x, kernel)

    def matmul_sharding(self, x_shape: Sequence[int], kernel_shape: Sequence[int], axes: LogicalAxes) -> MatmulSharding:
        """How x [..., D] @ kernel [D, F] lies on the mesh, the kernel having these axes."""
        return MatmulSharding.of(
            mesh=self.view,
            x=self.spec(row_axes(len(x_shape)), x_shape),
            kernel=self.spec(axes, kernel_shape),
            gradient=self.spec(axes, kernel_shape, "gradients"),
            ndim=len(x_shape),
            phases=self.phases,
        )

    def constrain(self, x: jax.Array, axes: LogicalAxes) -> jax.Array:
        if self.is_one_device:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding(self.spec(axes, x.shape)))

    def shards(self, axes: LogicalAxes, shape: Sequence[int]) -> tuple[int, ...]:
        spec = self.spec(axes, shape)
        sizes = [math.prod(self.sizes.get(axis, 1) for axis in as_axes(entry)) for entry in spec]
        return (*sizes, *[1] * (len(shape) - len(sizes)))

    def per_shard(
        self, local: Callable, inputs: Sequence[tuple], out_axes: LogicalAxes, out_shape: Sequence[int]
    ) -> Any:
        if self.is_one_device:
            return local(*(array for array, *_ in inputs))
        specs = tuple(self._spec_of(*each) for each in inputs)
        run = per_shard(self.view, local, specs, self.spec(out_axes, out_shape))
        return run(*(array for array, *_ in inputs))

    def _spec_of(self, array, axes, shape):
        spec = self.spec(axes, shape)
        if not hasattr(array, "manual_sharding_spec"):
            return spec
        return array.manual_sharding_spec(NamedSharding(self.mesh, PartitionSpec(*padded(spec, len(axes)))))

    def ring(self, rows: int) -> Ring:
        """The devices that so many rows of vectors are sharded over."""
        axes = as_axes(padded(self.spec(("batch",), (rows,)), 1)[0])
        return Ring(None if self.is_one_device else self.view, axes)

    # -- batches and caches

    @property
    def batch_shards(self) -> int:
        """In how many shards the rows of a batch lie."""
        return math.prod(self.sizes.get(axis, 1) for axis in as_axes(self.rules()["batch"]))

    @property
    def length_shards(self) -> int:
        """In how many shards the tokens of a row lie."""
        return math.prod(self.sizes.get(axis, 1) for axis in as_axes(self.rules()["length"]))

    @property
    def batch_sharding(self) -> NamedSharding:
        return self.sharding(PartitionSpec(*(self.rules()[axis] for axis in BATCH_AXES)))

    def cache_shardings(self, cache: Any) -> Any:
        """NamedShardings of a tree of caches."""
        return jax.tree.map(lambda leaf: self.sharding(self.spec(CACHE_AXES[leaf.ndim], leaf.shape)), cache)

    def check_batch_shape(self, batch_size: int, length: int) -> None:
        """Raises UserError where rows, or the tokens of a row, do not divide over the mesh."""
        for key, size, axis, shards in (
            ("data.sequence_length", length, "length", self.length_shards),
            ("data.batch_size", batch_size, "batch", self.batch_shards),
        ):
            if size % shards:
                over = " x ".join(as_axes(self.rules()[axis]))
                raise UserError(
                    f"{key}={size} must divide by {shards} devices (mesh {over}): use {-(-size // shards) * shards}"
                )

    def put_batch(self, batch: Any) -> Any:
        """The global batch on the devices, from a host's numpy rows of it (`hosts.distributed.host_rows`)."""
        return jax.make_array_from_process_local_data(self.batch_sharding, batch)


def row_axes(ndim: int) -> LogicalAxes:
    """Logical axes of activations: [rows, D], or [B, L, ..., D]."""
    return (("batch",) if ndim == 2 else ("batch", "length") + (None,) * (ndim - 3)) + (None,)
