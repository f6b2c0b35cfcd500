"""How the host's memory allocator is set up."""

import contextlib
import ctypes
import importlib.util
import os

from hovle_jax.system.accelerators import has_other_plugins, has_tpu

# Parameters of glibc's mallopt(3), and values with which a process keeps the memory that it frees.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
ONE_ARENA = ((ARENA_MAX, 1),)
KEEP = (*ONE_ARENA, (MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1))


def computes() -> bool:
    """Whether JAX will run on this machine's CPU; asks for no device, which would start the backend."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return not has_other_plugins() and (importlib.util.find_spec("libtpu") is None or not has_tpu())


def keep_freed_memory() -> bool:
    """Lets the process keep the memory that it frees, so that a run's steps can reuse it.

    XLA's CPU backend allocates a program's temporaries anew at every call. By default glibc maps such large blocks and
    returns them afterwards. So every step touches hundreds of megabytes of new pages, which the kernel has to clear: a
    quarter of the tiny preset's step time (`tests/benchmarks/step_memory.py`). One arena, because glibc returns the
    heaps of other arenas whatever the thresholds are. Call it before the backend starts its threads.

    Returns:
      Whether it was done: not on the host of an accelerator, and only if the C library is glibc.
    """
    return computes() and _set(KEEP)


def share_freed_memory() -> bool:
    """Lets all threads share one pool of freed memory; large blocks return to the system.

    For a process that streams files through: with one pool per reader and writer thread it needs half as much memory
    again (`tests/benchmarks/import_memory.py`). Returns whether the C library is glibc.
    """
    return _set(ONE_ARENA)


def give_back() -> None:
    """Returns freed memory to the system, of all arenas: each thread's would keep the size of its largest image."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class _Counts(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def kept_bytes() -> int:
    """Memory that the process has freed and kept, of its first arena: it can be used again; 0 where that is unknown."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return 0
    mallinfo2.restype = _Counts
    return mallinfo2().fordblks


def _set(parameters):
    try:
        mallopt = ctypes.CDLL(None).mallopt
        ctypes.CDLL(None).gnu_get_libc_version  # noqa: B018 (only glibc has it)
    except (AttributeError, OSError, TypeError):
        return False
    return all([mallopt(parameter, value) for parameter, value in parameters])
