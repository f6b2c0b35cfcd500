"""Kills training at random moments, starts it again by the same command, and compares what comes of it.

    python tests/benchmarks/kills.py --kills 200
    python tests/benchmarks/kills.py --kills 50 --inside_a_save

Runs of all five stages take turns. Each is killed a few times (SIGKILL), then ends, and must equal the stage's run that
was never killed: arrays of the last checkpoint and of the model to the bit, rows of metrics, results, files. Prints one
JSON object; the status is 1 where anything differs.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from hovle_jax.system.progress import format_duration  # noqa: E402
from tests import kills  # noqa: E402

A_RUN = 5  # kills at most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--inside_a_save", action="store_true", help="kill as a save has begun, else at any moment")
    parser.add_argument("--stages", default=",".join(kills.STAGES))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    stages, drawn, began = arguments.stages.split(","), random.Random(arguments.seed), time.monotonic()
    done, wrong = dict.fromkeys(stages, 0), []
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/compiled")
        whole = pathlib.Path(folder) / "whole"
        for stage in stages:
            kills.finish(stage, whole)
        seconds = {stage: kills.finish(stage, pathlib.Path(folder) / "warm") for stage in stages}  # all is compiled
        runs = 0
        while sum(done.values()) < arguments.kills:
            stage, workdir = stages[runs % len(stages)], pathlib.Path(folder) / f"run_{runs}"
            runs += 1
            found = kills.Kills(stage, workdir, seconds[stage], arguments.inside_a_save)
            done[stage] += found.of(min(A_RUN, arguments.kills - sum(done.values())), drawn)
            try:
                kills.finish(stage, workdir)
                wrong += [f"{stage}: {line}" for line in kills.differences(whole / stage, workdir / stage)]
            except AssertionError as error:
                wrong.append(f"{stage} cannot go on: {error}")
            shutil.rmtree(workdir)
            print(f"{sum(done.values())} kills, {len(wrong)} wrong", file=sys.stderr)
    took = format_duration(time.monotonic() - began)
    print(json.dumps({"kills": done, "runs": runs, "wrong": wrong, "took": took}, indent=2))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
