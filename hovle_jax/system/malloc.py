"""How the host's memory is used when the host itself computes."""

import ctypes
import importlib.util
import os

from hovle_jax.system.accelerators import has_other_plugins, has_tpu

# glibc's mallopt(3) parameters, and values under which freed memory stays with the process.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
ONE_ARENA = ((ARENA_MAX, 1),)
KEEP = (*ONE_ARENA, (MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1))


def computes() -> bool:
    """Whether JAX will run on this machine's CPU; asks for no device, as that would start the backend."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return not has_other_plugins() and (importlib.util.find_spec("libtpu") is None or not has_tpu())


def keep_freed_memory() -> bool:
    """Lets the process keep what it frees, for the steps of a run to use again.

    XLA's CPU backend allocates a program's temporaries anew at every call. By default glibc maps such large blocks and
    returns them afterwards, so that every step touches, and the kernel clears, hundreds of megabytes of new pages: a
    quarter of the tiny preset's step time (`tests/benchmarks/step_memory.py`). One arena, because the heaps of the
    others are returned whatever the thresholds are. It must be called before the backend starts its threads.

    Returns:
      Whether it was done: not on an accelerator's host, and only where the C library is glibc.
    """
    return computes() and _set(KEEP)


def share_freed_memory() -> bool:
    """Threads take from one pool what any of them has freed; large blocks go back to the system.

    For a process that passes files through: with a pool for each thread of the readers and writers it takes half as
    much memory again (`tests/benchmarks/import_memory.py`). Returns whether the C library is glibc.
    """
    return _set(ONE_ARENA)


def _set(parameters):
    try:
        mallopt = ctypes.CDLL(None).mallopt
        ctypes.CDLL(None).gnu_get_libc_version  # noqa: B018 (only glibc has it)
    except (AttributeError, OSError, TypeError):
        return False
    return all([mallopt(parameter, value) for parameter, value in parameters])
