"""The 10 nearest of 1,000,000 x 512 vectors to 1,000 queries: exactness and seconds, against numpy and FAISS.

    python -m venv peer && peer/bin/pip install faiss-cpu
    python tests/benchmarks/retrieval.py --peer peer/bin/python

Vectors are normal, of length 1, float32; the gallery is a file that all sides map into memory and have read before.
Rounds take turns; one before them, which compiles, does not count. numpy multiplies blocks of 32,768 and keeps the
best by argpartition; FAISS is IndexFlatIP, filled beforehand. Ids must be those of numpy, but where scores are equal to
1e-5.
"""

import argparse
import pathlib
import statistics
import tempfile
import time

import numpy as np
from peer import found

from hovle_jax.retrieval.nearest import nearest

BLOCK, TOLERANCE = 32_768, 1e-5
SETUP = """
import faiss, numpy as np
index = {}

def run(folder, count):
    if not index:
        gallery = np.load(folder + "/gallery.npy", mmap_mode="r")
        index["all"] = faiss.IndexFlatIP(gallery.shape[1])
        for start in range(0, len(gallery), 65536):
            index["all"].add(np.ascontiguousarray(gallery[start : start + 65536]))
    queries = np.load(folder + "/queries.npy")
    start = __import__("time").perf_counter()
    scores, ids = index["all"].search(queries, count)
    seconds = __import__("time").perf_counter() - start
    np.save(folder + "/faiss_ids.npy", ids)
    return seconds
"""


def by_numpy(queries, gallery, count):
    """-> ids [Q, K]."""
    scores, ids = np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), int)
    for start in range(0, len(gallery), BLOCK):
        table = queries @ gallery[start : start + BLOCK].T
        best = np.argpartition(-table, min(count, table.shape[1] - 1), 1)[:, :count]
        scores = np.concatenate([scores, np.take_along_axis(table, best, 1)], 1)
        ids = np.concatenate([ids, start + best], 1)
        order = np.argsort(-scores, 1, kind="stable")[:, :count]
        scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
    return ids


def differing(ids, expected, queries, gallery):
    """How many ids differ where the scores are not equal to the tolerance."""
    rows, columns = np.nonzero(ids != expected)
    score = lambda which: np.einsum("ne,ne->n", queries[rows], gallery[which[rows, columns]])
    return int((np.abs(score(ids) - score(expected)) > TOLERANCE).sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", default="", help="a Python that has faiss")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    peer = found(options.peer, SETUP, "FAISS")
    with tempfile.TemporaryDirectory() as folder:
        queries, gallery = written(pathlib.Path(folder), options)
        sides = {"ours": lambda: nearest(queries, gallery, options.count)[1]}
        sides["numpy"] = lambda: by_numpy(queries, gallery, options.count)
        times, ids = {name: [] for name in [*sides, "FAISS"]}, {}
        for turn in range(options.rounds + 1):
            for name, run in sides.items():
                start = time.perf_counter()
                ids[name] = run()
                times[name].append(time.perf_counter() - start)
            if peer:
                times["FAISS"].append(peer(folder, options.count)[1])
                ids["FAISS"] = np.load(f"{folder}/faiss_ids.npy")
            print(f"round {turn}: " + ", ".join(f"{name} {each[-1]:.2f} s" for name, each in times.items() if each))
        own = statistics.median(times["ours"][1:])
        for name in ids:
            median = statistics.median(times[name][1:])
            wrong = differing(ids[name], ids["numpy"], queries, gallery)
            print(f"{name}: {median:.2f} s, {median / own:.2f} x ours; {wrong} ids are not numpy's")
    if peer:
        peer.close()


def written(folder, options):
    """-> (queries, gallery), which lie in the folder too."""
    rng = np.random.default_rng(0)
    unit = lambda x: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    shape = (options.rows, options.width)
    gallery = np.lib.format.open_memmap(folder / "gallery.npy", "w+", np.float32, shape)
    for start in range(0, options.rows, BLOCK):
        part = gallery[start : start + BLOCK]
        part[:] = unit(rng.standard_normal(part.shape, np.float32))
    queries = unit(rng.standard_normal((options.queries, options.width), np.float32))
    np.save(folder / "queries.npy", queries)
    return queries, np.load(folder / "gallery.npy", mmap_mode="r")


if __name__ == "__main__":
    main()
