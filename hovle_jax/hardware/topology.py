"""TPU slices by the names that clouds give them: 'v5e-256' is libtpu's topology 'v5e:16x16', 256 chips on 64 hosts.

v4, v5p and tpu7x are named by their TensorCores, two a chip ('v5p-128': 64 chips); v5e and v6e by their chips.
Documentation: https://cloud.google.com/tpu/docs/v5e (and v4, v5p, v6e, tpu7x).
"""

import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from hovle_jax.errors import UserError

CHIPS_OF_A_HOST = 4  # a smaller slice is a part of one
# Read by libtpu when it is loaded: it then asks no metadata server, and several processes may compile at once.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # whatever is compiled for
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Generation:
    """What the slices of a TPU generation have in common."""

    cores_per_chip: int  # as its names count them
    devices_per_chip: int  # as JAX sees them
    max_chips: int  # of the largest slice
    dimensions: int  # of its torus
    ring: int  # an axis of a multiple of it is a ring, a shorter one a line
    chip_config: str = "default"  # libtpu's name for how a chip's cores work together; 'megacore': as one device
    aliases: tuple[str, ...] = ()  # other spellings of its name

    @functools.cached_property
    def shapes(self) -> dict[int, tuple[int, ...]]:
        """{chips: shape}; of several shapes with as many chips the most compact one, which is the cloud's default."""
        if self.dimensions == 2:
            return {math.prod(shape): shape for shape in _FLAT_SHAPES}
        cubes = itertools.combinations_with_replacement(range(4, 33, 4), 3)
        compact = sorted((shape for shape in cubes if math.prod(shape) <= self.max_chips), key=sum, reverse=True)
        return {math.prod(shape): shape for shape in (*_SMALL_SHAPES, *compact)}


GENERATIONS = {
    "v4": Generation(2, 1, 4096, 3, 4, "megacore"),
    "v5e": Generation(1, 1, 256, 2, 16, aliases=("v5litepod", "v5lite")),
    "v5p": Generation(2, 1, 6144, 3, 4),
    "v6e": Generation(1, 1, 256, 2, 16),
    "tpu7x": Generation(2, 2, 9216, 3, 4, aliases=("v7x", "7x")),
}
_FLAT_SHAPES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL_SHAPES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


@dataclasses.dataclass(frozen=True)
class Topology:
    """What is compiled for: slices of one shape, which is a slice's chips along each axis of the torus."""

    generation: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def kind(self) -> Generation:
        return GENERATIONS[self.generation]

    @property
    def chips(self) -> int:
        """Of a slice."""
        return math.prod(self.shape)

    @property
    def libtpu_name(self) -> str:
        """'v5e:16x16'."""
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def name(self) -> str:
        """The cloud's, 'v5e-256', whatever the shape; '2 x v5e-256'."""
        return f"{self.slices} x " * (self.slices > 1) + f"{self.generation}-{self.chips * self.kind.cores_per_chip}"

    def ways(self, extents: Sequence[int]) -> tuple[float, int]:
        """Among so many chips along each axis: the share of a chip's links that are busy, hops to the farthest chip.

        Links are two along a ring and one along a line, whose end has one link alone for all that it gets.
        """
        ring, shape = self.kind.ring, self.shape
        # In three dimensions optical switches close the rings of whole cubes of 4x4x4 chips only.
        closed = len(shape) == 2 or all(size % ring == 0 for size in shape)
        axes = [(n, closed and n == whole and n % ring == 0) for n, whole in zip(extents, shape) if n > 1]
        links = sum(2 if is_ring else 1 for _, is_ring in axes)
        return links / (2 * self.kind.dimensions), sum(n // 2 if is_ring else n - 1 for n, is_ring in axes)

    def larger(self) -> "list[Topology]":
        """The larger slices of the same generation, smallest first."""
        more = sorted(chips for chips in self.kind.shapes if chips > self.chips)
        return [Topology(self.generation, self.kind.shapes[chips], self.slices) for chips in more]

    def devices(self) -> list:
        """The abstract devices, one slice after the other. Raises UserError where libtpu is not installed."""
        if not has_libtpu():
            raise UserError(
                f"compiling for {self.name} needs libtpu, which compiles on any machine; "
                "install it by jax's own choice of version: pip install 'hovle_jax[tpu]'"
            )
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        from jax.experimental import topologies

        options: dict[str, Any] = {"chip_config_name": self.kind.chip_config}
        options |= {"num_slices": self.slices} if self.slices > 1 else {}
        if self.chips < CHIPS_OF_A_HOST:  # newer libtpus know
            options["chips_per_host_bounds"] = (*self.shape, 1, 1)[:3]
        return topologies.get_topology_desc(platform="tpu", topology_name=self.libtpu_name, **options).devices


def find(name: str, slices: int = 1) -> Topology:
    """'v5e-256', 'v5litepod-256' or 'v5e:16x16'. Raises UserError for what does not exist."""
    found = re.fullmatch(r"([a-z0-9]+)(?:-(\d+)|:(\d+(?:x\d+)+))", name.strip().lower())
    spellings = {alias: key for key, g in GENERATIONS.items() for alias in (key, *g.aliases)}
    generation = spellings.get(found.group(1)) if found else None
    if found is None or generation is None:
        raise UserError(f"{name!r} is no TPU slice; name one as 'v5e-256' or 'v5e:16x16', of {', '.join(GENERATIONS)}")
    if found.group(3):
        return _checked(Topology(generation, tuple(map(int, found.group(3).split("x"))), slices))
    shapes, chips = GENERATIONS[generation].shapes, int(found.group(2)) / GENERATIONS[generation].cores_per_chip
    if chips in shapes:
        return Topology(generation, shapes[int(chips)], slices)
    raise UserError(f"{name!r} is no slice that {generation} has; the nearest are {_nearest(generation, chips)}")


def _checked(topology):
    """A topology given by its shape. Raises UserError for what libtpu refuses."""
    g, shape = topology.kind, topology.shape
    whole_hosts = shape == (1, 1) or all(size % 2 == 0 for size in shape[:2])
    if len(shape) == g.dimensions and min(shape) > 0 and whole_hosts and topology.chips <= g.max_chips:
        return topology
    raise UserError(
        f"{topology.libtpu_name} does not exist: {topology.generation} has {g.dimensions} axes, hosts of 2x2 chips and "
        f"at most {g.max_chips} chips a slice; the nearest are {_nearest(topology.generation, topology.chips)}"
    )


def _nearest(generation, chips):
    """Names of the three slices whose size is nearest."""
    shapes = GENERATIONS[generation].shapes
    nearest = sorted(shapes, key=lambda size: abs(math.log(size / max(chips, 1))))[:3]
    return ", ".join(Topology(generation, shapes[size]).name for size in sorted(nearest))


def has_libtpu() -> bool:
    """Whether the compiler for TPUs is installed."""
    return importlib.util.find_spec("libtpu") is not None
