"""Whether the flags that are commonly set for TPU training change the program that libtpu makes by itself.

    python tests/benchmarks/tpu_flags.py [--topologies v5e-256 v5p-128 v6e-256]

Compiles the training step of a small HoVLE, cut over all chips, plainly, with the flags on and with them off, and
compares the programs' instructions; or says what libtpu objects to them. Needs the extra `tpu` and no TPU.
"""

import argparse
import os
import re

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402

from hovle_jax.compilation import programs  # noqa: E402
from hovle_jax.compilation.target import Target  # noqa: E402
from hovle_jax.training.sharding import make_mesh  # noqa: E402
from tests.tpu_programs import small  # noqa: E402

# As MaxText and Google's recipes set them (github.com/AI-Hypercomputer: maxtext, tpu-recipes).
FLAGS = (
    "xla_tpu_enable_async_collective_fusion",  # collectives run beside products, inside one fusion
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather",  # all-gathers too
    "xla_tpu_enable_async_collective_fusion_multiple_steps",  # over several products
    "xla_tpu_overlap_compute_collective_tc",
    "xla_enable_async_all_gather",
    "xla_enable_async_collective_permute",
    "xla_tpu_enable_data_parallel_all_reduce_opt",
    "xla_tpu_data_parallel_opt_different_sized_ops",
)


def instructions(compiled):
    """A program's text without what only names it."""
    return re.sub(r"metadata=\{[^}]*\}", "", compiled.as_text())


def beside_products(text):
    """How many collectives run beside products on the same core, and how many on another core."""
    other = len(re.findall(r"call-start\([^\n]*async_execution_thread=\"sparsecore\"", text))
    return f"{text.count('async-collective-start')} collectives beside products, {other} on SparseCores"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--topologies", nargs="+", default=["v5e-256", "v5p-128", "v6e-256"])
    for name in parser.parse_args().topologies:
        target = Target.of(name)
        config = small("instruct", rows=len(target.devices), width=2048)
        lowered, _ = programs.lower(config, make_mesh(config.mesh, target.devices))
        plain = instructions(lowered.compile())
        print(f"{target.name}: no flags: {beside_products(plain)}", flush=True)
        for state in ("true", "false"):
            try:
                text = instructions(lowered.compile(compiler_options=dict.fromkeys(FLAGS, state)))
            except jax.errors.JaxRuntimeError as error:
                print(f"{target.name}: flags {state}: refused: {str(error)[:160]}", flush=True)
                continue
            same = "the same program" if text == plain else "another program"
            print(f"{target.name}: flags {state}: {same}, {beside_products(text)}", flush=True)


if __name__ == "__main__":
    main()
