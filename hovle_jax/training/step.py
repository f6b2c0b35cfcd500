"""The one train step, for every stage."""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from hovle_jax.hardware.compiler_options import compiler_options
from hovle_jax.model.parallel import GRADIENTS
from hovle_jax.training.losses import divide
from hovle_jax.training.sharding import specs_of
from hovle_jax.training.stages import STAGES
from hovle_jax.training.state import boxed_params, merge, moment_specs, select


def total_loss(trained, frozen, batch, stage, models, totals=None):
    """-> (scalar loss, {name: mean}); the pairs are divided here, once, by weights of the whole global batch.

    Args:
      totals: {name: weight} of the whole batch, where this one is a part of it.
    """
    pairs = STAGES[stage].losses(models, merge(trained, frozen), batch)
    means = {name: divide((total, totals[name] if totals else weight)) for name, (total, weight) in pairs.items()}
    return sum(means.values()), means


def gradients(trained, frozen, batch, stage, models):
    """-> ((loss, {name: mean}), gradients in the parameters' type), the batch read in `execution.accumulate` parts."""
    of, parts = jax.value_and_grad(total_loss, has_aux=True), models.execution.accumulate
    hold = lambda tree: held(tree, models, batch, GRADIENTS)
    if parts == 1:
        losses, made = of(trained, frozen, batch, stage, models)
        return losses, hold(made)
    totals = {name: jnp.sum(batch[field]) for name, field in STAGES[stage].weights.items()}

    def add(carry, i):
        losses, made = of(trained, frozen, rows_of_part(batch, i, parts), stage, models, totals)
        return jax.tree.map(jnp.add, carry, (losses, hold(made))), None

    zeros = hold(jax.tree.map(jnp.zeros_like, trained))
    start = (jnp.float32(0), {name: jnp.float32(0) for name in totals}), zeros
    return jax.lax.scan(add, start, jnp.arange(parts))[0]


def rows_of_part(batch, i, parts):
    """Every `parts`-th row of a batch from row i on: rows of every device, so that none moves; cut out, not sorted."""
    take = lambda leaf: leaf.reshape(leaf.shape[0] // parts, parts, *leaf.shape[1:])
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(take(leaf), i, axis=1, keepdims=False), batch)


def named_metrics(loss, means):
    """'loss' and, for cosine terms, the cosine itself."""
    cosines = {f"{name}_cosine": -mean for name, mean in means.items() if name != "loss"}
    return {"loss": loss} | cosines


def held(tree, models, batch, suffix=""):
    """Trained parameters, or with a suffix of `sharding.ZERO` what belongs to them, held to their rows of the table."""
    boxed = select(boxed_params(models, batch), traverse_util.flatten_dict(tree).__contains__)
    return constrain(tree, lambda mesh: specs_of(boxed, mesh, models.execution.zero, suffix))


def constrain(tree, specs):
    """Arrays held to the PartitionSpecs that a function of the mesh gives; on one device they are where they are."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return tree
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, specs(mesh))


_JIT = dict(static_argnames=("stage", "models", "optimizer"), donate_argnames="state")


@functools.partial(jax.jit, **_JIT)
def train_step(state, batch, *, stage, models, optimizer):
    """One update.

    Args:
      state: TrainState; donated.
      batch: the stage's kind of batch, rows sharded over the data axes.
      stage: static; a name of the stage table: the cosine loss of distillation, next-token cross-entropy, ...
      models, optimizer: static.
    Returns:
      (new state, metrics: scalars on the device).
    """
    (loss, means), grads = gradients(state.trained, state.frozen, batch, stage, models)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
    # Where the next step expects them: the compiler's choice for a result may be another, and a copy of all.
    opt_state = constrain(opt_state, lambda mesh: moment_specs(models, batch, mesh, opt_state))
    trained = held(STAGES[stage].after_update(optax.apply_updates(state.trained, updates)), models, batch)
    metrics = named_metrics(loss, means) | {"gradient_norm": optax.tree.norm(grads)}
    return state.replace(step=state.step + 1, trained=trained, opt_state=opt_state), metrics


def train_step_for(models, mesh):
    """`train_step`, compiled with the options for the mesh's devices."""
    options = step_options(models, mesh)
    return jax.jit(train_step.__wrapped__, **_JIT, compiler_options=options) if options else train_step


def step_options(models, mesh):
    """The compiler options of a `train_step` on a mesh: {option: value}."""
    return compiler_options(mesh.devices.flat[0].device_kind) if models.execution.sparse_cores else {}


@functools.partial(jax.jit, static_argnames=("stage", "models"))
def eval_step(params, batch, *, stage, models):
    """The stage's metrics on a batch, without an update."""
    loss, means = total_loss(params, {}, batch, stage, models)
    return named_metrics(loss, means)


def average(metrics):
    """The mean of a list of metric dicts, on the host."""
    metrics = jax.device_get(metrics)
    return {name: float(jnp.mean(jnp.stack([m[name] for m in metrics]))) for name in metrics[0]}
