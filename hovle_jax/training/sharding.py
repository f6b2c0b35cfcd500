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


@contextlib.contextmanager
def on_mesh(mesh):
    """Within it, logical constraints act (`with mesh:` alone would silently ignore them)."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def shardings_of(boxed, mesh):
    """NamedShardings for a tree of abstract parameters that carry logical axes.

    An axis whose size a mesh axis does not divide stays whole, and is reported.
    """
    rules = dict(RULES)

    def one(path, leaf):
        names = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else (None,) * leaf.ndim
        shape = leaf.value.shape if isinstance(leaf, nn.LogicallyPartitioned) else leaf.shape
        spec = []
        for name, size in zip(names, shape):
            axis = rules[name] if name is not None else None
            parts = math.prod(mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ()))
            if size % parts:
                where = jax.tree_util.keystr(path, simple=True, separator="/")
                remedy = f"; vocab_multiple={parts} in model.llm and model.embedding pads it" * (name == "vocab")
                log.warning(
                    "%s: axis %s of %d is not divisible by %s=%d and stays whole%s",
                    where,
                    name,
                    size,
                    axis,
                    parts,
                    remedy,
                )
                axis = None
            spec.append(axis if parts > 1 else None)
        while spec and spec[-1] is None:  # the compiler's own spelling: a step's outputs then fit the next one's inputs
            spec.pop()
        return NamedSharding(mesh, PartitionSpec(*spec))

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
