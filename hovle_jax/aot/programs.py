"""The programs of a run, lowered from shapes alone: nothing is allocated, and the devices need not be there."""

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.config import RunConfig
from hovle_jax.errors import UserError
from hovle_jax.training.checks import accumulation, check
from hovle_jax.training.loop import resolve_execution
from hovle_jax.training.optimizer import make_optimizer
from hovle_jax.training.sharding import batch_sharding, cache_shardings, check_batch_shape, on_mesh
from hovle_jax.training.stages import BATCH_KINDS, Models
from hovle_jax.training.state import abstract_params, abstract_state
from hovle_jax.training.step import train_step


def lower(config: RunConfig, mesh, program="train", new_tokens=512):
    """The program as it would run on the mesh's devices, traced and lowered.

    Args:
      program: 'train' is the run's `train_step`; 'prefill' reads a batch of prompts of data.sequence_length tokens into
        empty caches, and 'decode' appends one token to each of its rows.
      new_tokens: room behind the prompts in the caches.
    Returns:
      (jax.stages.Lowered, Models).
    Raises:
      UserError: see `checks.check`; also where the mesh and the batch do not fit.
    """
    check(config)
    models, batch = models_for(config, mesh, program), batch_shapes(config, mesh)
    with on_mesh(mesh, models.execution.zero):
        params = abstract_params(models, batch, mesh)
        if program != "train":
            return _lower_inference(program, models, params, batch, mesh, new_tokens), models
        optimizer = make_optimizer(config.optimizer, config.steps)
        state = abstract_state(models, params, batch, optimizer)
        return train_step.lower(state, batch, stage=config.stage, models=models, optimizer=optimizer), models


def models_for(config: RunConfig, mesh, program="train"):
    """The models as the program runs them. Raises UserError where mesh and batch do not fit together."""
    check_batch_shape(config.data.batch_size, config.data.sequence_length, mesh)
    parts = accumulation(config, mesh) if program == "train" else 1
    return Models(config, resolve_execution(config.execution, mesh.devices.flat[0].platform, parts))


def batch_shapes(config: RunConfig, mesh):
    """The shapes of a run's global batch, on the mesh."""
    shape = lambda array: (config.data.batch_size, *np.shape(array))
    row = BATCH_KINDS[config.stage].empty_row(config)
    return {
        name: jax.ShapeDtypeStruct(shape(array), array.dtype, sharding=batch_sharding(mesh))
        for name, array in row.items()
    }


def _lower_inference(program, models, params, batch, mesh, new_tokens):
    if models.config.stage not in ("align", "instruct"):
        raise UserError(f"a run of {models.config.stage} gives no model that answers; take the config of instruct")
    hovle, rows = models.hovle, batch["tokens"].shape[0]
    capacities = [batch[name].shape[1] + new_tokens for name in ("tokens", "long_tokens") if name in batch]
    cache = jax.eval_shape(lambda: hovle.empty_cache(rows, capacities[0], capacities[-1], models.execution.dtype))
    cache = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        cache,
        cache_shardings(cache, mesh),
    )
    if program == "prefill":
        return jax.jit(hovle.prefill, donate_argnums=2).lower(params, batch, cache)
    of_rows = lambda dtype: jax.ShapeDtypeStruct((rows,), dtype, sharding=batch_sharding(mesh))
    return jax.jit(hovle.decode, donate_argnums=3).lower(params, of_rows(jnp.int32), of_rows(bool), cache)
