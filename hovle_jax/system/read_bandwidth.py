"""How fast a device reads its memory, which decoding is measured against."""

import statistics
import time

import jax
import jax.numpy as jnp

ON_CPU, ON_ACCELERATOR = 1.0, 8.0  # GB; on an accelerator more, where starting a product counts
REPETITIONS = 5
COLUMNS = 4096


def read_bandwidth(gigabytes: float | None = None) -> float:
    """Bytes a second that a float32 matrix-vector product reads, the median of a few.

    Args:
      gigabytes: of the matrix; None = 1, or up to 8 on an accelerator, as far as they are free. Less than some tenths
        measure the processor's caches.
    """
    rows = max(1, int((_size() if gigabytes is None else gigabytes) * 1e9 / 4 / COLUMNS))
    matrix, vector = jnp.ones((rows, COLUMNS), jnp.float32), jnp.ones(COLUMNS)
    product = jax.jit(lambda m, v: m @ v)
    product(matrix, vector).block_until_ready()
    seconds = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        product(matrix, vector).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return matrix.nbytes / statistics.median(seconds)


def _size():
    if jax.default_backend() == "cpu":
        return ON_CPU
    memory = jax.local_devices()[0].memory_stats() or {}
    free = memory.get("bytes_limit", 0) - memory.get("bytes_in_use", 0)
    return min(ON_ACCELERATOR, max(ON_CPU, free / 2e9))
