"""Which options let collectives run beside matmuls: libtpu's defaults, this project's, those that are often set.

    python -m tests.benchmarks.tpu_flags [--topologies v5e-256 v5p-128 v6e-256]

Compiles the training step of a small HoVLE, sharded over all chips, with each of them, and counts in the programs; or
says what libtpu objects to. Needs the extra `tpu` and no TPU.
"""

import argparse
import os
import re

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402

from hovle_jax.aot.program import Program  # noqa: E402
from hovle_jax.hardware import topology  # noqa: E402
from tests.tpu_programs import small  # noqa: E402

# As MaxText and Google's recipes set them (github.com/AI-Hypercomputer: maxtext, tpu-recipes).
FLAGS = (
    "xla_tpu_enable_async_collective_fusion",  # collectives run beside matmuls, inside one fusion
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather",  # all-gathers too
    "xla_tpu_enable_async_collective_fusion_multiple_steps",  # over several matmuls
    "xla_tpu_overlap_compute_collective_tc",
    "xla_enable_async_all_gather",
    "xla_enable_async_collective_permute",
    "xla_tpu_enable_data_parallel_all_reduce_opt",
    "xla_tpu_data_parallel_opt_different_sized_ops",
)


def beside_matmuls(text):
    """What runs beside matmuls: collectives inside fusions that multiply, and calls of the SparseCores."""
    calls = len(re.findall(r"call-start\([^\n]*async_execution_thread=\"sparsecore\"", text))
    return f"{text.count('async-collective-start')} collectives in matmuls, {calls} calls of SparseCores"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--topologies", nargs="+", default=["v5e-256", "v5p-128", "v6e-256"])
    for name in parser.parse_args().topologies:
        target = topology.find(name)
        config = small("instruct", rows=len(target.devices()), width=2048)
        program = Program.of(config, target)
        lowered = program.lower()
        often, never = (dict.fromkeys(FLAGS, state) for state in ("true", "false"))
        choices = {"default": {}, "ours": program.options(), "often set": often, "the same off": never}
        for choice, options in choices.items():
            try:
                said = beside_matmuls(lowered.compile(options).as_text())
            except jax.errors.JaxRuntimeError as error:
                said = f"refused: {str(error)[:160]}"
            print(f"{target.name}, {choice}: {said}", flush=True)


if __name__ == "__main__":
    main()
