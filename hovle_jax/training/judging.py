"""What the compiled step thinks of itself: whether all that it made is finite, and whether its loss is a spike.

Nothing here leaves the devices or waits for them. A step gives one more scalar, the number of the first tensor that is
not finite (`names` tells which that is), and takes one more all-reduce of a number for each parameter.

An update is left out by what is known before it, the loss and the gradients: then it still overwrites the old state in
its place. To keep the old state until the new one has been looked at would take its memory twice. A new state that is
not finite always ends the run, before it is saved.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hovle_jax.components import Params
from hovle_jax.config import HealthConfig

WINDOW = 128  # losses that a spike is measured by
FINE = 0  # in place of a tensor's number
LOSS = 1

# {'skipped': int32, and with spikes 'losses': float32 [WINDOW], 'taken': int32}; None where every update is made.
Record = dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a step is compiled with.

    Attributes:
      skips: whether a run goes on after a loss or gradient that is not finite; the state is left as it was either way.
      spike_sigmas: standard deviations above the mean of the last WINDOW losses from which on a loss is a spike, whose
        update is left out; 0 = no loss is.
    """

    skips: bool = False
    spike_sigmas: float = 0.0

    @classmethod
    def of(cls, config: HealthConfig) -> "Rules":
        return cls(config.on_bad_step == "skip", config.spike_sigmas)

    @property
    def record(self) -> Record:
        """That of a run's first step, in numpy."""
        record: dict[str, Any] = {"skipped": np.int32(0)} if self.skips or self.spike_sigmas else {}
        if self.spike_sigmas:
            record |= {"losses": np.zeros(WINDOW, np.float32), "taken": np.int32(0)}
        return record or None


def names(trained: Params, opt_state: Any) -> list[str]:
    """What is numbered, by its number: names[FINE], names[LOSS], the gradients, the new parameters, the moments."""
    found = ["nothing", "the loss"]
    for what, tree in (("the gradient of {}", trained), ("{} after its update", trained), ("{}", opt_state)):
        found += [what.format(name_of(path)) for path, _ in _floats(tree)]
    return found


def before_update(loss: jax.Array, grads: Params, record: Record, rules: Rules) -> tuple[jax.Array, jax.Array]:
    """-> (`of_gradients`, whether the update is to be made)."""
    bad = of_gradients(loss, grads)
    good = bad == FINE
    if rules.spike_sigmas:
        good &= ~is_spike(loss, record, rules.spike_sigmas)
    return bad, good


def of_gradients(loss: jax.Array, grads: Params) -> jax.Array:
    """The number of the first tensor that is not finite among the loss and the gradients, int32; FINE where all are.

    A gradient counts as not finite too where its squares overflow: its norm, by which all are clipped, is infinite.
    """
    squares = [optax.tree.norm(leaf, squared=True) for _, leaf in _floats(grads)]  # as in the norm of all: made once
    fine = jnp.isfinite(jnp.stack([loss, *squares]))
    return jnp.where(jnp.all(fine), FINE, jnp.argmin(fine) + LOSS).astype(jnp.int32)


def of_update(
    found: jax.Array, trained: Params, opt_state: Any, constrain: Callable[[Any], Any] = lambda tree: tree
) -> jax.Array:
    """`found`, or where that is FINE the number of the first tensor of the new state that is not finite.

    A parameter and its moments are looked at in one pass: small tensors cost what their passes cost.

    Args:
      constrain: lays out a tree of what there is one of for each element of `trained`.
    """
    leaves, tree = [leaf for _, leaf in _floats((trained, opt_state))], jax.tree.structure(trained)
    count = tree.num_leaves
    kinds = [leaves[at : at + count] for at in range(0, len(leaves), count)]  # the parameters, mu, nu
    seen = constrain(jax.tree.unflatten(tree, [_first_kind(tensors) for tensors in zip(*kinds, strict=True)]))
    first = jnp.stack([jnp.min(kind) for kind in jax.tree.leaves(seen)]).astype(jnp.int32)
    numbers = first_of_update(trained) + first * count + jnp.arange(count)
    lowest = jnp.min(jnp.where(first < len(kinds), numbers, jnp.iinfo(jnp.int32).max))
    return jnp.where((found == FINE) & jnp.any(first < len(kinds)), lowest, found)


def _first_kind(tensors: Sequence[jax.Array]) -> jax.Array:
    """For each element the index of the first of the tensors in which it is not finite; their number where it is."""
    kind = jnp.full(tensors[0].shape, len(tensors), jnp.int8)
    for i, tensor in reversed(list(enumerate(tensors))):
        kind = jnp.where(jnp.isfinite(tensor), kind, jnp.int8(i))
    return kind


def first_of_update(trained: Params) -> int:
    """The number from which on tensors are those of the new state."""
    return LOSS + 1 + len(_floats(trained))


def is_spike(loss: jax.Array, record: Record, sigmas: float) -> jax.Array:
    """Whether a loss lies more than `sigmas` standard deviations above the mean of the last WINDOW; at first it never
    does."""
    assert record is not None
    losses = record["losses"]
    return (record["taken"] >= WINDOW) & (loss > jnp.mean(losses) + sigmas * jnp.std(losses))


def updated(record: Record, loss: jax.Array, good: jax.Array) -> Record:
    """The record after a step, whose loss is remembered where it is `good`."""
    if record is None:
        return None
    new = record | {"skipped": record["skipped"] + jnp.where(good, 0, 1)}
    if "losses" in record:
        remembered = record["losses"].at[record["taken"] % WINDOW].set(loss)
        new |= {
            "losses": jnp.where(good, remembered, record["losses"]),
            "taken": record["taken"] + jnp.where(good, 1, 0),
        }
    return new


def _floats(tree):
    """[(path, leaf)] of a tree, without counts."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [(path, leaf) for path, leaf in found if jnp.issubdtype(leaf.dtype, jnp.floating)]


def name_of(path: Sequence[Any]) -> str:
    """The name of an array on a path of a tree: 'llm/head/kernel', of a moment 'mu of llm/head/kernel'."""
    of = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    keys = "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
    return " of ".join([*of[-1:], keys]) if keys else ".".join(of)
