"""Multinomial logistic regression on features, as scikit-learn's LogisticRegression defines it, by L-BFGS in JAX.

    minimise  C sum_i -log softmax(W x_i + b)[y_i] + |W|²/2         (b is not penalised)

Two things make it fast. Logits are linear in the weights, so a step's line search needs none but elementwise work: a
step is two products with the features, however many lengths are tried. And the curvature that L-BFGS starts from is
not 1 but that of the features' Gram matrix, so that badly scaled or correlated features take as few steps as others.

Sources: Nocedal and Wright, Numerical Optimization, 2nd ed., algorithm 7.4 (two-loop recursion, with an initial
inverse Hessian); Böhning, "Multinomial logistic regression algorithm", 1992 (the Hessian bounded by the Gram matrix).

Letters: N images, D width of the features, C classes; weights are [D + 1, C], the last row b.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.evaluation.probes.linear import Linear
from hovle_jax.evaluation.probes.moments import Moments, bend
from hovle_jax.system.command_line import warn

MEMORY = 10  # pairs that L-BFGS keeps
MOST_STEPS = 500
TOLERANCE = 1e-6  # nats
TRIES = 8  # lengths of a step
SLOPE_LEFT = 0.1  # of the slope at the start of a step: with less the length is good enough


class Problem(NamedTuple):
    """What a fit depends on.

    Attributes:
      rows: [D + 1, N] features about their mean, the last row ones: columns are the images.
      labels: [N].
      shares: [N] how much each image counts; they sum to 1, and are 0 for images that are held out.
      decay: [D + 1, 1] penalty of the mean loss: 1 / (C N), 0 for b.
      inverse: [D + 1, D + 1] an inverse Hessian to start from, the same for each class.
    """

    rows: jax.Array
    labels: jax.Array
    shares: jax.Array
    decay: jax.Array
    inverse: jax.Array


class Fit(NamedTuple):
    """Weights [D + 1, C], logits [N, C] of all images, steps, and how far the mean loss may be above its minimum."""

    weights: jax.Array
    logits: jax.Array
    steps: jax.Array
    left: jax.Array


class _State(NamedTuple):
    weights: jax.Array
    logits: jax.Array
    gradient: jax.Array
    moves: jax.Array  # [MEMORY, D + 1, C] the newest first
    bends: jax.Array  # [MEMORY, D + 1, C] changes of the gradient
    direction: jax.Array
    steps: jax.Array
    left: jax.Array
    is_stuck: jax.Array


@jax.jit(static_argnames="most_steps")
def fit(problem: Problem, weights: jax.Array, tolerance: float = TOLERANCE, most_steps: int = MOST_STEPS) -> Fit:
    """L-BFGS from `weights` [D + 1, C], until half the product of gradient and direction is at most the tolerance."""
    logits = problem.rows.T @ weights
    gradient = _gradient(problem, weights, logits)
    history = jnp.zeros((MEMORY, *weights.shape))
    start = _State(
        weights, logits, gradient, history, history, weights, jnp.int32(0), jnp.float32(jnp.inf), jnp.bool_(False)
    )
    going_on = lambda state: (state.left > tolerance) & (state.steps < most_steps) & ~state.is_stuck
    end = jax.lax.while_loop(going_on, functools.partial(_step, problem), _with_direction(problem, start))
    return Fit(end.weights, end.logits, end.steps, end.left)


def _gradient(problem, weights, logits):
    """Of the mean loss: [D + 1, C]."""
    errors = jax.nn.softmax(logits) - jax.nn.one_hot(problem.labels, logits.shape[1])
    return problem.rows @ (problem.shares[:, None] * errors) + problem.decay * weights


def _step(problem, state):
    along = problem.rows.T @ state.direction
    length = _length(problem, state, along)
    move = length * state.direction
    weights, logits = state.weights + move, state.logits + length * along
    gradient = _gradient(problem, weights, logits)
    bend = gradient - state.gradient
    put = lambda history, new: jnp.concatenate([new[None], history[:-1]])
    moved = state._replace(
        weights=weights, logits=logits, gradient=gradient, moves=put(state.moves, move), bends=put(state.bends, bend),
        steps=state.steps + 1, is_stuck=jnp.vdot(move, bend) <= 0,
    )  # fmt: skip
    return _with_direction(problem, moved)


def _with_direction(problem, state):
    """The two-loop recursion. Pairs that are not there yet are zeros and change nothing."""
    products = jnp.einsum("mdc,mdc->m", state.moves, state.bends)
    inverses = jnp.where(products > 0, 1 / jnp.where(products > 0, products, 1), 0)
    q, parts = state.gradient, []
    for i in range(MEMORY):
        parts.append(inverses[i] * jnp.vdot(state.moves[i], q))
        q = q - parts[i] * state.bends[i]
    bent = jnp.vdot(state.bends[0], problem.inverse @ state.bends[0])
    r = jnp.where(bent > 0, products[0] / jnp.where(bent > 0, bent, 1), 1) * (problem.inverse @ q)
    for i in reversed(range(MEMORY)):
        r = r + state.moves[i] * (parts[i] - inverses[i] * jnp.vdot(state.bends[i], r))
    return state._replace(direction=-r, left=jnp.vdot(state.gradient, r) / 2)


def _length(problem, state, along):
    """Newton's method on the loss along the direction, which is convex; bisection where it leaves what is known."""
    decay = problem.decay * state.direction
    at_start, bend_of_decay = jnp.vdot(decay, state.weights), jnp.vdot(decay, state.direction)
    aim = jnp.take_along_axis(along, problem.labels[:, None], 1)[:, 0]

    def slope_and_bend(length):
        likely = jax.nn.softmax(state.logits + length * along)
        mean = (likely * along).sum(1)
        spread = (likely * along**2).sum(1) - mean**2
        slope = jnp.vdot(problem.shares, mean - aim) + at_start + length * bend_of_decay
        return slope, jnp.vdot(problem.shares, spread) + bend_of_decay

    first = jnp.vdot(state.gradient, state.direction)

    def searching(carry):
        _, slope, _, _, _, tries = carry
        return (jnp.abs(slope) > SLOPE_LEFT * jnp.abs(first)) & (tries < TRIES)

    def refine(carry):
        length, slope, bend, low, high, tries = carry
        low, high = jnp.where(slope < 0, length, low), jnp.where(slope < 0, high, length)
        newton = length - slope / jnp.maximum(bend, 1e-30)
        middle = jnp.where(jnp.isinf(high), 4 * length, (low + high) / 2)
        inside = (newton > low) & (newton < jnp.where(jnp.isinf(high), 10 * length, high))
        length = jnp.where(inside, newton, middle)
        return (length, *slope_and_bend(length), low, high, tries + 1)

    one = jnp.float32(1)
    return jax.lax.while_loop(searching, refine, (one, *slope_and_bend(one), jnp.float32(0), jnp.inf, 1))[0]


def path(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    penalties: Sequence[float],
    used: np.ndarray,
    tolerance: float = TOLERANCE,
) -> Iterator[Linear]:
    """A fit for each penalty, each from where the one before it ended: give strong ones first.

    Args:
      features: [N, D] float32.
      labels: [N] below `classes`.
      penalties: 1 / C in scikit-learn's words, above 0.
      used: [N] bool: the images that are fitted. Others change nothing, and cost what they cost: so the sweep and the
        fit to all of them are one compiled program.
    """
    mean = features[used].mean(0, dtype=np.float64)
    centre, basis = mean, None
    if used.sum() < features.shape[1]:  # the best weights are sums of images: their axes are enough
        basis = np.linalg.qr((features[used] - mean).T)[0]
        features, centre = ((features - mean) @ basis).astype(np.float32), np.zeros(basis.shape[1])
    moments = Moments.of(features[used], labels[used], classes)
    rows = _rows(jnp.asarray(features, jnp.float32), jnp.asarray(centre, jnp.float32))
    shares = jnp.asarray(used / used.sum(), jnp.float32)
    weights = jnp.zeros((len(rows), classes))
    for penalty in penalties:
        # Two classes have one vector in scikit-learn; as two that are opposite they are penalised half as much.
        decay = penalty * (2 if classes == 2 else 1) / used.sum()
        decays = np.append(np.full(len(rows) - 1, decay), 0)[:, None]
        inverse = jnp.asarray(inverse_hessian(moments, decay))
        problem = Problem(rows, jnp.asarray(labels), shares, jnp.asarray(decays, jnp.float32), inverse)
        found = fit(problem, weights, tolerance)
        weights = found.weights
        if found.left > tolerance:
            say = f"logistic regression with C={1 / penalty:.2g} is {float(found.left):.1g} nats from its end"
            warn(f"{say} after {int(found.steps)} steps")
        yield Linear.about(mean, np.asarray(weights, np.float64), basis)


@jax.jit
def _rows(features, mean):
    """`Problem.rows`."""
    return jnp.concatenate([(features - mean).T, jnp.ones((1, len(features)), features.dtype)])


def inverse_hessian(moments: Moments, decay: float) -> np.ndarray:
    """[D + 1, D + 1] float32, of the mean loss where the classes are as likely as they are frequent, one for all."""
    import scipy.linalg

    curved = bend(moments.counts)
    hessian = curved * moments.gram / moments.counts.sum() + decay * np.eye(len(moments.gram))
    # With a unit diagonal columns of very different scales lose nothing.
    scales = 1 / np.sqrt(np.diag(hessian))
    factor = scipy.linalg.cho_factor(scales[:, None] * hessian * scales, overwrite_a=True, check_finite=False)
    unit = scipy.linalg.cho_solve(factor, np.eye(len(hessian)), overwrite_b=True, check_finite=False)
    made = np.zeros((len(hessian) + 1, len(hessian) + 1), np.float32)
    made[:-1, :-1] = scales[:, None] * unit * scales
    made[-1, -1] = 1 / curved
    return made
