"""What takes less memory, for a program that does not fit: flags, and of batches and slices sizes that fit."""

import dataclasses

from hovle_jax.config import RunConfig
from hovle_jax.hardware.topology import Topology
from hovle_jax.model.transformer import REMATS
from hovle_jax.sharding.rules import FSDP
from hovle_jax.training.setup import Run
from hovle_jax.training.stages import find

VOCAB_CHUNK = 8448


@dataclasses.dataclass(frozen=True)
class Excess:
    """What a program would take, in bytes of a device."""

    needed: float
    available: float  # what a device has
    arguments: dict[str, int]
    beside: int  # what else a run holds meanwhile
    rows: int  # of the arguments and of what lies beside, what grows with data.batch_size

    @property
    def too_much(self) -> float:
        return self.needed + self.beside - self.available

    @property
    def held(self) -> float:
        """What no flag of the execution changes."""
        return sum(self.arguments.values()) + self.beside


def remedies(config: RunConfig, run: Run, target: Topology, program: str, excess: Excess) -> list[str]:
    """What takes less, each with what it changes; of flags that do not fit by themselves, all together.

    Flags of the execution are named where the arguments alone would fit: the compiler alone can say what they save.
    """
    flags = _of_a_step(config, run) if program == "train" and excess.held <= excess.available else []
    found = [f"{flag} ({why})" for flag, why in flags]
    if len(flags) > 1:
        found.append(f"all of them: {' '.join(flag for flag, _ in flags)}")
    if flags:
        found.append("--plan, which compiles ways to run the step and says which fit")
    if config.execution.zero < 3 and run.placement.mesh.shape[FSDP] > 1:
        found.append("--config.execution.zero=3 (parameters and gradients sharded too)")
    if rows := _fewer_rows(config, run, excess):
        what = "cache" if "cache" in excess.arguments else "batch"
        found.append(f"--config.data.batch_size={rows} (fits: its {what} takes {excess.rows / 1e9:.1f} GB of a device)")
    if more := _larger(target, excess):
        found.append(f"--topology={more.name.split(' x ')[-1]} ({more.chips} chips a slice instead of {target.chips})")
    return found


def _fewer_rows(config, run, excess):
    """The most rows that surely fit, as what is not of rows grows with none; 0: there are none."""
    left = 1 - excess.too_much / excess.rows if excess.rows else 0
    unit = run.placement.batch_shards * max(config.execution.accumulate, 1)
    return int(left * config.data.batch_size) // unit * unit if 0 < left < 1 else 0


def _larger(target, excess):
    """The smallest larger slice on which the program surely fits: arguments are sharded over its chips."""
    more = target.larger()
    while more is not None and excess.held * (1 - target.chips / more.chips) < excess.too_much:
        if more.larger() is None:
            break
        more = more.larger()
    return more


def _of_a_step(config, run):
    """[(flag, what it changes)]."""
    e, stage, found = config.execution, find(config.stage), []
    rows = config.data.batch_size // run.placement.batch_shards  # of a device
    if stage.loss_weights and run.accumulate < rows:
        found.append(("--config.execution.accumulate=-1", "a row of a device at a time"))
    if e.remat != REMATS[-1]:
        less = REMATS[REMATS.index(e.remat) + 1] if e.remat in REMATS else "full"
        found.append((f"--config.execution.remat={less}", "less kept, more recomputed"))
    if "llm" in stage.result and (e.vocab_chunk or config.model.llm.table_rows) > VOCAB_CHUNK:
        found.append((f"--config.execution.vocab_chunk={VOCAB_CHUNK}", "fewer logits at a time"))
    return found
