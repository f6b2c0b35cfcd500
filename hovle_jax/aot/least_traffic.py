"""The bytes that a step must send, whoever compiles it: what the sharding of its parameters asks for."""

import dataclasses
import math

import jax.numpy as jnp

from hovle_jax.sharding.rules import DATA, FSDP
from hovle_jax.training.setup import Run
from hovle_jax.training.stage import Stage


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that a device sends in a step.

    Attributes:
      fsdp: gathers of parameters and reduce-scatters of their gradients.
      data: sums of gradients over copies of the model, on several slices through the data-centre network.
    """

    fsdp: float
    data: float


def least_traffic(stage: Stage, run: Run) -> Traffic:
    """The least traffic of a training step over its microbatches, in the compute type.

    A parameter that fsdp shards n ways is gathered once for the forward pass and once for the backward pass, and its
    gradient is reduce-scattered: (n - 1) / n of its bytes each time. What gradients do not reach is gathered once; what
    they only pass through has no reduce-scatter. Over d copies of the model a gradient's shard is summed in
    2 (d - 1) / d of its bytes. Parameters that nothing reads cost nothing. Collectives of a tensor or sequence axis,
    which move activations, are not counted.
    """
    placement, config = run.placement, run.models.config
    width, copies = jnp.dtype(run.models.execution.dtype).itemsize, placement.mesh.shape[DATA]
    fsdp = data = 0.0
    for path, leaf in read_leaves(stage, run):
        shard = math.prod(placement.sharding(leaf.spec()).shard_shape(leaf.shape)) * width
        trained = stage.trains(path, config)
        if run.layout.is_sharded_by(path, FSDP):
            n = placement.mesh.shape[FSDP]
            passes = 1 + (trained or path[0] in stage.through) + trained
            fsdp += passes * (n - 1) * shard * run.accumulate
        if trained and copies > 1:
            data += 2 * (copies - 1) / copies * shard * run.accumulate
    return Traffic(fsdp, data)


def parameter_counts(stage: Stage, run: Run) -> tuple[int, int]:
    """-> (how many parameters a step reads, how many it trains)."""
    leaves = read_leaves(stage, run)
    trained = sum(leaf.size for path, leaf in leaves if stage.trains(path, run.models.config))
    return sum(leaf.size for _, leaf in leaves), trained


def read_leaves(stage: Stage, run: Run) -> list[tuple]:
    """The parameters that a stage reads: [(path, sharding.layout.Leaf)]."""
    return [(path, leaf) for path, leaf in run.layout.leaves if not stage.is_unused(path, run.models.config)]
