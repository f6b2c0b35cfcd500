"""What takes less memory, for a program that does not fit: sizes that surely fit, and the command that finds flags."""

from hovle_jax.config import RunConfig
from hovle_jax.hardware.topology import Topology
from hovle_jax.model.transformer import REMATS
from hovle_jax.sharding.rules import FSDP
from hovle_jax.training.setup import Run


def remedies(
    config: RunConfig,
    run: Run,
    target: Topology,
    program: str,
    needed: float,
    available: float,
    arguments: dict[str, int],
    beside: dict[str, int],
) -> list[str]:
    """What takes less, each with what it changes.

    Args:
      needed, available: bytes of a device that the program takes, and that there are.
      arguments, beside: parts of what is needed, and what else a run holds meanwhile, by name.
    """
    held = sum(arguments.values()) + sum(beside.values())  # whatever the flags of the execution are
    too_much = needed + sum(beside.values()) - available
    of_rows = "cache" if "cache" in arguments else "batch"
    of_batch = arguments[of_rows] + sum(size for what, size in beside.items() if "batch" in what)
    found = []
    if program == "train" and held <= available and config.execution.remat != REMATS[-1]:
        found.append("--plan (compiles ways to run the step, and says which fit)")
    if config.execution.zero < 3 and run.placement.mesh.shape[FSDP] > 1:
        found.append("--config.execution.zero=3 (parameters and gradients sharded too)")
    if rows := _fewer_rows(config, run, too_much / of_batch if of_batch else 1):
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
