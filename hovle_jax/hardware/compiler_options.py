"""Options of libtpu under which a training step's collectives run beside its matmuls, by TPU generation.

What compiled programs show (`tests/benchmarks/tpu_flags.py`): for v5e libtpu makes gathers parts of the fusions that
multiply, and for tpu7x it hands gathers and scatters to the chip's SparseCores, both by default. v5p and v6e have
SparseCores too, but gathers and scatters stop the matmuls there unless these options are given; MaxText gives them
(https://github.com/AI-Hypercomputer/maxtext). v4 has no way.
"""

from hovle_jax.hardware.chips import key_of

# A gather over two dimensions of the torus has an option of its own.
_TO_SPARSE_CORES = {
    f"xla_tpu_enable_sparse_core_collective_offload_{kind}": "true"
    for kind in ("all_gather", "2d_all_gather", "reduce_scatter")
}

COMPILER_OPTIONS = {"v5p": _TO_SPARSE_CORES, "v6e": _TO_SPARSE_CORES}


def compiler_options(device_kind: str) -> dict[str, str]:
    """{option: value} for `jax.jit` by what JAX calls the device ('TPU v6 lite'); empty where the default is best."""
    return COMPILER_OPTIONS.get(key_of(device_kind) or "", {})
