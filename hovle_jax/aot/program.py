"""A program of a run, from shapes alone: nothing is allocated, no device need be there."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.config import RunConfig
from hovle_jax.errors import UserError
from hovle_jax.hardware.topology import Topology
from hovle_jax.sharding.mesh import make_mesh
from hovle_jax.training.checks import check
from hovle_jax.training.setup import Run, build
from hovle_jax.training.stages import find
from hovle_jax.training.state import abstract_state
from hovle_jax.training.step import eval_step, train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled, and for which devices.

    Attributes:
      kind: 'train' is the run's `train_step`; 'evaluation' its `eval_step`, over held-out rows; 'prefill' reads a batch
        of prompts of data.sequence_length tokens into empty caches, and 'decode' appends one token to each of its rows.
      new_tokens: room after the prompts in the caches.
    """

    config: RunConfig
    run: Run
    target: Topology
    kind: str = "train"
    new_tokens: int = 512

    @classmethod
    def of(cls, config: RunConfig, target: Topology, kind: str = "train", new_tokens: int = 512) -> "Program":
        """Raises UserError: see `checks.check`; also where the mesh and the batch do not fit, or without libtpu."""
        check(config)
        return cls(config, build(config, make_mesh(config.mesh, target.devices())), target, kind, new_tokens)

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """By name, in order: shapes with shardings, as `lower` takes them.

        Raises:
          UserError: the stage gives no model that answers, for prefill and decode.
        """
        config, run, stage, placement = self.config, self.run, find(self.config.stage), self.run.placement
        rows, params, shape = config.data.batch_size, run.abstract_params(), jax.ShapeDtypeStruct
        of_rows = lambda sizes, dtype: shape((rows, *sizes), dtype, sharding=placement.batch_sharding)
        batch = {name: of_rows(np.shape(array), array.dtype) for name, array in stage.batch.empty_row(config).items()}
        if self.kind == "train":
            return {"state": self._state, "batch": batch}
        if self.kind == "evaluation":
            return {"params": self._state.params, "batch": batch}
        if not {"embedding", "llm"} <= set(stage.result):
            raise UserError(f"a run of {config.stage} gives no model that answers; take the config of another stage")
        hovle, lengths = run.models.hovle, [batch[key].shape[1] for key in ("tokens", "long_tokens") if key in batch]
        capacities = lengths[0] + self.new_tokens, lengths[-1] + self.new_tokens
        cache = jax.eval_shape(lambda: hovle.empty_cache(rows, *capacities, hovle.execution.dtype))
        cache = cache if self.kind == "prefill" else cache.begun()
        placed = lambda leaf, sharding: shape(leaf.shape, leaf.dtype, sharding=sharding)
        cache = jax.tree.map(placed, cache, placement.cache_shardings(cache))
        token = {"token": of_rows((), jnp.int32), "active": of_rows((), bool)}
        return {"params": params, **({"batch": batch} if self.kind == "prefill" else token), "cache": cache}

    @property
    def _state(self):
        return abstract_state(find(self.config.stage), self.run, self.run.abstract_params())

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Of the arguments, bytes of a device."""
        return {name: _bytes_of_a_device(tree) for name, tree in self.arguments.items()}

    @functools.cached_property
    def beside(self) -> dict[str, int]:
        """What a run holds while the program runs, beside its arguments: {what: bytes of a device}."""
        if self.kind == "train":
            return {"the next batch": self.sizes["batch"]}
        if self.kind == "evaluation":
            moments = _bytes_of_a_device(self._state.opt_state)
            return {"moments": moments, "a batch to train on": self.sizes["batch"]}
        return {}

    def lower(self) -> jax.stages.Lowered:
        """As it would run on the mesh's devices."""
        given = self.arguments.values()
        if self.kind in ("train", "evaluation"):
            step = train_step if self.kind == "train" else eval_step
            return step.lower(*given, stage=self.config.stage, run=self.run)
        step = getattr(self.run.models.hovle, self.kind)
        return jax.jit(step, donate_argnums=len(given) - 1).lower(*given)

    def options(self) -> dict[str, str]:
        """libtpu's, with which it is compiled."""
        return self.run.compiler_options() if self.kind == "train" else {}


def _bytes_of_a_device(tree):
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
