"""A run's state: abstract shapes -> shardings -> values; optimizer state for the trained parameters only."""

import dataclasses
import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from hovle_jax.model.parallel import MOMENTS
from hovle_jax.training.sharding import is_boxed, specs_of
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
    return jax.tree.map(lambda leaf: leaf.value if is_boxed(leaf) else leaf, tree, is_leaf=is_boxed)


def keys_of(path):
    """The names on a jax path of dicts, as of a parameter; steps that are no dict's (a box, a moment) are left out."""
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def boxed_params(models: Models, batch):
    """Shapes with logical axes of every parameter that the stage holds; `batch` may be shapes too."""
    tree = {component: boxed_component(models, component, batch) for component in components_of(models.config)}
    return select(tree, STAGES[models.config.stage].holds)


def boxed_component(models: Models, component, batch):
    """`boxed_params` of one component."""
    return jax.eval_shape(lambda b: models.init(component, jax.random.key(0), b), batch)


def abstract_component(models: Models, component, batch, mesh):
    """Shapes with shardings of one component's parameters; `batch` may be shapes too."""
    return _abstract(boxed_component(models, component, batch), models, mesh)


def abstract_params(models: Models, batch, mesh):
    """Shapes with shardings of every parameter that the stage holds."""
    return _abstract(boxed_params(models, batch), models, mesh)


def _abstract(boxed, models, mesh):
    return _placed(unboxed(boxed), specs_of(boxed, mesh, models.execution.zero), mesh)


def _placed(shapes, specs, mesh):
    """Shapes with the shardings of PartitionSpecs."""
    return jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)),
        shapes,
        specs,
    )


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


def abstract_state(models: Models, params, batch, optimizer):
    """`make_state`, but for step and moments, of which there are shapes with shardings; `params` may be such too.

    Moments are cut by their own rows of the table; what belongs to no parameter lies whole everywhere. Unsaid, all of
    it would start on one device, and the second step would be compiled anew for where the first one left it.
    """
    trains = functools.partial(STAGES[models.config.stage].trains, model=models.config.model)
    trained = select(params, trains)
    frozen = select(params, lambda path: not trains(path))
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    whole = NamedSharding(mesh, PartitionSpec())
    shapes = jax.eval_shape(optimizer.init, trained)
    opt_state = _placed(shapes, moment_specs(models, batch, mesh, shapes), mesh)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return TrainState(step, trained, _narrowed(frozen, trained, models.execution.dtype), opt_state)


def moment_specs(models: Models, batch, mesh, opt_state):
    """PartitionSpecs of an optimizer state: of a leaf whose path ends as a parameter's, those of that moment."""
    boxed = traverse_util.flatten_dict(boxed_params(models, batch))
    specs = specs_of(boxed, mesh, models.execution.zero, MOMENTS)

    def one(path, leaf):
        return specs.get(keys_of(path), PartitionSpec())

    return jax.tree_util.tree_map_with_path(one, opt_state)


def wholly_frozen(trained, frozen):
    """Names of the components of which a stage trains nothing."""
    return sorted(frozen.keys() - trained.keys())


def _narrowed(frozen, trained, dtype):
    """Kernels of wholly frozen components in the compute type, to which every product would cast them: the same
    numbers in half of the memory. The rest of such a component stays as it is."""

    def one(path, leaf):
        if path[0].key not in wholly_frozen(trained, frozen) or path[-1].key != "kernel":
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
        return leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, frozen)


def make_state(models: Models, params, batch, optimizer):
    """The state at step 0 around given parameters.

    Args:
      batch: of the run, or its shapes.
    """
    state = abstract_state(models, params, batch, optimizer)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state.opt_state)
    return state.replace(
        step=jax.device_put(jnp.zeros((), jnp.int32), state.step.sharding),
        opt_state=jax.jit(optimizer.init, out_shardings=shardings)(state.trained),
    )
