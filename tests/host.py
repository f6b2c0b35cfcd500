"""One host of a run of several, in a process of its own: python -m tests.host JOB.json INDEX.

The job: {"hosts", "coordinator", "timeout", "stage", "changes", "data", "mesh", "folder", "corpus", "announcement"}.
`corpus` is the path of one, or absent for the micro one; `announcement` is {index: dict} of the hosts that differ.
"""

import json
import pathlib
import sys

import jax

from hovle_jax.config import MeshConfig
from hovle_jax.data import pipeline
from hovle_jax.training import distributed, loop
from tests import micro


def main(job, host):
    jax.config.update("jax_disable_most_optimizations", True)
    if "corpus" not in job:
        pipeline.load_corpus = lambda config, split, say=print: micro.corpus()
    config = micro.run_config(
        job["stage"], mesh=MeshConfig(**job.get("mesh", {})), data=job.get("data"), **job.get("changes", {})
    )
    announcement = job.get("announcement", {}).get(str(host), {})
    distributed.start(job.get("coordinator", ""), job["hosts"], host, job.get("timeout", 30), announcement)
    with distributed.ending_together():
        loop.run(config, pathlib.Path(job["folder"]), {})


if __name__ == "__main__":
    main(json.loads(pathlib.Path(sys.argv[1]).read_text()), int(sys.argv[2]))
