"""Exact nearest neighbours by inner product, over galleries of any size and all devices.

    scores, ids = nearest(queries, gallery, 10)

A block of the gallery at a time goes to the devices, a part of its rows to each, so that neither the gallery nor the
table of scores has to fit. To find the k largest of n scores costs more than to compute them where a device sorts; so
they are looked for in groups: the k largest are in the k groups of the largest maxima.

Letters: N vectors of the gallery, Q queries, E width, n rows of a block on a device, q queries at once.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hovle_jax.errors import UserError

ROWS = 32_768  # of the gallery, on a device at once
QUERIES = 1024  # at once: 128 MiB of scores
GROUP = 32  # scores of which the maximum is looked at first
ALL = "gallery"  # the axis of all devices


def nearest(queries: np.ndarray, gallery: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The vectors with the largest inner products; of equal ones that with the smaller index.

    Args:
      queries: [Q, E] float32.
      gallery: [N, E] float32; may be memory-mapped.
      count: K; at most N are found.
    Returns:
      ([Q, K] float32 products, the largest first, [Q, K] int64 indices).
    Raises:
      UserError: the widths differ.
    """
    _check(queries, gallery)
    count = min(count, len(gallery))
    found = [_nearest(part, gallery, count) for part in _parts(queries)] if count else []
    if not found:
        return np.zeros((len(queries), count), np.float32), np.zeros((len(queries), count), np.int64)
    scores, ids = (np.concatenate(each) for each in zip(*found))
    return scores[: len(queries)], ids[: len(queries)]


def ranks(
    queries: np.ndarray, gallery: np.ndarray, owners: np.ndarray, gallery_owners: np.ndarray, best: np.ndarray
) -> np.ndarray:
    """The place of each query's best right answer, 1 for the first; of equal scores wrong answers come first.

    Args:
      queries: [Q, E] float32.
      gallery: [N, E] float32.
      owners, gallery_owners: [Q] and [N] int32: an answer is right where both are equal.
      best: [Q] float32: the largest product with a right answer.
    Returns:
      [Q] int64.
    """
    _check(queries, gallery)
    mesh, found = _mesh(), []
    for start, part in zip(range(0, len(queries), QUERIES), _parts(queries)):
        mine, aims = (_padded(each[start : start + QUERIES], len(part)) for each in (owners, best))
        total = 0
        for first, block in _blocks(gallery, mesh):
            whose = _padded(gallery_owners[first : first + len(block)], len(block))
            known = min(len(block), len(gallery) - first)
            total = total + _counted(part.T, block, _shard(whose, mesh), mine, aims, known, mesh=mesh)
        found.append(1 + np.asarray(total, np.int64))
    return np.concatenate(found)[: len(queries)] if found else np.zeros(0, np.int64)


def _check(queries, gallery):
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise UserError(f"queries {queries.shape} and gallery {gallery.shape} must be vectors of one width")


def _nearest(queries, gallery, count):
    """Of one part of the queries."""
    mesh, turned = _mesh(), jnp.asarray(queries.T)
    scores = jnp.full((len(queries), count), -jnp.inf)
    ids = jnp.zeros((len(queries), count), jnp.int32)
    for first, block in _blocks(gallery, mesh):
        known = min(len(block), len(gallery) - first)
        scores, ids = _merged(scores, ids, *_best(turned, block, known, count=count, mesh=mesh), first)
    return np.asarray(scores), np.asarray(ids, np.int64)


def _parts(queries) -> Iterator[np.ndarray]:
    """Queries of one shape; few take a smaller one."""
    size = min(QUERIES, max(8, 1 << (len(queries) - 1).bit_length()))
    for start in range(0, len(queries), size):
        yield _padded(queries[start : start + size], size)


def _blocks(gallery, mesh) -> Iterator[tuple[int, Any]]:
    """(index of the first row, [devices * n, E] over the devices); the last one is filled with zeros."""
    devices = mesh.size
    rows = min(ROWS, -(-len(gallery) // (GROUP * devices)) * GROUP) * devices
    for first in range(0, len(gallery), rows):
        yield first, _shard(_padded(gallery[first : first + rows], rows), mesh)


def _padded(rows, size):
    rows = np.ascontiguousarray(rows)
    if len(rows) == size:
        return rows
    return np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)])


@functools.cache
def _mesh():
    return Mesh(np.asarray(jax.local_devices()), (ALL,))


def _shard(rows, mesh):
    return jax.device_put(rows, NamedSharding(mesh, P(ALL)))


@jax.jit(static_argnames=("count", "mesh"))
def _best(queries, block, known, *, count, mesh):
    """Queries [E, q], block [devices * n, E] of which `known` rows are there -> [devices, q, K] scores and indices."""
    local = functools.partial(_best_of_shard, count=count)
    specs = {"in_specs": (P(), P(ALL), P()), "out_specs": (P(ALL), P(ALL)), "check_vma": False}
    return jax.shard_map(local, mesh=mesh, **specs)(queries, block, known)


def _best_of_shard(queries, block, known, *, count):
    first = jax.lax.axis_index(ALL) * len(block)
    scores = _scores(queries, block, known - first)
    grouped = scores.reshape(-1, GROUP, queries.shape[1])
    _, groups = jax.lax.top_k(grouped.max(1).T, min(count, len(grouped)))  # [q, K]
    groups = jnp.sort(groups)  # so that equal scores keep their order
    at = jnp.arange(queries.shape[1])[:, None]
    chosen = grouped[groups, :, at].reshape(len(groups), -1)  # [q, K * GROUP]
    values, places = jax.lax.top_k(chosen, min(count, chosen.shape[1]))
    ids = jnp.take_along_axis(groups, places // GROUP, 1) * GROUP + places % GROUP
    return values[None], first + ids[None]


def _scores(queries, block, known):
    """[n, q]; of rows that are not there minus infinity."""
    scores = jnp.matmul(block, queries, precision="highest")
    return jnp.where(jnp.arange(len(block))[:, None] < known, scores, -jnp.inf)


@jax.jit
def _merged(scores, ids, more_scores, more_ids, first):
    """The best of [q, K] so far and of [devices, q, K] more."""
    more_scores, more_ids = (jnp.moveaxis(more, 0, 1).reshape(len(ids), -1) for more in (more_scores, more_ids))
    values, places = jax.lax.top_k(jnp.concatenate([scores, more_scores], 1), scores.shape[1])
    return values, jnp.take_along_axis(jnp.concatenate([ids, first + more_ids], 1), places, 1)


@jax.jit(static_argnames="mesh")
def _counted(queries, block, owners, own, best, known, *, mesh):
    """[q]: rows of the block that are no right answer and score at least the best right one."""

    def local(queries, block, owners, own, best, known):
        scores = _scores(queries, block, known - jax.lax.axis_index(ALL) * len(block))
        wrong = (owners[:, None] != own) & (scores >= best)
        return jax.lax.psum(wrong.sum(0), ALL)

    specs = {"in_specs": (P(), P(ALL), P(ALL), P(), P(), P()), "out_specs": P(), "check_vma": False}
    return jax.shard_map(local, mesh=mesh, **specs)(queries, block, owners, own, best, known)
