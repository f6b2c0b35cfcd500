"""The mesh and the one table that maps logical axes to it.

Everything that lives on a device (parameters, gradients, moments, activations, batches, caches) derives from this
table. The axes of a mesh are `data, fsdp, tensor, sequence`, the outermost first: over several slices of TPUs `data`
goes over them, so that gradients alone travel through the data-centre network.
"""

import contextlib
import math

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hovle_jax.config import MeshConfig
from hovle_jax.errors import UserError
from hovle_jax.model.parallel import FSDP, GRADIENTS, MOMENTS, partition_spec, torus_phases

AXES = ("data", FSDP, "tensor", "sequence")

# Rows of the batch lie over both data axes, a row's length over `sequence`.
ACTIVATIONS = (("batch", ("data", FSDP)), ("length", "sequence"), ("embed_act", None))

PARAMETERS = (
    # The axis that every layer's kernel has is cut by fsdp, the parallel one by tensor.
    ("embed", FSDP),
    ("embed_out", None),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    # Small or scanned: whole everywhere.
    ("embed_vector", None),
    ("patch", None),
    ("positions", None),
    ("special_tokens", None),
    ("layers", None),
)

# What `fsdp` cuts, and from which level of ZeRO on (Rajbhandari et al. 2020, section 5): rows of the same table, named
# as the parameters' with this behind.
ZERO = {MOMENTS: 1, GRADIENTS: 2, "": 3}


def rules(zero=3):
    """The table: {logical axis: mesh axis, tuple of them, or None}.

    Args:
      zero: what is cut along `fsdp`: 0 nothing, 1 the optimizer's moments, 2 gradients too, 3 parameters too.
    """
    table = dict(ACTIVATIONS)
    for suffix, level in ZERO.items():
        table |= {name + suffix: None if axes == FSDP and zero < level else axes for name, axes in PARAMETERS}
    return table


def make_mesh(config: MeshConfig, devices=None):
    """A mesh over all devices; the sizes are those of each slice, and `data` is multiplied by the number of slices.

    Raises:
      UserError: the axes do not multiply to the number of devices of a slice.
    """
    devices = jax.devices() if devices is None else devices
    slices = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    size = len(devices) // len(slices)
    sizes = [getattr(config, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or known < 1 or size % known or (-1 not in sizes and known != size):
        axes = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
        where = f"{size} devices" + f" of each of {len(slices)} slices" * (len(slices) > 1)
        raise UserError(
            f"mesh {axes} does not cover {where}; make the sizes multiply to {size}, "
            "with at most one -1 for 'what is left'"
        )
    sizes = [size // known if axis == -1 else axis for axis in sizes]
    parts = [np.asarray(sorted(part, key=_place)).reshape(sizes) for _, part in sorted(slices.items())]
    return Mesh(np.concatenate(parts), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _place(device):
    """Where a device is in its slice: neighbours on the torus become neighbours on the mesh. Elsewhere its id."""
    if not hasattr(device, "coords"):
        return (device.id,)
    return (*device.coords, getattr(device, "core_on_chip", 0))


def torus(mesh):
    """Sizes of the physical dimensions that the `fsdp` axis runs over, outermost first; (size,) where none are known.

    Devices of a TPU slice have coordinates. Along `fsdp` they must count up like the digits of a number.
    """
    line = mesh.devices[0, :, 0, 0]
    coordinates = np.asarray([_place(device) for device in line])
    sizes = [len(np.unique(column)) for column in coordinates.T]
    order = sorted((d for d, size in enumerate(sizes) if size > 1), key=lambda d: _period(coordinates[:, d]))[::-1]
    phases = tuple(sizes[d] for d in order)
    if not phases or math.prod(phases) != len(line):
        return (len(line),)
    ranks = [np.unique(coordinates[:, d], return_inverse=True)[1] for d in order]
    return phases if np.array_equal(np.indices(phases).reshape(len(phases), -1), ranks) else (len(line),)


def _period(column):
    """After how many devices a coordinate changes first."""
    return int(np.argmax(column != column[0]))


@contextlib.contextmanager
def on_mesh(mesh, zero=3):
    """Within it, logical constraints act (`with mesh:` alone would silently ignore them)."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(rules(zero).items())), torus_phases(torus(mesh)):
        yield


def specs_of(boxed, mesh, zero=3, suffix=""):
    """PartitionSpecs for a tree of abstract parameters that carry logical axes.

    An axis whose size a mesh axis does not divide stays whole; `layout.describe` reports it.

    Args:
      zero: see `rules`; suffix: of `ZERO`: what the specs are for.
    """
    return jax.tree.map(lambda leaf: spec_of(leaf, mesh, zero, suffix)[0], boxed, is_leaf=is_boxed)


def spec_of(leaf, mesh, zero=3, suffix=""):
    """One of `specs_of` -> (PartitionSpec, rules that cannot apply: see `partition_spec`)."""
    names, shape = (leaf.names, leaf.value.shape) if is_boxed(leaf) else ((None,) * leaf.ndim, leaf.shape)
    return partition_spec([name and name + suffix for name in names], shape, dict(mesh.shape), rules(zero))


def is_boxed(leaf):
    """Whether a leaf carries logical axes."""
    return isinstance(leaf, nn.LogicallyPartitioned)


def batch_sharding(mesh):
    """Rows over the data axes; what is inside a row is cut by constraints in the model."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def cache_shardings(cache, mesh):
    """NamedShardings of a tree of caches: keys and values [N, B, S, K, C], lengths [B]."""
    names = {5: ("layers", "batch", None, "kv_heads", None), 1: ("batch",)}
    spec = lambda leaf: partition_spec(names[leaf.ndim], leaf.shape, dict(mesh.shape), rules())[0]
    return jax.tree.map(lambda leaf: NamedSharding(mesh, spec(leaf)), cache)


def check_batch_shape(batch_size, length, mesh):
    """Raises UserError when rows do not divide over the data axes, or a row's length over `sequence`."""
    parts = mesh.shape["sequence"]
    if length % parts:
        nearest = -(-length // parts) * parts
        raise UserError(f"data.sequence_length={length} must divide by mesh.sequence={parts}: use {nearest}")
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % parts:
        nearest = -(-batch_size // parts) * parts
        raise UserError(f"data.batch_size={batch_size} must divide by {parts} devices (data x fsdp): use {nearest}")


def put_batch(batch, mesh):
    """The global batch on the devices, from a host's numpy rows of it (`distributed.host_rows`)."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh), batch)
