"""What it brings on a CPU host that the process keeps the memory that it frees (hovle_jax/system/malloc.py).

    python tests/benchmarks/step_memory.py --stage instruct --rounds 3

Alternates processes with and without `keep_freed_memory`, each timing the tiny preset's train_step on fresh weights.
Prints one JSON object: median seconds a step, page faults a step, and the ratio of the medians.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

STEPS = 20


def measure(stage, keep):
    """Seconds of each step and page faults a step, in this process."""
    from hovle_jax import train
    from hovle_jax.system import malloc

    if keep and not malloc.keep_freed_memory():
        sys.exit("the C library is not glibc, or this is an accelerator's host: nothing to compare")
    import jax

    from hovle_jax.corpora import loading
    from hovle_jax.data import pipeline
    from hovle_jax.sharding.mesh import make_mesh
    from hovle_jax.training.setup import build
    from hovle_jax.training.stages import STAGES
    from hovle_jax.training.state import make_state
    from hovle_jax.training.step import train_step
    from hovle_jax.training.weights import load_params

    config = train.stage_config("configs", stage, "tiny")
    corpus = loading.load_corpus(config, "train")
    tokenizer = pipeline.train_tokenizer(config, corpus)
    batch = pipeline.build_dataset(config, STAGES[stage].batch, tokenizer, corpus)[0]
    run, seconds = build(config, make_mesh(config.mesh)), []
    state = make_state(STAGES[stage], run, load_params(config, run, {}))
    batch = run.placement.put_batch(batch)
    for step in range(STEPS + 2):
        if step == 2:
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        started = time.perf_counter()
        state, metrics = train_step(state, batch, stage=stage, run=run)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds[2:], "faults": (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / STEPS}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", default="instruct")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=("keep", "free"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.stage, options.child == "keep")))
        return
    runs = {"keep": [], "free": []}
    for _ in range(options.rounds):
        for name, found in runs.items():
            command = [sys.executable, __file__, "--stage", options.stage, "--child", name]
            child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found.append(json.loads(child.stdout.splitlines()[-1]))
    report = {
        name: {
            "median seconds a step": round(statistics.median(s for run in found for s in run["seconds"]), 4),
            "page faults a step": round(statistics.median(run["faults"] for run in found)),
        }
        for name, found in runs.items()
    }
    medians = [report[name]["median seconds a step"] for name in ("free", "keep")]
    print(json.dumps(report | {"ratio free / keep": round(medians[0] / medians[1], 3)}, indent=2))


if __name__ == "__main__":
    main()
