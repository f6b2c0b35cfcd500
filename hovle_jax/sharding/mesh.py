"""The mesh: devices along the axes of the rules table, neighbours on a TPU's torus as neighbours on the mesh."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from hovle_jax.config import MeshConfig
from hovle_jax.errors import UserError
from hovle_jax.sharding.rules import AXES, DATA


def make_mesh(config: MeshConfig, devices: Sequence | None = None) -> Mesh:
    """A mesh over all devices; the sizes are those of each slice, and `data` is multiplied by the number of slices.

    Raises:
      UserError: the axes do not multiply to the number of devices of a slice.
    """
    devices = jax.devices() if devices is None else devices
    slices = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    sizes = _sizes(config, len(devices) // len(slices), len(slices))
    blocks = [np.asarray(sorted(block, key=_place)).reshape(sizes) for _, block in sorted(slices.items())]
    return Mesh(np.concatenate(blocks), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _sizes(config, devices, slices):
    """The sizes of the axes over the devices of a slice."""
    sizes = [getattr(config, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or known < 1 or devices % known or (-1 not in sizes and known != devices):
        axes = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
        where = f"{devices} devices" + f" of each of {slices} slices" * (slices > 1)
        raise UserError(
            f"mesh {axes} does not cover {where}; make the sizes multiply to {devices}, "
            "with at most one -1 for 'what is left'"
        )
    return [devices // known if size == -1 else size for size in sizes]


def _place(device):
    """Where a device is in its slice: neighbours on the torus become neighbours on the mesh. Elsewhere its id."""
    if not hasattr(device, "coords"):
        return (device.id,)
    return (*device.coords, getattr(device, "core_on_chip", 0))


def torus(mesh: Mesh) -> tuple[int, ...]:
    """Sizes of the physical dimensions that the `fsdp` axis runs over, outermost first; (size,) where none are known.

    Devices of a TPU slice have coordinates. Along `fsdp` they must count up like the digits of a number: on a 2 x 4
    slice 00 01 02 03 10 11 12 13 gives (2, 4).
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


def of_a_copy(mesh: Mesh) -> AbstractMesh:
    """What a program sees of the mesh inside a `shard_map` over `data`: the devices that hold one copy of a model."""
    return mesh.abstract_mesh.update_axis_types({DATA: AxisType.Manual})


def sizes(mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """{axis: size} of the axes that arrays can be sharded along: inside a `shard_map` not those that it goes over."""
    return {axis: mesh.shape[axis] for axis, kind in zip(mesh.axis_names, mesh.axis_types) if kind != AxisType.Manual}


def per_shard(mesh: Mesh | AbstractMesh, local: Callable, in_specs: Sequence, out_specs: Any) -> Callable:
    """`jax.shard_map` over all `sizes`; what comes out says not over which axes it varies, as kernels do not."""
    over = {"axis_names": set(sizes(mesh)), "check_vma": False}
    return jax.shard_map(local, mesh=mesh, in_specs=tuple(in_specs), out_specs=out_specs, **over)
