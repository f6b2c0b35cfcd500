"""Compiles a run's program for TPUs that are not there, and reads it."""

import math
import re
import time
import warnings

import jax

from hovle_jax.aot.program import Program
from hovle_jax.aot.remedies import remedies
from hovle_jax.aot.report import Report, read
from hovle_jax.config import RunConfig
from hovle_jax.errors import UserError
from hovle_jax.hardware.chips import chip_of
from hovle_jax.hardware.topology import Topology


class TooLarge(UserError):
    """A program needs more memory than a device has."""

    needed: float | None = None  # bytes, where the compiler tells them


def compile_for(
    config: RunConfig, target: Topology, kind: str = "train", new_tokens: int = 512, with_forecast: bool = True
) -> Report:
    """Compiles and reads a `Program`.

    Raises:
      TooLarge: it does not fit; the message has the size and what takes less.
      UserError: see `Program.of` and `Program.arguments`.
    """
    started, program = time.perf_counter(), Program.of(config, target, kind, new_tokens)
    lowered = program.lower()
    try:
        with warnings.catch_warnings():  # what is compiled for absent devices cannot be read from jax's cache
            warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
            compiled = lowered.compile(compiler_options=program.options())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise _too_large(program, str(error)) from None
    return read(compiled, program, time.perf_counter() - started, with_forecast)


def _too_large(program, text):
    needed, available = _sizes(text)
    told = f"{needed / 1e9:.1f} GB of {available / 1e9:.1f} GB a device" if needed else "more memory than a device has"
    told += "".join(f", with {what} of {size / 1e9:.1f} GB beside it" for what, size in program.beside.items())
    config, target = program.config, program.target
    available = available or chip_of(target.generation).hbm_bytes / target.kind.devices_per_chip
    ways = "; ".join(remedies(program, needed or math.inf, available)) or "nothing that a flag could change"
    what = f"{config.stage}:{config.preset} {program.kind} on {target.name}"
    too_large = TooLarge(f"{what} needs {told}. What takes less: {ways}")
    too_large.needed = needed
    return too_large


def _sizes(text):
    """Bytes needed and available, from the compiler's message; (None, None) without.

    "Used 20.52G of 15.75G hbm", or "... HLO temporaries (107.55G) exceeds available HBM (15.75G)".
    """
    size = r"([\d.]+[KMGT]?)"
    found = re.search(rf"Used {size} of {size} hbm|\({size}\) exceeds available HBM \({size}\)", text)
    bytes_of = lambda text: float(text.rstrip("KMGT")) * 2 ** (10 * " KMGT".find(text[-1]) if text[-1] in "KMGT" else 0)
    return tuple(bytes_of(group) for group in found.groups() if group) if found else (None, None)
