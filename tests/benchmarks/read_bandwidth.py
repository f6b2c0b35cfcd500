"""How fast this machine reads memory, which decoding is measured against."""

import statistics
import time

import jax
import jax.numpy as jnp


def bandwidth():
    """Bytes a second that a matrix-vector product reads: of 1 GB, or 8 on an accelerator, where starting it counts."""
    gigabytes = 1.0 if jax.default_backend() == "cpu" else 8.0
    matrix = jnp.ones((int(gigabytes * 2.5e8) // 4096, 4096), jnp.float32)
    product, vector = jax.jit(lambda m, v: m @ v), jnp.ones(4096)
    product(matrix, vector).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(matrix, vector).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return matrix.nbytes / statistics.median(seconds)
