"""The programs of a run, lowered from shapes alone: nothing is allocated, and the devices need not be there."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hovle_jax.config import RunConfig
from hovle_jax.errors import UserError
from hovle_jax.sharding.placement import Placement
from hovle_jax.training.checks import check
from hovle_jax.training.setup import Run, build
from hovle_jax.training.stages import find
from hovle_jax.training.state import abstract_state
from hovle_jax.training.step import train_step


def lower(config: RunConfig, run: Run, program: str = "train", new_tokens: int = 512) -> jax.stages.Lowered:
    """The program as it would run on the mesh's devices, traced and lowered.

    Args:
      run: from `set_up`.
      program: 'train' is the run's `train_step`; 'prefill' reads a batch of prompts of data.sequence_length tokens into
        empty caches, and 'decode' appends one token to each of its rows.
      new_tokens: room after the prompts in the caches.
    Raises:
      UserError: the stage gives no model that answers.
    """
    batch = batch_shapes(config, run.placement)
    if program != "train":
        return _lower_inference(program, config, run, batch, new_tokens)
    state = abstract_state(find(config.stage), run, run.abstract_params())
    return train_step.lower(state, batch, stage=config.stage, run=run)


def set_up(config: RunConfig, mesh: Mesh) -> Run:
    """Raises UserError: see `checks.check`; also where the mesh and the batch do not fit."""
    check(config)
    return build(config, mesh)


def batch_shapes(config: RunConfig, placement: Placement) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a run's global batch, on the mesh."""
    shape = lambda array: (config.data.batch_size, *np.shape(array))
    return {
        name: jax.ShapeDtypeStruct(shape(array), array.dtype, sharding=placement.batch_sharding)
        for name, array in find(config.stage).batch.empty_row(config).items()
    }


def _lower_inference(program, config, run, batch, new_tokens):
    if not {"embedding", "llm"} <= set(find(config.stage).result):
        raise UserError(f"a run of {config.stage} gives no model that answers; take the config of another stage")
    hovle, placement, params = run.models.hovle, run.placement, run.abstract_params()
    rows = batch["tokens"].shape[0]
    capacities = [batch[name].shape[1] + new_tokens for name in ("tokens", "long_tokens") if name in batch]
    cache = jax.eval_shape(lambda: hovle.empty_cache(rows, capacities[0], capacities[-1], hovle.execution.dtype))
    cache = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        cache,
        placement.cache_shardings(cache),
    )
    if program == "prefill":
        return jax.jit(hovle.prefill, donate_argnums=2).lower(params, batch, cache)
    of_rows = lambda dtype: jax.ShapeDtypeStruct((rows,), dtype, sharding=placement.batch_sharding)
    return jax.jit(hovle.decode, donate_argnums=3).lower(params, of_rows(jnp.int32), of_rows(bool), cache)
