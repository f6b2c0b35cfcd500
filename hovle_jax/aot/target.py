"""A run's program, compiled for a topology."""

import dataclasses
import re
import time
import warnings

import jax

from hovle_jax.aot import programs
from hovle_jax.aot.remedies import remedies
from hovle_jax.aot.report import Report, report
from hovle_jax.config import RunConfig
from hovle_jax.errors import UserError
from hovle_jax.hardware import topology
from hovle_jax.sharding.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class Target:
    """What is compiled for: slices of a topology and their devices, one slice after the other."""

    topology: topology.Topology
    slices: int
    devices: tuple

    @classmethod
    def of(cls, name, slices=1):
        """By its cloud name. Raises UserError for a name that does not exist, or without libtpu."""
        return cls(topology.find(name), slices, tuple(topology.devices(name, slices)))

    @property
    def name(self):
        """'v5e-256', '2 x v5e-256'."""
        return f"{self.slices} x {self.topology.cloud_name}" if self.slices > 1 else self.topology.cloud_name


class TooLarge(UserError):
    """A program needs more memory than a device has: `needed` and `available` bytes, where the compiler tells them."""

    def __init__(self, message, needed=None, available=None):
        super().__init__(message)
        self.needed, self.available = needed, available


def compile_for(config: RunConfig, target: Target, program="train", new_tokens=512) -> Report:
    """Compiles and reads the program.

    Raises:
      TooLarge: it does not fit; the message has the size and the cheapest remedies.
      UserError: see `programs.lower`.
    """
    started = time.perf_counter()
    run = programs.set_up(config, make_mesh(config.mesh, target.devices))
    lowered = programs.lower(config, run, program, new_tokens)
    try:
        with warnings.catch_warnings():  # what is compiled for absent devices cannot be read from jax's cache
            warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
            options = run.compiler_options() if program == "train" else {}
            compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed, available = _sizes(str(error))
        size = f"{needed / 1e9:.1f} GB of {available / 1e9:.1f} GB" if needed else "more memory than there is"
        what = f"{config.stage}:{config.preset} {program} on {target.name}"
        ways = "; ".join(remedies(config, run, target, program))
        raise TooLarge(f"{what} needs {size} a device. Cheapest remedies: {ways}", needed, available) from None
    seconds = time.perf_counter() - started
    return report(config, run, compiled, target.topology, target.slices, program, seconds)


def _sizes(text):
    """Bytes needed and available, from the compiler's message; (None, None) without.

    "Used 20.52G of 15.75G hbm", or "... HLO temporaries (107.55G) exceeds available HBM (15.75G)".
    """
    size = r"([\d.]+)([KMGT]?)"
    found = re.search(rf"Used {size} of {size} hbm|\({size}\) exceeds available HBM \({size}\)", text)
    if not found:
        return None, None
    unit = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    needed, needed_unit, available, available_unit = [group for group in found.groups() if group is not None]
    return float(needed) * unit[needed_unit], float(available) * unit[available_unit]
