"""A graph of 1,000,000 x 512 vectors (`search index --ann`) against looking at all: recall and seconds.

    pip install usearch && python tests/benchmarks/graph.py [--rows 1000000]

Vectors lie about a space of 64 dimensions, as those of images do, whose spread falls; in 512 even directions a graph
finds little, and nothing is near. Queries are of the same kind, one at a time; rounds take turns.
"""

import argparse
import pathlib
import statistics
import tempfile
import time

import numpy as np

from hovle_jax.retrieval import approximate
from hovle_jax.retrieval.nearest import nearest

WIDTH, DIMENSIONS, NOISE, BLOCK = 512, 64, 0.02, 65_536


def drawn(count, rng, axes):
    """Unit vectors [count, WIDTH]."""
    spread = 1 / np.sqrt(1 + np.arange(DIMENSIONS))
    found = (rng.standard_normal((count, DIMENSIONS)) * spread) @ axes + NOISE * rng.standard_normal((count, WIDTH))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--count", type=int, default=10)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((WIDTH, DIMENSIONS)))[0].T
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "vectors.graph"
        vectors = np.lib.format.open_memmap(f"{folder}/vectors.npy", "w+", np.float32, (options.rows, WIDTH))
        for start in range(0, options.rows, BLOCK):
            vectors[start : start + BLOCK] = drawn(min(BLOCK, options.rows - start), rng, axes)
        start = time.perf_counter()
        approximate.build(vectors, path, print)
        print(f"the graph: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1e9:.2f} GB")
        sides = {
            "all": lambda query: nearest(query, vectors, options.count)[1],
            "graph": lambda query: approximate.search(path, vectors, query, options.count)[1],
        }
        queries, times, hits = drawn(options.queries, rng, axes), {name: [] for name in sides}, 0
        for row in range(-1, options.queries):  # the first one compiles
            ids = {}
            for name, search in sides.items():
                start = time.perf_counter()
                ids[name] = search(queries[max(row, 0)][None])[0]
                times[name] += [time.perf_counter() - start] * (row >= 0)
            hits += len(np.intersect1d(*ids.values())) * (row >= 0)
        of_all, of_graph = (statistics.median(each) for each in times.values())
        print(f"R@{options.count} of the graph among all: {hits / options.count / options.queries:.4f}")
        print(f"a query: all {of_all * 1e3:.1f} ms, graph {of_graph * 1e3:.1f} ms, {of_all / of_graph:.1f} x")


if __name__ == "__main__":
    main()
