"""A run's state: abstract shapes -> shardings -> values; optimizer state for the trained parameters only."""

import dataclasses
import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from hovle_jax.training.sharding import shardings_of
from hovle_jax.training.stages import STAGES, Models, components_of


@flax.struct.dataclass
class TrainState:
    """`trained` and `frozen` are disjoint parts of one parameter tree."""

    step: jax.Array
    trained: dict
    frozen: dict
    opt_state: tuple

    @property
    def params(self):
        return merge(self.trained, self.frozen)


def select(params, predicate):
    """The part of a nested dict whose paths (tuples of keys) fulfil the predicate."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({path: leaf for path, leaf in flat.items() if predicate(path)})


def merge(first, second):
    """One nested dict from two disjoint ones."""
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(first) | traverse_util.flatten_dict(second))


def unboxed(tree):
    """The plain tree of a boxed abstract one (Linen's own unboxing would constrain what is not there yet)."""
    is_boxed = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    return jax.tree.map(lambda leaf: leaf.value if is_boxed(leaf) else leaf, tree, is_leaf=is_boxed)


def abstract_component(models: Models, component, batch, mesh):
    """Shapes with shardings of one component's parameters; `batch` may be shapes too."""
    boxed = jax.eval_shape(lambda b: models.init(component, jax.random.key(0), b), batch)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        unboxed(boxed),
        shardings_of(boxed, mesh),
    )


def abstract_params(models: Models, batch, mesh):
    """Shapes with shardings of every parameter that the stage holds."""
    tree = {c: abstract_component(models, c, batch, mesh) for c in components_of(models.config)}
    return select(tree, STAGES[models.config.stage].holds)


def init_component(models: Models, component, batch, abstract):
    """Fresh values of one component, made on their shards; the key depends on the seed and the component alone."""
    wanted = set(traverse_util.flatten_dict(abstract))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    names = ("llm", "embedding", "clip", "teacher", "head")
    # Layers in a loop: the same values, compiled once instead of once a layer.
    models = dataclasses.replace(models, execution=dataclasses.replace(models.execution, unroll_layers=False))

    def init(key):
        params = nn.meta.unbox(models.init(component, key, _zeros(batch)))
        return select(params, lambda path: path in wanted)

    key = jax.random.fold_in(jax.random.key(models.config.seed), names.index(component))
    return jax.jit(init, out_shardings=shardings)(key)


def _zeros(batch):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)


def make_state(models: Models, params, optimizer):
    """The state at step 0 around given parameters."""
    trains = functools.partial(STAGES[models.config.stage].trains, model=models.config.model)
    trained = select(params, trains)
    frozen = select(params, lambda path: not trains(path))
    # Moments lie where their parameters lie, the rest everywhere. Unsaid, all of it would start on one device, and
    # the second step would be compiled anew for where the first one left it.
    whole = NamedSharding(jax.tree.leaves(trained)[0].sharding.mesh, PartitionSpec())
    shardings = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, trained),
        jax.tree.map(lambda leaf: leaf.sharding, trained),
        transform_non_params=lambda _: whole,
    )
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(trained)
    return TrainState(jax.device_put(jnp.zeros((), jnp.int32), whole), trained, frozen, opt_state)
