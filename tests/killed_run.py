"""One stage on the micro corpus, as the command trains it: `python -m tests.killed_run STAGE WORKDIR`.

Without the stages before it, and without a benchmark's score; the report is written.
"""

import pathlib
import sys
import time

import jax

from hovle_jax import train
from hovle_jax.corpora import loading
from hovle_jax.evaluation import summary
from hovle_jax.hosts import distributed, preemption
from tests import micro


def config_of(stage: str):
    """Rows, held-out metrics and checkpoints at steps that seldom meet."""
    return micro.run_config(stage, steps=8, log_every=2, checkpoint_every=3, eval_every=4, keep_checkpoints=2)


def main(stage: str, workdir: pathlib.Path) -> int:
    jax.config.update("jax_disable_most_optimizations", True)
    loading.load_corpus = lambda config, split, say=print: micro.corpus()
    train.chain = lambda config, config_folder, workdir, seed: [(config, workdir / config.stage, {})]
    summary.score_run = lambda config, folder, benchmark: None
    with preemption.listening():
        distributed.start()
        with preemption.agreeing(), distributed.ending_together(workdir / stage):
            return train.train(config_of(stage), workdir, workdir, time.time())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], pathlib.Path(sys.argv[2])))
