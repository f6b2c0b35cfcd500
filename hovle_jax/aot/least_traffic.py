"""The bytes that a step must send, whoever compiles it: what the sharding of its parameters asks for."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from hovle_jax.model.parallel import FSDP, as_axes
from hovle_jax.training.sharding import is_boxed, spec_of
from hovle_jax.training.stages import STAGES, Models
from hovle_jax.training.state import boxed_params, keys_of, unboxed


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that a device sends in a step.

    Attributes:
      fsdp: gathers of parameters and reduce-scatters of their gradients.
      data: sums of gradients over copies of the model, on several slices through the data-centre network.
    """

    fsdp: float
    data: float


def least_traffic(models: Models, batch, mesh):
    """The least traffic of a training step over its microbatches, in the compute type.

    A parameter that fsdp cuts into n parts is gathered once for the forward pass and once for the backward pass, and
    its gradient is reduce-scattered: (n - 1) / n of its bytes each time. What gradients do not reach is gathered once;
    what they only pass through has no reduce-scatter. Over d copies of the model a gradient's part is summed in
    2 (d - 1) / d of its bytes. Parameters that nothing reads cost nothing. Collectives of a tensor or sequence axis,
    which move activations, are not counted.
    """
    stage, parts = STAGES[models.config.stage], models.execution.accumulate
    width = jnp.dtype(models.execution.dtype).itemsize
    copies, fsdp, data = mesh.shape["data"], 0.0, 0.0
    for keys, leaf in _read(models, batch):
        spec, _ = spec_of(leaf, mesh, models.execution.zero)
        sharding = jax.sharding.NamedSharding(mesh, spec)
        part = math.prod(sharding.shard_shape(unboxed(leaf).shape)) * width
        trained = stage.trains(keys, models.config.model)
        if any(FSDP in as_axes(axes) for axes in spec):
            n = mesh.shape[FSDP]
            passes = 1 + (trained or keys[0] in stage.passed) + trained
            fsdp += passes * (n - 1) * part * parts
        if trained and copies > 1:
            data += 2 * (copies - 1) / copies * part * parts
    return Traffic(fsdp, data)


def parameter_counts(models: Models, batch):
    """-> (how many parameters a step reads, how many it trains)."""
    trains = STAGES[models.config.stage].trains
    sizes = [(math.prod(unboxed(leaf).shape), keys) for keys, leaf in _read(models, batch)]
    return sum(size for size, _ in sizes), sum(size for size, keys in sizes if trains(keys, models.config.model))


def _read(models, batch):
    """The parameters that a stage reads: [(keys, boxed leaf)]."""
    stage, model = STAGES[models.config.stage], models.config.model
    leaves = jax.tree_util.tree_leaves_with_path(boxed_params(models, batch), is_leaf=is_boxed)
    return [(keys_of(path), leaf) for path, leaf in leaves if not stage.is_unused(keys_of(path), model)]
