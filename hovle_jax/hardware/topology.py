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

from hovle_jax.errors import UserError

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
    """What the slices of a TPU generation have in common.

    Attributes:
      cores_per_chip: as its names count them.
      devices_per_chip: as JAX sees them.
      max_chips: of the largest slice.
      dimensions: of its torus.
      ring: an axis of a multiple of it is a ring, a shorter one a line.
      chip_config: libtpu's name for how the cores of a chip work together; 'megacore': as one device.
      aliases: other spellings of its name.
    """

    cores_per_chip: int
    devices_per_chip: int
    max_chips: int
    dimensions: int
    ring: int
    chip_config: str = "default"
    aliases: tuple[str, ...] = ()


GENERATIONS = {
    "v4": Generation(2, 1, 4096, 3, 4, "megacore"),
    "v5e": Generation(1, 1, 256, 2, 16, aliases=("v5litepod", "v5lite")),
    "v5p": Generation(2, 1, 6144, 3, 4),
    "v6e": Generation(1, 1, 256, 2, 16),
    "tpu7x": Generation(2, 2, 9216, 3, 4, aliases=("v7x", "7x")),
}
_FLAT_SHAPES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL_SHAPES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
CHIPS_PER_HOST = 4


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: `shape` is its chips along each axis of the torus."""

    generation: str
    shape: tuple[int, ...]

    @property
    def chips(self):
        return math.prod(self.shape)

    @property
    def devices(self):
        """As JAX sees them."""
        return self.chips * GENERATIONS[self.generation].devices_per_chip

    @property
    def hosts(self):
        """Machines with a process of JAX each; one alone may have eight chips (v5e, v6e)."""
        single = len(self.shape) == 2 and self.chips <= 8
        return 1 if single else max(1, self.chips // CHIPS_PER_HOST)

    @property
    def libtpu_name(self):
        """'v5e:16x16'."""
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def cloud_name(self):
        """'v5e-256'; of several shapes with as many chips, all have the same."""
        return f"{self.generation}-{self.chips * GENERATIONS[self.generation].cores_per_chip}"

    @property
    def links(self):
        """Links of a chip that a collective over the whole slice can keep busy: two along a ring, one along a line.

        A line's end has one link alone, through which all must pass that it gets.
        """
        ring = GENERATIONS[self.generation].ring
        # In three dimensions optical switches close the rings of whole cubes of 4x4x4 chips only.
        closed = len(self.shape) == 2 or all(size % ring == 0 for size in self.shape)
        return sum((2 if closed and size % ring == 0 else 1) for size in self.shape if size > 1)


def find(name):
    """'v5e-256', 'v5litepod-256' or 'v5e:16x16' -> Topology. Raises UserError for what does not exist."""
    text = name.strip().lower()
    found = re.fullmatch(r"([a-z0-9]+)(?:-(\d+)|:(\d+(?:x\d+)+))", text)
    generation = found and _generation(found.group(1))
    if not generation:
        raise UserError(f"{name!r} is no TPU slice; name one as 'v5e-256' or 'v5e:16x16', of {', '.join(GENERATIONS)}")
    if found.group(3):
        return _checked(Topology(generation, tuple(int(size) for size in found.group(3).split("x"))))
    slices, wanted = _slices(generation), int(found.group(2)) / GENERATIONS[generation].cores_per_chip
    if wanted in slices:
        return Topology(generation, slices[int(wanted)])
    raise UserError(f"{name!r} is no slice that {generation} has; the nearest are {_nearest(generation, wanted)}")


def larger(topology: Topology):
    """The next larger slice of the same generation, or None."""
    slices = _slices(topology.generation)
    more = [chips for chips in sorted(slices) if chips > topology.chips]
    return Topology(topology.generation, slices[more[0]]) if more else None


def _generation(text):
    """A generation's name from any of its spellings, or None."""
    spellings = {alias: name for name, g in GENERATIONS.items() for alias in (name, *g.aliases)}
    return spellings.get(text)


@functools.cache
def _slices(generation):
    """{chips: shape}; of several shapes with as many chips the most compact one, which is the cloud's default."""
    g = GENERATIONS[generation]
    if g.dimensions == 2:
        return {math.prod(shape): shape for shape in _FLAT_SHAPES}
    sizes = range(4, 33, 4)
    cubes = [s for s in itertools.combinations_with_replacement(sizes, 3) if math.prod(s) <= g.max_chips]
    compact = sorted(cubes, key=sum, reverse=True)
    return {math.prod(shape): shape for shape in (*_SMALL_SHAPES, *compact)}


def _checked(topology):
    """A topology given by its shape. Raises UserError for what libtpu refuses."""
    g = GENERATIONS[topology.generation]
    *most, last = topology.shape if g.dimensions == 3 else (*topology.shape, 1)
    whole_hosts = all(size % 2 == 0 for size in most) or topology.shape == (1, 1)
    if len(topology.shape) == g.dimensions and last > 0 and whole_hosts and 0 < topology.chips <= g.max_chips:
        return topology
    raise UserError(
        f"{topology.libtpu_name} does not exist: {topology.generation} has {g.dimensions} axes, hosts of 2x2 chips and "
        f"at most {g.max_chips} chips a slice; the nearest are {_nearest(topology.generation, topology.chips)}"
    )


def _nearest(generation, chips):
    """Names of the three slices whose size is nearest."""
    sizes = sorted(_slices(generation), key=lambda size: abs(math.log(size / max(chips, 1))))[:3]
    return ", ".join(Topology(generation, _slices(generation)[size]).cloud_name for size in sorted(sizes))


def has_libtpu():
    """Whether the compiler for TPUs is installed."""
    return importlib.util.find_spec("libtpu") is not None


def devices(name, slices=1):
    """The abstract devices of `slices` slices, one after the other, to compile for.

    Raises:
      UserError: an unknown name, or libtpu is not installed.
    """
    topology = find(name)
    if not has_libtpu():
        raise UserError(
            f"compiling for {topology.cloud_name} needs libtpu, which compiles on any machine; "
            "install it by jax's own choice of version: pip install 'hovle_jax[tpu]'"
        )
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    options = {"chip_config_name": GENERATIONS[topology.generation].chip_config}
    options |= {"num_slices": slices} if slices > 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=topology.libtpu_name, **options).devices
