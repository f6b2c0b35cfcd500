"""The mesh and the one table that maps logical axes to it.

ZeRO is a choice of rows: 'embed' -> fsdp shards parameters and optimizer state (ZeRO-3); mapped to nothing it leaves
plain data parallelism. Everything that lives on a device (parameters, moments, batches) derives from this table.
"""

import contextlib
import logging
import math

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hovle_jax.config import MeshConfig
from hovle_jax.errors import UserError
from hovle_jax.model.parallel import GRADIENTS, partition_spec, reduce_scatter_phases

AXES = ("data", "fsdp", "tensor", "sequence")

RULES = (
    # Activations: rows of the batch over both data axes; a row's length over `sequence`.
    ("batch", ("data", "fsdp")),
    ("length", "sequence"),
    ("embed_act", None),
    # Kernels: the axis that every layer has is sharded by fsdp, the parallel one by tensor.
    ("embed", "fsdp"),
    ("embed_out", None),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    # Small or scanned: replicated.
    ("embed_vector", None),
    ("patch", None),
    ("positions", None),
    ("layers", None),
)
# Gradients lie as their parameters do.
RULES += tuple((name + GRADIENTS, axes) for name, axes in RULES if name not in ("batch", "length", "embed_act"))

log = logging.getLogger(__name__)


def make_mesh(config: MeshConfig, devices=None):
    """A mesh over all devices. Raises UserError when the axes do not multiply to their number."""
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or known < 1 or len(devices) % known or (-1 not in sizes and known != len(devices)):
        axes = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
        raise UserError(
            f"mesh {axes} does not cover {len(devices)} devices; make the sizes multiply to {len(devices)}, "
            "with at most one -1 for 'what is left'"
        )
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def torus(mesh):
    """Sizes of the physical dimensions that the `fsdp` axis runs over, outermost first; (size,) where none are known.

    Devices of a TPU slice have coordinates. Along `fsdp` they must count up like the digits of a number.
    """
    line = mesh.devices[0, :, 0, 0]
    coordinates = np.asarray([getattr(device, "coords", (i,)) for i, device in enumerate(line)])
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
def on_mesh(mesh):
    """Within it, logical constraints act (`with mesh:` alone would silently ignore them)."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES), reduce_scatter_phases(torus(mesh)):
        yield


def shardings_of(boxed, mesh):
    """NamedShardings for a tree of abstract parameters that carry logical axes.

    An axis whose size a mesh axis does not divide stays whole, and is reported.
    """

    def one(path, leaf):
        is_boxed = isinstance(leaf, nn.LogicallyPartitioned)
        names, shape = (leaf.names, leaf.value.shape) if is_boxed else ((None,) * leaf.ndim, leaf.shape)
        spec, refused = partition_spec(names, shape, dict(mesh.shape), dict(RULES))
        for name, size, axes, parts in refused:
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            remedy = f"; vocab_multiple={parts} in model.llm and model.embedding pads it" * (name == "vocab")
            over = " x ".join(axes)
            log.warning(
                "%s: axis %s of %d is not divisible by %s=%d and stays whole%s", where, name, size, over, parts, remedy
            )
        return NamedSharding(mesh, spec)

    is_boxed = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=is_boxed)


def batch_sharding(mesh):
    """Rows over the data axes; what is inside a row is cut by constraints in the model."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


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
