"""What takes less memory, for a program that does not fit: flags without promises, only those that change something."""

from hovle_jax.config import RunConfig
from hovle_jax.hardware.topology import Topology
from hovle_jax.model.transformer import REMATS
from hovle_jax.sharding.rules import FSDP
from hovle_jax.training.setup import Run
from hovle_jax.training.stages import find

VOCAB_CHUNK = 8192


def remedies(config: RunConfig, run: Run, target: Topology, program: str, sizes: dict[str, int]) -> list[str]:
    """Flags, each with what it changes.

    Args:
      run: that the program was lowered for.
      sizes: bytes of each of its arguments on a device.
    """
    of_rows = "batch" if program == "train" else "cache"
    found = _of_a_step(config, run) if program == "train" else []
    if config.data.batch_size > run.placement.batch_shards:
        size = sizes[of_rows] / 1e9
        found.append(f"a smaller --config.data.batch_size (its {of_rows} takes {size:.1f} GB of a device)")
    if more := target.larger():
        found.append(f"a larger --topology ({more.name} has {more.chips} chips a slice instead of {target.chips})")
    return found


def _of_a_step(config, run):
    e, stage, placement, found = config.execution, find(config.stage), run.placement, []
    rows = config.data.batch_size // placement.batch_shards  # of a device
    if stage.loss_weights and run.accumulate < rows:
        twice = 2 * run.accumulate
        other = f", or {twice}" if rows % twice == 0 and twice < rows else ""
        found.append(f"--config.execution.accumulate=-1 (a row of a device at a time{other})")
    if e.remat != REMATS[-1]:
        found.append(f"--config.execution.remat={REMATS[REMATS.index(e.remat) + 1]} (less kept, more recomputed)")
    if "llm" in stage.result and (e.vocab_chunk or config.model.llm.table_rows) > VOCAB_CHUNK:
        found.append(f"--config.execution.vocab_chunk={VOCAB_CHUNK} (fewer logits at a time)")
    if e.zero < 3 and placement.mesh.shape[FSDP] > 1:
        found.append("--config.execution.zero=3 (parameters and gradients sharded too)")
    return found
