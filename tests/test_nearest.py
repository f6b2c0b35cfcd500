"""Nearest neighbours and ranks, against numpy over the whole table of scores."""

import numpy as np
import pytest

from hovle_jax.errors import UserError
from hovle_jax.retrieval import nearest as module
from hovle_jax.retrieval.nearest import nearest, ranks

pytestmark = pytest.mark.usefixtures("quick_compilation")


def vectors(count, width=24, seed=0):
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


@pytest.fixture
def small(monkeypatch):
    """Blocks of 64 rows on each of eight devices, 16 queries at once."""
    monkeypatch.setattr(module, "ROWS", 64)
    monkeypatch.setattr(module, "QUERIES", 16)


@pytest.mark.parametrize("rows", [5, 300, 512, 1700])
@pytest.mark.parametrize("count", [1, 10, 40])
def test_the_same_as_numpy(rows, count, small):
    """Over one block and several, full and not; more are asked for than a group or a device has."""
    queries, gallery = vectors(37, seed=1), vectors(rows)
    scores, ids = nearest(queries, gallery, count)
    table = queries @ gallery.T
    expected = np.argsort(-table, 1, kind="stable")[:, :count]
    assert np.array_equal(ids, expected) and ids.shape == (37, min(count, rows))
    np.testing.assert_allclose(scores, np.take_along_axis(table, expected, 1), rtol=1e-5, atol=1e-5)


def test_of_equal_scores_the_earlier_is_found(small):
    gallery = np.tile(vectors(3), (400, 1))
    _, ids = nearest(gallery[:3], gallery, 20)
    assert np.array_equal(ids, 3 * np.arange(20)[None] + np.argmax(gallery[:3] @ gallery[:3].T, 1)[:, None])


def test_nothing_is_found_in_nothing():
    scores, ids = nearest(vectors(3), vectors(0), 5)
    assert scores.shape == ids.shape == (3, 0)
    scores, ids = nearest(vectors(0), vectors(9), 5)
    assert scores.shape == ids.shape == (0, 5)
    with pytest.raises(UserError, match=r"\(3, 24\) and gallery \(4, 25\) must be vectors of one width"):
        nearest(vectors(3), vectors(4, 25), 1)


def test_ranks_are_those_of_a_loop(small):
    queries, gallery, rng = vectors(40, seed=1), vectors(900), np.random.default_rng(2)
    owners, others = rng.integers(0, 30, 40).astype(np.int32), rng.integers(0, 30, 900).astype(np.int32)
    gallery[::7] = gallery[0]  # many equal ones
    table = queries @ gallery.T
    best = np.where(owners[:, None] == others, table, -np.inf).max(1).astype(np.float32)
    expected = [1 + np.sum((row >= top - 1e-5) & (others != own)) for row, top, own in zip(table, best, owners)]
    assert ranks(queries, gallery, owners, others, best - np.float32(1e-5)).tolist() == expected
