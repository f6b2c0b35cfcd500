"""The TPUs that a program was compiled for, as far as a forecast needs them: clocks, memory, links and places."""

import dataclasses

import jax
import numpy as np

from hovle_jax.aot.hlo.collectives import Collective
from hovle_jax.errors import UserError
from hovle_jax.hardware.chips import Chip, chip_of, key_of
from hovle_jax.hardware.topology import GENERATIONS, Topology

# For each chip that a message passes on its way within a slice (jax-ml.github.io/scaling-book/sharding).
HOP_SECONDS = 1e-6

# Cycles of a core, a second: the peak over what its matrix units multiply in a cycle. And by how much libtpu 0.0.50
# overestimates what streams through memory: the time that it expects of a product of an array and a number, over that
# of its bytes at the published bandwidth.
CORES = {
    "v4": (1.05e9, 2.54), "v5e": (1.5e9, 2.46), "v5p": (1.75e9, 2.76), "v6e": (1.75e9, 2.48), "tpu7x": (2.2e9, 2.65),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Machine:
    """Attributes: `places` is [devices, axes], where each device of the mesh lies in its slice."""

    topology: Topology
    places: np.ndarray

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> "Machine":
        """Raises UserError for a program for other devices than TPUs of known generations."""
        devices = _devices(compiled)
        key = key_of(kind := devices[0].device_kind)
        if key not in GENERATIONS:
            raise UserError(f"a forecast reads programs for {', '.join(GENERATIONS)}; this one is for {kind!r}")
        places = np.asarray([device.coords[: GENERATIONS[key].dimensions] for device in devices])
        slices = len({getattr(device, "slice_index", 0) for device in devices})
        return cls(Topology(key, tuple(map(int, places.max(0) + 1)), slices), places)

    @property
    def chip(self) -> Chip:
        return chip_of(self.topology.generation)

    @property
    def clock(self) -> float:
        return CORES[self.topology.generation][0]

    def estimated(self, cycles: int, flops: float) -> np.ndarray:
        """[low, high] seconds of libtpu's cycles: with memory and matrix units at their peaks, and as they are."""
        peak = self.chip.bf16_flops / self.topology.kind.devices_per_chip / self.clock  # FLOPs a cycle
        low = min(cycles, max(cycles / CORES[self.topology.generation][1], flops / peak))
        return np.asarray([low, cycles]) / self.clock

    def moved(self, size: int) -> float:
        """Seconds in which a device's memory gives or takes so many bytes."""
        return size * self.topology.kind.devices_per_chip / self.chip.hbm_bandwidth

    def seconds(self, c: Collective) -> float:
        """Of a collective that runs once, alone on its links: its bytes, and its way through the slice."""
        sent = c.wire_bytes * self.topology.kind.devices_per_chip  # by the chip, whose links its devices share
        if c.crosses_slices:
            return sent / self.chip.dcn_bandwidth
        extents = [len(np.unique(column)) for column in self.places[list(c.group)].T]
        links, hops = self.topology.ways(extents)
        links = links or 1 / (2 * self.topology.kind.dimensions)  # between the devices of a chip
        return sent / (self.chip.ici_bandwidth * links) + hops * HOP_SECONDS


def _devices(compiled):
    """In the order of the program's mesh."""
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    meshes = [sharding.mesh.devices.flat for sharding in shardings if hasattr(sharding, "mesh")]
    placed = meshes or [sorted(sharding.device_set, key=lambda device: device.id) for sharding in shardings]
    if not placed:
        raise UserError("a program without arguments and results does not tell for which devices it is")
    return list(max(placed, key=len))
