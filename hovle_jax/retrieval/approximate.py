"""Nearest neighbours by a graph on disk, for galleries that are too large to be read at each query.

USearch's graph (HNSW, Malkov & Yashunin 2018) holds the vectors in float16 and is memory-mapped: a query reads a few
thousand of them. It proposes more than are wanted, and exact products choose among these; what it does not propose is
missed.

Letters: N vectors of the gallery, Q queries, E width.
"""

import importlib.util
import pathlib
from collections.abc import Callable

import numpy as np

from hovle_jax.errors import UserError
from hovle_jax.system.progress import track

ROWS = 8192  # that are added at once
PROPOSED, LEAST = 4, 64  # proposals for each neighbour that is wanted, and in all
BREADTH = 256  # candidates that a query keeps: more find more, and take longer


def is_installed() -> bool:
    """Whether USearch is there."""
    return importlib.util.find_spec("usearch") is not None


def check_installed() -> None:
    """Raises UserError without USearch."""
    if not is_installed():
        raise UserError('--ann needs the package usearch; run: pip install "hovle_jax[ann]"')


def build(vectors: np.ndarray, path: pathlib.Path, say: Callable[[str], None]) -> None:
    """Writes the graph of unit vectors [N, E].

    Args:
      say: called with lines of progress.
    Raises:
      OSError: the file cannot be written.
    """
    from usearch.index import Index

    graph = Index(ndim=vectors.shape[1], metric="ip", dtype="f16")
    starts = range(0, len(vectors), ROWS)
    for start in track(starts, say, "graph", f"blocks of {ROWS:,} images", len(starts)):
        part = np.ascontiguousarray(vectors[start : start + ROWS])
        graph.add(np.arange(start, start + len(part)), part)
    try:
        graph.save(str(path))
    except RuntimeError as error:  # as USearch says it
        raise OSError(str(error)) from None


def search(path: pathlib.Path, vectors: np.ndarray, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Nearly the nearest: see `nearest.nearest`, whose results these are but for what the graph does not propose.

    Args:
      path: of the graph of these vectors.
    """
    from usearch.index import Index

    count = min(count, len(vectors))
    try:
        graph = Index.restore(str(path), view=True)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the graph {path} is damaged ({error}); make it again by 'search index --ann'") from None
    assert graph is not None
    graph.expansion_search = BREADTH
    scores, ids = np.zeros((len(queries), count), np.float32), np.zeros((len(queries), count), np.int64)
    for row, query in enumerate(queries.astype(np.float32)):
        proposed = np.sort(graph.search(query, min(len(vectors), max(PROPOSED * count, LEAST))).keys.astype(np.int64))
        exact = vectors[proposed] @ query
        best = np.argsort(-exact, kind="stable")[:count]
        scores[row], ids[row] = exact[best], proposed[best]
    return scores, ids
