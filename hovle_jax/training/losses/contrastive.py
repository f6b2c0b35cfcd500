"""The contrastive losses of a global batch, of whose scores no device ever holds more than a chunk.

Each device holds its own rows of image and text vectors. Blocks of text vectors go around a ring (`sharding.ring`), and
with them what is gathered for their texts: in the forward pass the log-sum-exp over all images, in the backward pass
the gradient. Scores are made a chunk of a block at a time, and again in the backward pass.

Dimension letters: N pairs, n pairs of a device, E width of the vectors, c texts of a chunk.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from hovle_jax.sharding.ring import Ring

CHUNK = 512  # texts that a device makes scores of at a time
LOWEST = jnp.finfo(jnp.float32).min  # of no score; finite, so that differences are numbers


def contrastive(
    images: jax.Array,
    texts: jax.Array,
    log_scale: jax.Array,
    bias: jax.Array | None = None,
    loss: str = "softmax",
    ring: Ring = Ring(),
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Of the scores z_ij = exp(log_scale) x_i y_j + bias: row i and column i belong together.

    'softmax' is CLIP's loss (Radford et al. 2021, figure 3): the mean of the cross-entropies of rows and of columns,
    [sum_i logsumexp_j z_ij + sum_j logsumexp_i z_ij] / 2 - sum_i z_ii. A bias cancels in it, and is not read.
    'sigmoid' is SigLIP's (Zhai et al. 2023, algorithm 1): -sum_ij log sigmoid(z_ij) where i = j, of -z_ij elsewhere.

    Args:
      images, texts: [N, E] float32 unit vectors, their rows sharded over the ring.
      log_scale, bias: [] float32; no bias is a bias of 0.
      loss: of LOSSES.
      chunk: texts that a device makes scores of at a time, at most.
    Returns:
      (sum over pairs, N).
    """
    bias = jnp.float32(0) if bias is None or loss == "softmax" else bias
    pairs = _Pairs(ring, loss, chunk)
    return _contrastive(pairs, images, texts, log_scale, bias), jnp.float32(images.shape[0])


# ---------------------------------------------------------------------------------------------------------------------
# What the losses differ in. `own` [n, c] says where row and column belong together, `counts` [1, c] which columns are
# not padding.


class Softmax:
    """The rows' log-sum-exp is gathered at home, the columns' on the way.

    Both stay (highest score, sum of exponentials of the others' distances to it): their sum would round what a pair
    that stands out loses, which is the difference of two scores of up to 100.
    """

    @staticmethod
    def start(n: int, columns: tuple[int, int]) -> tuple[tuple, tuple]:
        """What is gathered of n rows, and of columns [chunks, c], before the first score."""
        of = lambda size: (jnp.full(size, LOWEST), jnp.zeros(size))
        return (*of(n), jnp.zeros(n)), of(columns)

    @staticmethod
    def gather(home: tuple, moving: tuple, z: jax.Array, own: jax.Array, counts: jax.Array) -> tuple[tuple, tuple]:
        """Both with the scores of a chunk [n, c] too."""
        z, (highest, total, found) = jnp.where(counts, z, LOWEST), home
        found += jnp.sum(jnp.where(own, z, 0.0), axis=1)
        return (*_more(highest, total, z, axis=1), found), _more(moving[0], moving[1], z, axis=0)

    @staticmethod
    def finish(home: tuple, moving: tuple) -> tuple[jax.Array, tuple]:
        """-> (the loss's part of this device, its rows' and its columns' part of what the backward pass needs)."""
        *of_rows, found = home
        losses = [highest - found + jnp.log(total) for highest, total in (of_rows, moving)]
        return jnp.sum(losses[0] + losses[1]) / 2, (tuple(of_rows), moving)

    @staticmethod
    def derivative(z: jax.Array, own: jax.Array, of_rows: tuple, of_columns: tuple) -> jax.Array:
        """Of the loss by the scores: (p_row + p_column) / 2 - 1 where they belong together."""
        (highest_row, total_row), (highest_column, total_column) = of_rows, of_columns
        p_row = jnp.exp(z - highest_row[:, None]) / total_row[:, None]
        return (p_row + jnp.exp(z - highest_column) / total_column) / 2 - own


class Sigmoid:
    """A sum over all pairs, gathered at home."""

    @staticmethod
    def start(n: int, columns: tuple[int, int]) -> tuple[tuple, tuple]:
        return (jnp.float32(0),), ()

    @staticmethod
    def gather(home: tuple, moving: tuple, z: jax.Array, own: jax.Array, counts: jax.Array) -> tuple[tuple, tuple]:
        losses = jax.nn.softplus(jnp.where(own, -z, z))
        return (home[0] + jnp.sum(jnp.where(counts, losses, 0.0)),), ()

    @staticmethod
    def finish(home: tuple, moving: tuple) -> tuple[jax.Array, tuple]:
        return home[0], ((), ())

    @staticmethod
    def derivative(z: jax.Array, own: jax.Array, of_rows: tuple, of_columns: tuple) -> jax.Array:
        return jnp.where(own, -jax.nn.sigmoid(-z), jax.nn.sigmoid(z))


LOSSES = {"softmax": Softmax, "sigmoid": Sigmoid}


def _more(highest, total, z, axis):
    """A streaming log-sum-exp, (highest, sum of exp(z - highest)), with more scores along an axis."""
    higher = jnp.maximum(highest, jnp.max(z, axis=axis))
    return higher, total * jnp.exp(highest - higher) + jnp.sum(jnp.exp(z - jnp.expand_dims(higher, axis)), axis=axis)


# ---------------------------------------------------------------------------------------------------------------------
# Around the ring


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """What is static."""

    ring: Ring
    loss: str
    chunk: int

    @property
    def kind(self):
        return LOSSES[self.loss]

    def chunked(self, rows):
        """[n, ...] -> [chunks, c, ...], padded with zeros to whole chunks."""
        n = len(rows)
        count = -(-n // self.chunk)
        c = -(-n // count)
        padding = [(0, count * c - n)] + [(0, 0)] * (rows.ndim - 1)
        return jnp.pad(rows, padding).reshape(count, c, *rows.shape[1:])

    def over_chunks(self, body, images, scale, bias):
        """A visit of `Ring.around`: body(home, results, chunk, z, own, counts) -> (home, results), chunk after chunk.

        `chunk` is (texts [c, E], what else travels of them). Products are made in whole float32: the scale multiplies
        what a TPU rounds otherwise by up to 100, and beside the towers' matmuls these are few.
        """
        n, index = len(images), self.ring.index()
        here = index * n + jnp.arange(n)

        def visit(home, block, results, source):
            places = self.chunked(jnp.arange(1, n + 1)) - 1  # padding is at -1

            def step(home, each):
                chunk, results, places = each
                counts, own = (places >= 0)[None], here[:, None] == (source * n + places)[None]
                z = scale * _product("ie,je->ij", images, chunk[0]) + bias
                return body(home, results, chunk, z, own & counts, counts)

            return jax.lax.scan(step, home, (block, results, places))

        return visit


def _product(how, *arrays):
    return jnp.einsum(how, *arrays, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contrastive(pairs, images, texts, log_scale, bias):
    return _forward(pairs, images, texts, log_scale, bias)[0]


def _forward(pairs: _Pairs, images, texts, log_scale, bias):
    kind, ring = pairs.kind, pairs.ring

    def local(images, texts, log_scale, bias):
        n, chunks = len(images), pairs.chunked(texts)
        home, moving = kind.start(n, chunks.shape[:2])

        def body(home, moving, chunk, z, own, counts):
            return kind.gather(home, moving, z, own, counts)

        visit = pairs.over_chunks(body, images, jnp.exp(log_scale), bias)
        home, moving = ring.around(visit, home, (chunks, ()), moving)
        loss, saved = kind.finish(home, jax.tree.map(lambda leaf: leaf.reshape(-1)[:n], moving))
        return ring.sum(loss), saved

    whole = PartitionSpec()
    run = ring.per_shard(local, (ring.rows, ring.rows, whole, whole), (whole, ring.rows))
    loss, saved = run(images, texts, log_scale, bias)
    return loss, (images, texts, log_scale, bias, saved)


def _backward(pairs: _Pairs, kept, g):
    kind, ring = pairs.kind, pairs.ring
    images, texts, log_scale, bias, saved = kept

    def local(images, texts, log_scale, bias, g, saved):
        n, scale = len(images), jnp.exp(log_scale)
        of_rows, of_columns = saved
        block = jax.tree.map(pairs.chunked, (texts, of_columns))

        def body(home, dtexts, chunk, z, own, counts):
            dimages, dscale, dbias = home
            dz = jnp.where(counts, kind.derivative(z, own, of_rows, chunk[1]), 0.0)
            dtexts += _product("ij,ie->je", dz, images)
            home = dimages + _product("ij,je->ie", dz, chunk[0]), dscale + jnp.sum(dz * (z - bias)), dbias + jnp.sum(dz)
            return home, dtexts

        home = jnp.zeros_like(images), jnp.float32(0), jnp.float32(0)
        visit = pairs.over_chunks(body, images, scale, bias)
        (dimages, *scalars), dtexts = ring.around(visit, home, block, jnp.zeros_like(block[0]))
        dtexts = dtexts.reshape(-1, texts.shape[1])[:n]
        dscale, dbias = ring.sum(scalars)
        return g * scale * dimages, g * scale * dtexts, g * dscale, g * dbias

    rows, whole = ring.rows, PartitionSpec()
    run = ring.per_shard(local, (rows, rows, whole, whole, whole, rows), (rows, rows, whole, whole))
    return run(images, texts, log_scale, bias, g, saved)


_contrastive.defvjp(_forward, _backward)
