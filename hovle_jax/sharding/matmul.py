"""Matmuls over sharded kernels, with their collectives written out.

The compiler's own choice for fully sharded kernels depends on the topology: on a 16 x 16 slice of TPU v5e it sums whole
gradients by all-reduce, which moves twice the bytes of a reduce-scatter and holds them unsharded. So a matmul over a
mesh is a `shard_map` here: all-gather the kernel's shards, multiply, and in the backward pass all-gather again,
multiply, and reduce-scatter. Everything between two matmuls is left to the compiler.

Dimension letters: B batch, L tokens, D input width, F output width.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from hovle_jax.model.execution import Multiply
from hovle_jax.sharding.mesh import per_shard, sizes
from hovle_jax.sharding.rules import FSDP, as_axes, padded

# An all-gather over two dimensions of the torus at once uses the links of both; but of one over more than SMALL_SLICE
# chips the TPU compiler makes an all-reduce of the whole, twice the bytes, where the whole has fewer bytes than LARGE.
SMALL_SLICE, LARGE = 32, 32 * 2**20


@dataclasses.dataclass(frozen=True)
class MatmulSharding:
    """How one matmul [..., D] x [D, F] lies on the mesh; by default on one device.

    Attributes:
      mesh: None for one device.
      x, kernel, gradient, out: PartitionSpecs.
      rows, contraction, features: mesh axes that shard x's leading dimensions, D of x, and F of the result.
      sharded: the dimension of the kernel that fsdp shards, or None; scattered: the same of its gradient.
      phases: sizes of the torus' dimensions under fsdp, outermost first (see `mesh.torus`).
    """

    mesh: Mesh | AbstractMesh | None = None
    x: PartitionSpec = PartitionSpec()
    kernel: PartitionSpec = PartitionSpec()
    gradient: PartitionSpec = PartitionSpec()
    out: PartitionSpec = PartitionSpec()
    rows: tuple[str, ...] = ()
    contraction: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    sharded: int | None = None
    scattered: int | None = None
    phases: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        mesh: Mesh | AbstractMesh,
        x: PartitionSpec,
        kernel: PartitionSpec,
        gradient: PartitionSpec,
        ndim: int,
        phases: tuple[int, ...],
    ) -> "MatmulSharding":
        """From the specs of x (with `ndim` dimensions), of the kernel and of its gradient."""
        contraction, features = (tuple(a for a in as_axes(axis) if a != FSDP) for axis in padded(kernel, 2))
        leading = padded(x, ndim)[:-1]
        join = lambda axes: axes[0] if len(axes) == 1 else axes or None
        return cls(
            mesh=mesh,
            x=PartitionSpec(*leading, join(contraction)),
            kernel=kernel,
            gradient=gradient,
            out=PartitionSpec(*leading, join(features)),
            rows=tuple(axis for entry in leading for axis in as_axes(entry)),
            contraction=contraction,
            features=features,
            sharded=_dimension_of_fsdp(kernel),
            scattered=_dimension_of_fsdp(gradient),
            phases=phases,
        )

    def gradient_shard(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a device's shard of the gradient, from that of its shard of the kernel; inside `per_shard`."""
        if self.scattered is None or self.sharded is not None:
            return tuple(shape)
        return tuple(n // jax.lax.axis_size(FSDP) if i == self.scattered else n for i, n in enumerate(shape))

    def per_shard(self, local: Callable, in_specs: Sequence, out_specs: Any) -> Callable:
        """`local` on each device's shards of its arguments; as it is on one device."""
        if self.mesh is None or math.prod(sizes(self.mesh).values()) == 1:
            return local
        return per_shard(self.mesh, local, in_specs, out_specs)


def _dimension_of_fsdp(spec):
    return next((i for i, axis in enumerate(spec) if FSDP in as_axes(axis)), None)


def axis_index(axes: Sequence[str]) -> Any:
    """The index of this device along mesh axes taken as one; 0 along none."""
    return jax.lax.axis_index(axes) if axes else 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sharded_matmul(sharding: MatmulSharding, multiply: Multiply, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., D] @ kernel [D, F] -> [..., F]; the kernel's shards are all-gathered for the matmul, not kept.

    Args:
      multiply: by a whole kernel, in the forward pass.
    """
    return _forward(sharding, multiply, x, kernel)[0]


def _forward(sharding: MatmulSharding, multiply, x, kernel):
    def local(x, kernel):
        out = multiply(x, gather(kernel, sharding.sharded, sharding.phases))
        return jax.lax.psum(out, sharding.contraction) if sharding.contraction else out

    return sharding.per_shard(local, (sharding.x, sharding.kernel), sharding.out)(x, kernel), (x, kernel)


def _backward(sharding: MatmulSharding, multiply, saved, dy):
    def local(x, kernel, dy):
        rows, dy_rows = (a.reshape(-1, a.shape[-1]) for a in (x, dy))
        dx = (dy_rows @ gather(kernel, sharding.sharded, sharding.phases).T).reshape(x.shape)
        if sharding.features:
            dx = jax.lax.psum(dx, sharding.features)
        return dx, reduce_gradient(rows.T @ dy_rows, sharding.rows, sharding.scattered, sharding.phases)

    specs = (sharding.x, sharding.kernel, sharding.out)
    return sharding.per_shard(local, specs, (sharding.x, sharding.gradient))(*saved, dy)


sharded_matmul.defvjp(_forward, _backward)


def gather(kernel: jax.Array, dimension: int | None, phases: Sequence[int]) -> jax.Array:
    """A kernel whole, from its shards along `dimension` (None: it is not sharded); inside a `shard_map`.

    Args:
      phases: sizes of the torus' dimensions under fsdp.
    """
    if dimension is None:
        return kernel
    # The last phase, which brings the most, is over two dimensions; over three it would be an all-reduce.
    size, both = jax.lax.axis_size(FSDP), math.prod(phases[:2])
    if both <= SMALL_SLICE or kernel.size * kernel.dtype.itemsize * size >= LARGE:
        phases = (both, *phases[2:])
    for groups in reversed(_groups(size, phases)):
        kernel = jax.lax.all_gather(kernel, FSDP, axis=dimension, axis_index_groups=groups, tiled=True)
    return kernel


def reduce_gradient(
    gradient: jax.Array, rows: Sequence[str], dimension: int | None, phases: Sequence[int]
) -> jax.Array:
    """Sums a kernel's local gradient over the mesh axes that shard the rows; inside a `shard_map`.

    Args:
      rows: mesh axes.
      dimension: along which this device keeps its shard of fsdp, or None for the whole.
      phases: sizes of the torus' dimensions under fsdp.
    """
    if dimension is not None:
        size = jax.lax.axis_size(FSDP)
        if FSDP not in rows:  # every device of fsdp has the same rows, and so the same gradient
            gradient = gradient / size
        # Along the outermost dimension: of one along the innermost the TPU compiler makes an all-reduce.
        gradient = jnp.moveaxis(gradient, dimension, 0)
        for groups in _groups(size, phases):
            gradient = jax.lax.psum_scatter(gradient, FSDP, scatter_dimension=0, axis_index_groups=groups, tiled=True)
        gradient = jnp.moveaxis(gradient, 0, dimension)
        rows = tuple(a for a in rows if a != FSDP)
    return jax.lax.psum(gradient, rows) if rows else gradient


def _groups(size, phases):
    """For each phase the groups of indices that differ in that dimension alone; shards end in the axis' order.

    Four devices in phases (2, 2): [[0, 2], [1, 3]], then [[0, 1], [2, 3]].
    """
    if math.prod(phases) != size or len([p for p in phases if p > 1]) < 2:
        return [None]
    made, inner = [], size
    for phase in phases:
        inner //= phase
        starts = [outer * phase * inner + i for outer in range(size // (phase * inner)) for i in range(inner)]
        made.append([[start + k * inner for k in range(phase)] for start in starts])
    return made
