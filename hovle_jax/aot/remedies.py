"""What takes less memory, for a program that does not fit: sizes that surely fit, and the command that finds flags."""

from hovle_jax.aot.program import Program
from hovle_jax.model.transformer import REMATS
from hovle_jax.sharding.rules import FSDP


def remedies(program: Program, needed: float, available: float) -> list[str]:
    """What takes less than so many bytes of a device, each with what it changes."""
    sizes, beside, target, config = program.sizes, program.beside, program.target, program.config
    held = sum(sizes.values()) + sum(beside.values())  # whatever the flags of the execution are
    too_much = needed + sum(beside.values()) - available
    of_rows = "cache" if "cache" in sizes else "batch"
    of_batch = sizes[of_rows] + sum(size for what, size in beside.items() if "batch" in what)
    found = []
    if program.kind == "train" and held <= available and config.execution.remat != REMATS[-1]:
        found.append("--plan (compiles ways to run the step, and says which fit)")
    if config.execution.zero < 3 and program.run.placement.mesh.shape[FSDP] > 1:
        found.append("--config.execution.zero=3 (parameters and gradients sharded too)")
    if rows := _fewer_rows(config, program.run, too_much / of_batch if of_batch else 1):
        found.append(f"--config.data.batch_size={rows} (fits: its {of_rows} takes {of_batch / 1e9:.1f} GB of a device)")
    if more := _larger(target, held, too_much):
        found.append(f"--topology={more.name.split(' x ')[-1]} ({more.chips} chips a slice instead of {target.chips})")
    return found


def _fewer_rows(config, run, share):
    """The most rows with which this share of the batch is saved; 0: there are none."""
    unit = run.placement.batch_shards * max(config.execution.accumulate, 1)
    return int((1 - share) * config.data.batch_size) // unit * unit if 0 < share < 1 else 0


def _larger(target, held, too_much):
    """The smallest larger slice on which what is held, sharded over its chips, takes so much less; else the largest."""
    more = target.larger()
    while more and more.larger() and held * (1 - target.chips / more.chips) < too_much:
        more = more.larger()
    return more
