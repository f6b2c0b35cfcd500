"""Matrix products over sharded kernels, with their collectives written out.

The compiler's own choice for fully sharded kernels depends on the topology: on a 16 x 16 slice of TPU v5e it sums whole
gradients with all-reduce, which moves twice the bytes of a reduce-scatter and holds them unsharded. So a product over a
mesh is a `shard_map` here: gather the kernel's shards, multiply, and in the backward pass gather again, multiply, and
reduce-scatter. Everything between two products is left to the compiler.

Dimension letters: B batch, L tokens, D input width, F output width.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

FSDP = "fsdp"
# The rows of the rules table for these are named as the parameters' with this behind.
GRADIENTS, MOMENTS = ":gradients", ":moments"

LARGE_SHARD = 128 * 1024  # bytes from which a gather goes over two dimensions of the torus at once

_phases = contextvars.ContextVar("torus_phases", default=())


@contextlib.contextmanager
def torus_phases(sizes):
    """Within it, collectives over `fsdp` go along one dimension of the torus after another, large gathers along two.

    Args:
      sizes: of the dimensions that the axis is laid over, outermost first; a function of the mesh.
    """
    token = _phases.set(tuple(sizes))
    try:
        yield
    finally:
        _phases.reset(token)


def as_axes(rule):
    """A rule's mesh axes as a tuple: None, a name, or a tuple of names."""
    return () if rule is None else (rule,) if isinstance(rule, str) else tuple(rule)


def partition_spec(names, shape, mesh_shape, rules):
    """The mesh axes of an array whose dimensions have logical names.

    Args:
      names: a logical name or None for each dimension.
      mesh_shape: {mesh axis: size}.
      rules: {logical name: mesh axis, tuple of them, or None}.
    Returns:
      (PartitionSpec, [(name, size, mesh axes, parts) of rules that cannot apply: the parts do not divide the size]).
    """
    spec, refused, used = [], [], set()
    for name, size in zip(names, shape, strict=True):
        axes = tuple(a for a in as_axes(rules.get(name)) if mesh_shape.get(a, 1) > 1 and a not in used)
        parts = math.prod(mesh_shape[a] for a in axes)
        if size % parts:
            refused.append((name, size, axes, parts))
            axes = ()
        used.update(axes)
        spec.append(axes[0] if len(axes) == 1 else axes or None)
    while spec and spec[-1] is None:  # the compiler's own spelling: a step's outputs then fit the next one's inputs
        spec.pop()
    return PartitionSpec(*spec), refused


def current_spec(names, shape):
    """`partition_spec` under the mesh and the rules of the context; a mesh axis that cannot apply is left out."""
    mesh_shape = dict(jax.sharding.get_abstract_mesh().shape)
    return partition_spec(names, shape, mesh_shape, dict(nn.get_logical_axis_rules()))[0]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one product [..., D] x [D, F] lies on the mesh.

    Attributes:
      x, kernel, gradient, out: PartitionSpecs.
      rows, contraction, features: mesh axes that cut x's leading dimensions, D of x, and F of the result.
      sharded: the dimension of the kernel that fsdp cuts, or None; scattered: the same of its gradient.
      phases: see `torus_phases`.
    """

    x: PartitionSpec
    kernel: PartitionSpec
    gradient: PartitionSpec
    out: PartitionSpec
    rows: tuple
    contraction: tuple
    features: tuple
    sharded: int | None
    scattered: int | None
    phases: tuple

    @classmethod
    def of(cls, x_shape, kernel_shape, names):
        """The plan for x of that shape and a kernel with these logical names."""
        kernel = current_spec(names, kernel_shape)
        gradient = current_spec([name and name + GRADIENTS for name in names], kernel_shape)
        axes = [as_axes(axis) for axis in padded(kernel, 2)]
        sharded, scattered = _dimension_of_fsdp(kernel), _dimension_of_fsdp(gradient)
        contraction, features = (tuple(a for a in part if a != FSDP) for part in axes)
        leading = padded(current_spec(row_names(len(x_shape)), x_shape), len(x_shape))[:-1]
        join = lambda part: part[0] if len(part) == 1 else part or None
        return cls(
            x=PartitionSpec(*leading, join(contraction)),
            kernel=kernel,
            gradient=gradient,
            out=PartitionSpec(*leading, join(features)),
            rows=tuple(a for part in leading for a in as_axes(part)),
            contraction=contraction,
            features=features,
            sharded=sharded,
            scattered=scattered,
            phases=_phases.get(),
        )

    def gradient_shard(self, shape):
        """The shape of a device's part of the gradient, from that of its part of the kernel."""
        if self.scattered is None or self.sharded is not None:
            return shape
        return tuple(n // jax.lax.axis_size(FSDP) if i == self.scattered else n for i, n in enumerate(shape))


def on_devices(local, in_specs, out_specs):
    """`local` on each device's parts of its arguments; as it is where no mesh is set, or one of a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local
    # Kernels and gathered shards do not say over which axes they vary.
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def axis_index(axes):
    """The place of this device along mesh axes taken as one; 0 along none."""
    return jax.lax.axis_index(axes) if axes else 0


def row_names(ndim):
    """Logical names of activations: [rows, D], or [B, L, ..., D]."""
    return (("batch",) if ndim == 2 else ("batch", "length") + (None,) * (ndim - 3)) + (None,)


def padded(spec, ndim):
    """A spec as a tuple of one entry for each dimension."""
    return tuple(spec) + (None,) * (ndim - len(spec))


def _dimension_of_fsdp(spec):
    return next((i for i, axis in enumerate(spec) if FSDP in as_axes(axis)), None)


def matmul(x, kernel, names):
    """x [..., D] @ kernel [D, F] -> [..., F], in the type of x.

    Args:
      names: the kernel's logical axes. Under a mesh its shards are gathered for the product and forgotten.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _local_matmul(x, kernel)  # whose gradient is the compiler's own business
    return _sharded_matmul(Plan.of(x.shape, kernel.shape, names), x, kernel)


def _local_matmul(x, kernel):
    # Rows as one dimension: the gradient of the kernel then contracts one instead of two, which the CPU backend does
    # markedly faster.
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sharded_matmul(plan, x, kernel):
    return _forward(plan, x, kernel)[0]


def _forward(plan: Plan, x, kernel):
    def local(x, kernel):
        out = _local_matmul(x, gather(kernel, plan.sharded, plan.phases))
        return jax.lax.psum(out, plan.contraction) if plan.contraction else out

    return on_devices(local, (plan.x, plan.kernel), plan.out)(x, kernel), (x, kernel)


def _backward(plan: Plan, saved, dy):
    def local(x, kernel, dy):
        rows, dy_rows = (a.reshape(-1, a.shape[-1]) for a in (x, dy))
        dx = (dy_rows @ gather(kernel, plan.sharded, plan.phases).T).reshape(x.shape)
        if plan.features:
            dx = jax.lax.psum(dx, plan.features)
        return dx, reduce_gradient(rows.T @ dy_rows, plan.rows, plan.scattered, plan.phases)

    specs = (plan.x, plan.kernel, plan.out)
    return on_devices(local, specs, (plan.x, plan.gradient))(*saved, dy)


_sharded_matmul.defvjp(_forward, _backward)


def gather(kernel, dimension, phases):
    """A kernel whole, from its shards along `dimension` (None: it is not cut); inside a `shard_map`.

    Args:
      phases: sizes of the torus' dimensions under fsdp.
    """
    if dimension is None:
        return kernel
    # Over two dimensions at once it uses the links of both. But below this size, and over three, the TPU compiler makes
    # it an all-reduce of the whole, twice the bytes. The last phase, which brings the most, is over two.
    if kernel.size * kernel.dtype.itemsize >= LARGE_SHARD:
        phases = (math.prod(phases[:2]), *phases[2:])
    for groups in reversed(_groups(jax.lax.axis_size(FSDP), phases)):
        kernel = jax.lax.all_gather(kernel, FSDP, axis=dimension, axis_index_groups=groups, tiled=True)
    return kernel


def reduce_gradient(gradient, rows, dimension, phases):
    """Sums a kernel's local gradient over the mesh axes that cut the rows; inside a `shard_map`.

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
    """For each phase the groups of indices that differ in that dimension alone; the parts end in the axis' order."""
    if math.prod(phases) != size or len([p for p in phases if p > 1]) < 2:
        return [None]
    made, inner = [], size
    for phase in phases:
        inner //= phase
        starts = [outer * phase * inner + i for outer in range(size // (phase * inner)) for i in range(inner)]
        made.append([[start + k * inner for k in range(phase)] for start in starts])
    return made


def dot_general(names):
    """`matmul` as the dot_general of a Linen Dense."""

    def dot(x, kernel, dimension_numbers, precision=None, preferred_element_type=None):
        assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ()))
        return matmul(x, kernel, names)

    return dot
