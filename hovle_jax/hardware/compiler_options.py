"""Options of libtpu under which a training step's collectives run beside its matmuls, by TPU generation.

What compiled programs show (`tests/benchmarks/tpu_flags.py`): for v5e libtpu makes gathers parts of the fusions that
multiply, and for tpu7x it hands gathers and scatters to the chip's SparseCores, both by default. v5p and v6e have
SparseCores too, but gathers and scatters stop the matmuls there unless these options are given; MaxText gives them
(https://github.com/AI-Hypercomputer/maxtext). v4 has no way.

On demand fusions of v6e may use 64 of its 128 MiB of vector memory, where libtpu's default is less: by its own estimate
a matmul of [4096, 2048] x [2048, 8192] takes 13% fewer cycles, and one of 8192 in all dimensions 14%. With MaxText's 96
MiB some take more, and a whole step of narrow feed-forward layers takes as many as before.
"""

from hovle_jax.hardware.chips import key_of

# A gather over two dimensions of the torus has an option of its own.
_TO_SPARSE_CORES = {
    f"xla_tpu_enable_sparse_core_collective_offload_{kind}": "true"
    for kind in ("all_gather", "2d_all_gather", "reduce_scatter")
}

SPARSE_CORES = {"v5p": _TO_SPARSE_CORES, "v6e": _TO_SPARSE_CORES}
SCOPED_VMEM = {
    key: {"xla_tpu_scoped_vmem_limit_kib": str(mebibytes * 1024)} for key, mebibytes in {"v5e": 32, "v6e": 64}.items()
}


def compiler_options(device_kind: str, sparse_cores: bool = True, scoped_vmem: bool = False) -> dict[str, str]:
    """{option: value} for `jax.jit` by what JAX calls the device ('TPU v6 lite'); empty where the default is best.

    Args:
      sparse_cores, scoped_vmem: whether options of the two kinds are wanted.
    """
    kinds = (SPARSE_CORES if sparse_cores else {}, SCOPED_VMEM if scoped_vmem else {})
    key = key_of(device_kind) or ""
    return {option: value for options in kinds for option, value in options.get(key, {}).items()}
