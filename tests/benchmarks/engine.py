"""Tokens a second of the engine by how many answers it makes at once, and the share of the memory's bandwidth it uses.

    python tests/benchmarks/engine.py --checkpoint smol-llm --streams 1,8,32

The share is that of one stream: the weights' bytes, which a token reads, over the read bandwidth that is measured in
the same run (a float32 matrix-vector product over 1 GB). Rounds take turns. Prints one JSON object.
"""

import argparse
import json
import statistics
import time

from hovle_jax.conversion.downloads import resolve
from hovle_jax.inference.bench.traffic import weight_bytes
from hovle_jax.inference.engine import Engine, Request
from hovle_jax.inference.generate import Prompt
from hovle_jax.inference.load import load_run
from hovle_jax.inference.slots import fused
from hovle_jax.system import malloc
from hovle_jax.system.read_bandwidth import read_bandwidth

PROMPT = "Write a long story about a robot that learns to paint."


def tokens_per_second(engine, streams, new_tokens):
    """While all of them are answered: from the last one's first token to the first one's last."""
    asked = [engine.submit(Prompt.of(PROMPT), Request(new_tokens)) for _ in range(streams)]
    while not all(stream.tokens for stream in asked):
        engine.step()
    made, start = sum(len(stream.tokens) for stream in asked), time.perf_counter()
    while not any(stream.finish for stream in asked):
        engine.step()
    rate = (sum(len(stream.tokens) for stream in asked) - made) / (time.perf_counter() - start)
    engine.reset()
    return rate


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="smol-llm")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    malloc.keep_freed_memory()
    folder = resolve(args.checkpoint)
    answerer = load_run(folder, dtype="" if args.dtype == "int8" else args.dtype).answerer
    params = fused(answerer.params, answerer.hovle, args.dtype == "int8")
    engines = {n: Engine(answerer, n, args.length, params=params) for n in map(int, args.streams.split(","))}
    for n, engine in engines.items():
        tokens_per_second(engine, n, 8)  # compiles
    rounds = [
        {n: tokens_per_second(engine, n, args.new_tokens + n) for n, engine in engines.items()}
        for _ in range(args.rounds)
    ]
    rates = {n: statistics.median(each[n] for each in rounds) for n in engines}
    weights = weight_bytes(params)
    read = read_bandwidth()
    print(
        json.dumps(
            {
                "tokens per second": {n: round(rate, 1) for n, rate in rates.items()},
                "times one stream": {n: round(rate / rates[min(rates)], 2) for n, rate in rates.items()},
                "GB of weights": round(weights / 1e9, 3),
                "GB/s read": round(read / 1e9, 1),
                "share of bandwidth, fewest streams": round(rates[min(rates)] / min(rates) * weights / read, 3),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
