"""The bytes that a step must send, whoever compiles it: what the sharding of its parameters asks for."""

import math

import jax.numpy as jnp

from hovle_jax.config import RunConfig
from hovle_jax.sharding.rules import DATA, FSDP
from hovle_jax.training.setup import Run
from hovle_jax.training.stages import find

FLOAT32 = 4  # bytes


def least_traffic(config: RunConfig, run: Run) -> dict[str, float]:
    """Bytes that a device must send in a training step over its microbatches, in the compute type.

    Returns:
      {'fsdp': to gather parameters and to sum gradients within a copy of the model, 'data': to sum them over copies, on
      several slices through the data-centre network}.

    A kernel that fsdp shards n ways is gathered once for the forward pass and once for the backward pass of each
    microbatch, and its gradient is reduce-scattered: (n - 1) / n of its bytes each time. What no gradient passes
    through (a vector, what reads pixels, a teacher) is not gathered again; what is not trained has no gradient. A
    gradient that is whole on n devices is summed over them once a step, 2 (n - 1) / n of its bytes, and so is a shard
    of it over d copies, in float32 where these have accumulated it by themselves. Of a token table the vectors that a
    device looks up move, and back as gradients, and not the table (a tied one is a head too). A loss that compares all
    rows shows each device the vectors of all others; its microbatches are encoded once more before that. Nothing is
    counted for parameters that nobody reads, and for a tensor or sequence axis, which moves activations.
    """
    stage, placement, sizes = find(config.stage), run.placement, run.models.config
    width = jnp.dtype(run.models.execution.dtype).itemsize
    n, copies = placement.mesh.shape[FSDP], placement.mesh.shape[DATA]
    over_copies = FLOAT32 / width if run.sums_once else 1
    encoded_first = stage.compared is not None and run.accumulate > 1
    fsdp = data = 0.0
    length = config.clip.text.context if stage.compared and config.clip else config.data.sequence_length
    tokens = config.data.batch_size // placement.batch_shards * length  # of a device, in a step
    for path, leaf in run.layout.leaves:
        if stage.is_unused(path, sizes):
            continue
        trained, is_sharded = stage.trains(path, sizes), run.layout.is_sharded_by(path, FSDP)
        shard = math.prod(placement.sharding(leaf.spec()).shard_shape(leaf.shape)) * width
        is_table, is_head = leaf.axes[:1] == ("vocab",), path[0] == "llm" and sizes.llm and sizes.llm.tied
        multiplies = is_table or path[-1] == "kernel" and "patch_embedding" not in path  # which reads pixels
        passes_on = multiplies and (trained or path[0] in stage.through)
        if is_sharded and (is_head or not is_table):
            fsdp += (1 + encoded_first + passes_on + trained) * (n - 1) * shard * run.accumulate
        if is_sharded and is_table:
            fsdp += (1 + encoded_first + trained) * (n - 1) / n * tokens * leaf.shape[-1] * width
        if trained:
            fsdp += 0 if is_sharded else 2 * (n - 1) / n * shard
            data += 2 * (copies - 1) / copies * over_copies * (shard if is_sharded else shard / n)
    if stage.compared and config.clip:
        # Texts' vectors in float32 for the loss and again for its gradients, which go back to where they are from.
        vectors = 3 * config.data.batch_size // placement.batch_shards * config.clip.projection_width * FLOAT32
        fsdp, data = fsdp + copies * (n - 1) * vectors, data + (copies - 1) * vectors
    return {"fsdp": fsdp, "data": data}
