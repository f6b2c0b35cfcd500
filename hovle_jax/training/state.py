"""A run's state: abstract shapes -> shardings -> values; optimizer state for the trained parameters only."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from hovle_jax.components import Params, merge, select
from hovle_jax.training.setup import Run
from hovle_jax.training.stage import Stage


@flax.struct.dataclass
class TrainState:
    """`trained` and `frozen` are disjoint parts of one parameter tree; `record` is of the updates that were left out
    (`judging.Record`; None where none may be)."""

    step: Any
    trained: dict
    frozen: dict
    opt_state: Any
    record: Any = None

    @property
    def params(self) -> Params:
        return merge(self.trained, self.frozen)


def abstract_state(stage: Stage, run: Run, params: Params) -> TrainState:
    """`make_state`, but for step, moments and record: of these, shapes with shardings; `params` may be such too.

    Moments are sharded by their own rows of the table; what belongs to no parameter lies whole everywhere. Without a
    sharding all of it would start on one device, and the second step would be compiled again for where the first one
    left it.
    """
    config = run.models.config
    trained = select(params, lambda path: stage.trains(path, config))
    frozen = select(params, lambda path: not stage.trains(path, config))
    opt_state = run.layout.abstract(jax.eval_shape(run.optimizer.init, trained), "moments")
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=run.placement.sharding())
    record = run.layout.abstract(run.rules.record)
    return TrainState(step, trained, _narrowed(frozen, trained, run.models.execution.dtype), opt_state, record)


def make_state(stage: Stage, run: Run, params: Params) -> TrainState:
    """The state at step 0 around given parameters."""
    state = abstract_state(stage, run, params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state.opt_state)
    return dataclasses.replace(
        state,
        step=jax.device_put(jnp.zeros((), jnp.int32), state.step.sharding),
        opt_state=jax.jit(run.optimizer.init, out_shardings=shardings)(state.trained),
        record=jax.tree.map(lambda value, leaf: jax.device_put(value, leaf.sharding), run.rules.record, state.record),
    )


def wholly_frozen(trained: Params, frozen: Params) -> list[str]:
    """Names of the components of which a stage trains nothing."""
    return sorted(frozen.keys() - trained.keys())


def _narrowed(frozen, trained, dtype):
    """Kernels of wholly frozen components in the compute type, to which every matmul would cast them: the same
    numbers in half of the memory. The rest of such a component stays as it is."""

    def one(path, leaf):
        if path[0].key not in wholly_frozen(trained, frozen) or path[-1].key != "kernel":
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
        return leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, frozen)
