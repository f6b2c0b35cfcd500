"""How full rows are, packed by plan, against one sample a row.

    python tests/benchmarks/packing.py

A mixed corpus: 1 to 12 tiles of 256 tokens, and a thumbnail where there are several; 20 to 2,000 text tokens; rows of
16,384 tokens and 44 tiles. Prints one JSON object.
"""

import argparse
import json
import time

import numpy as np

from hovle_jax.data.rows.packing import pack


def corpus(samples, seed):
    """-> (tokens, tiles) of each sample."""
    rng = np.random.default_rng(seed)
    grid = rng.integers(1, 13, samples)
    tiles = grid + (grid > 1)
    return tiles * 256 + rng.integers(20, 2001, samples), tiles


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--tiles", type=int, default=44)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokens, tiles = corpus(arguments.samples, arguments.seed)
    started = time.perf_counter()
    rows = len(pack(tokens, tiles, arguments.tokens, arguments.tiles))
    seconds = time.perf_counter() - started
    share = lambda used, rows, each: round(float(used.sum() / (rows * each)), 4)
    print(
        json.dumps(
            {
                "packed": {
                    "tokens": share(tokens, rows, arguments.tokens),
                    "tiles": share(tiles, rows, arguments.tiles),
                },
                "one sample a row": {
                    "tokens": share(tokens, len(tokens), arguments.tokens),
                    "tiles": share(tiles, len(tiles), arguments.tiles),
                },
                "rows": rows,
                "microseconds a sample": round(seconds / len(tokens) * 1e6, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
