"""The one train step, for every stage."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from hovle_jax.components import Models, Params, merge
from hovle_jax.model.adapters import attached
from hovle_jax.sharding.rules import DATA
from hovle_jax.training import judging
from hovle_jax.training.losses.tokens import divide
from hovle_jax.training.optimizer import keep
from hovle_jax.training.setup import Run
from hovle_jax.training.stage import Pairs
from hovle_jax.training.stages import STAGES
from hovle_jax.training.state import TrainState

Metrics = dict[str, Any]
COTANGENTS = "cotangents"  # the field of a batch that has the gradients of its rows' vectors


def total_loss(
    trained: Params, frozen: Params, batch: dict, stage: str, models: Models, totals: dict | None = None
) -> tuple[jax.Array, Metrics]:
    """-> (scalar loss, {name: mean}); the pairs are divided here, once, by weights of the whole global batch.

    Args:
      totals: {name: weight} of the whole batch, where this one is a microbatch of it.
    """
    return _divided(STAGES[stage].losses(models, whole(models, trained, frozen), batch), totals)


def whole(models: Models, trained: Params, frozen: Params) -> Params:
    """All parameters as the modules take them, adapters beside their kernels."""
    return attached(merge(trained, frozen), models.config.adapter)


def _divided(pairs, totals=None):
    means = {name: divide((total, totals[name] if totals else weight)) for name, (total, weight) in pairs.items()}
    return functools.reduce(jnp.add, means.values()), means


def gradients(
    trained: Params, frozen: Params, batch: dict, stage: str, run: Run
) -> tuple[tuple[jax.Array, Metrics], Params]:
    """-> ((loss, {name: mean}), gradients in the parameters' type), accumulated over `run.accumulate` microbatches.

    Copies of the model (the mesh axis `data`) accumulate by themselves and sum once: between slices that sum goes
    through the data-centre network. With a `tensor` axis they sum once a microbatch.
    """
    if run.accumulate == 1:
        losses, grads = _gradients_of(total_loss)(trained, frozen, batch, stage, run.models)
        return losses, run.layout.constrain(grads, "gradients")
    if STAGES[stage].compared:
        return _through_vectors(trained, frozen, batch, stage, run)
    totals = {name: jnp.sum(batch[field]) for name, field in STAGES[stage].loss_weights.items()}
    return _over_copies(total_loss, trained, frozen, batch, totals, stage, run)


def _through_vectors(trained, frozen, batch, stage, run):
    """`gradients` of a loss that compares all rows: cached gradients (Gao et al. 2021, section 3.2).

    All microbatches are encoded without gradients; the loss of all vectors gives the gradient of each, which goes on
    into the parameters as its microbatch is encoded again.
    """
    compared, params = STAGES[stage].compared, whole(run.models, trained, frozen)
    vectors = encoded(params, batch, stage, run)
    loss = lambda trained, vectors: _divided(compared.compare(run.models, whole(run.models, trained, frozen), vectors))
    losses, (grads, cotangents) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(trained, vectors)
    batch = batch | {COTANGENTS: cotangents}
    _, passed_on = _over_copies(_as_linear, trained, frozen, batch, {}, stage, run)
    return losses, jax.tree.map(jnp.add, run.layout.constrain(grads, "gradients"), passed_on)


def encoded(params: Params, batch: dict, stage: str, run: Run) -> Any:
    """What a stage compares of each row of a batch, made a microbatch at a time: a tree of arrays [B, ...]."""
    encode = lambda _, i: (
        None,
        STAGES[stage].compared.encode(run.models, params, microbatch(batch, i, run.accumulate)),
    )
    _, parts = jax.lax.scan(encode, None, jnp.arange(run.accumulate))

    def joined(leaf):  # the order of `microbatch`
        rows = jnp.moveaxis(leaf, 0, 1).reshape(-1, *leaf.shape[2:])
        return run.placement.constrain(rows, ("batch", *[None] * (rows.ndim - 1)))

    return jax.tree.map(joined, parts)


def _as_linear(trained, frozen, rows, stage, models, totals):
    """A loss with the gradients that the vectors of these rows have in the loss of all."""
    rows = dict(rows)
    cotangents = rows.pop(COTANGENTS)
    vectors = STAGES[stage].compared.encode(models, whole(models, trained, frozen), rows)
    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(jnp.vdot, vectors, cotangents))), {}


def _over_copies(loss, trained, frozen, batch, totals, stage, run):
    """`_accumulated`, on each copy of the model by itself where these sum once."""
    mesh = run.placement.mesh
    if not run.sums_once:
        return _accumulated(loss, trained, frozen, batch, totals, stage, run)

    def of_a_copy(trained, frozen, batch, totals):
        return jax.lax.psum(_accumulated(loss, trained, frozen, batch, totals, stage, run.of_a_copy()), DATA)

    whole, rows = PartitionSpec(), PartitionSpec(DATA)
    specs, over = (whole, whole, rows, whole), {"axis_names": {DATA}, "check_vma": False}
    return jax.shard_map(of_a_copy, mesh=mesh, in_specs=specs, out_specs=whole, **over)(trained, frozen, batch, totals)


def _gradients_of(loss):
    return jax.value_and_grad(loss, has_aux=True)


def _accumulated(loss, trained, frozen, batch, totals, stage, run):
    """The sum over microbatches of loss(trained, frozen, rows, stage, models, totals) and of its gradients."""
    constrained = lambda tree: run.layout.constrain(tree, "gradients")

    def add(carry, i):
        rows = microbatch(batch, i, run.accumulate)
        losses, grads = _gradients_of(loss)(trained, frozen, rows, stage, run.models, totals)
        return jax.tree.map(jnp.add, carry, (losses, constrained(grads))), None

    zeros = constrained(jax.tree.map(jnp.zeros_like, trained))
    start = (jnp.float32(0), {name: jnp.float32(0) for name in totals}), zeros
    return jax.lax.scan(add, start, jnp.arange(run.accumulate))[0]


def microbatch(batch: dict, i: jax.Array | int, count: int) -> dict:
    """Every `count`-th row of a batch from row i on: rows of every device, so that none moves; sliced, not sorted."""
    take = lambda leaf: leaf.reshape(leaf.shape[0] // count, count, *leaf.shape[1:])
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(take(leaf), i, axis=1, keepdims=False), batch)


_JIT: dict[str, Any] = dict(static_argnames=("stage", "run"), donate_argnames="state")


@functools.partial(jax.jit, **_JIT)
def train_step(state: TrainState, batch: dict, *, stage: str, run: Run) -> tuple[TrainState, Metrics]:
    """One update; none where `run.rules` leave it out. The step is counted all the same: it counts batches.

    Args:
      state: donated.
      batch: the stage's kind of batch, rows sharded over the data axes.
      stage: static; a name of the stage table: the cosine loss of distillation, next-token cross-entropy, ...
      run: static; from `setup.build`, for this stage.
    Returns:
      (new state, metrics: scalars on the device; 'not_finite' is the number of a tensor (`judging.names`), and
      'skipped', where updates may be left out, how many the run has left out so far).
    """
    if draw := STAGES[stage].draw:
        batch = draw(run.models, batch, jax.random.fold_in(jax.random.key(run.seed), state.step))
    (loss, means), grads = gradients(state.trained, state.frozen, batch, stage, run)
    as_moments = lambda tree: run.layout.constrain(tree, "moments")
    bad, good = judging.before_update(loss, grads, state.record, run.rules)
    updates, opt_state = run.optimizer.update(grads, state.opt_state, state.trained, good=good)
    updated: Any = optax.apply_updates(state.trained, updates)
    # Where the next step expects them: the compiler's choice for a result may be another, and a copy of all.
    trained = run.layout.constrain(keep(good, STAGES[stage].after_update(updated), state.trained))
    opt_state = as_moments(opt_state)
    record = run.layout.constrain(judging.updated(state.record, loss, good))
    metrics = {"loss": loss} | STAGES[stage].metrics(means) | {"gradient_norm": optax.tree.norm(grads)}
    metrics["not_finite"] = judging.of_update(bad, trained, opt_state, as_moments)
    if record:
        metrics["skipped"] = record["skipped"]
    return TrainState(state.step + 1, trained, state.frozen, opt_state, record), metrics


def train_step_for(run: Run) -> Callable:
    """`train_step`, compiled with the options for the mesh's devices."""
    options = run.compiler_options()
    return jax.jit(getattr(train_step, "__wrapped__"), **_JIT, compiler_options=options) if options else train_step


@functools.partial(jax.jit, static_argnames=("stage", "run"))
def eval_step(params: Params, batch: dict, *, stage: str, run: Run) -> Pairs:
    """The sums and weights of the stage's losses on a batch, without an update; in as many parts as a step reads."""
    params = attached(params, run.models.config.adapter)
    losses = lambda rows: STAGES[stage].losses(run.models, params, rows)
    if run.accumulate == 1:
        return losses(batch)
    if compared := STAGES[stage].compared:
        return compared.compare(run.models, params, encoded(params, batch, stage, run))
    of_part = lambda i: losses(microbatch(batch, i, run.accumulate))
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_part, 0))
    add = lambda totals, i: (jax.tree.map(jnp.add, totals, of_part(i)), None)
    return jax.lax.scan(add, zeros, jnp.arange(run.accumulate))[0]
