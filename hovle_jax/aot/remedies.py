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
    unit = program.run.placement.batch_shards * max(config.execution.accumulate, 1)
    rows = int((1 - too_much / of_batch) * config.data.batch_size) // unit * unit if too_much < of_batch else 0
    if 0 < rows < config.data.batch_size:
        found.append(f"--config.data.batch_size={rows} (fits: its {of_rows} takes {of_batch / 1e9:.1f} GB of a device)")
    larger = target.larger()  # over whose chips what is held is sharded
    for more in [each for each in larger if held * (1 - target.chips / each.chips) >= too_much][:1] or larger[-1:]:
        found.append(f"--topology={more.name.split(' x ')[-1]} ({more.chips} chips a slice instead of {target.chips})")
    return found
