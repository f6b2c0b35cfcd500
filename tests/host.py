"""One host of several, in a process of its own: python -m tests.host JOB.json INDEX.

The job is {"hosts", "coordinator", "heartbeat", "runs": [run, ...]}, a run {"folder", "stage", "mesh", "changes",
"data", "corpora": {index: path}, "fails": {index: step}, "waits": {index: seconds}, "after": path, "again": path,
"url": of the work folder, in which the run's folder is its name}; the last six are optional.
"""

import dataclasses
import json
import os
import pathlib
import sys
import time

import jax

from hovle_jax.config import MeshConfig
from hovle_jax.corpora import loading
from hovle_jax.data import bad_samples
from hovle_jax.errors import UserError
from hovle_jax.hosts import distributed, exchange, preemption
from hovle_jax.train import exit_status
from hovle_jax.training import held_out, loop
from hovle_jax.training.resumable import RunCheckpoints
from hovle_jax.training.saved_steps import Keep
from tests import micro

load_corpus, restore = loading.load_corpus, RunCheckpoints.restore


def config_of(run, host=0):
    """The config of a run: on the micro corpus, or on a host's own path."""
    data = run["data"] | ({"source": run["corpora"][str(host)]} if "corpora" in run else {})
    config = micro.run_config(run["stage"], data=data, mesh=MeshConfig(**run["mesh"]), **run["changes"])
    # AdamW's usual epsilon makes the rounding errors of small gradients as large as any step.
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, eps=1e-3))


def prepare(run, host):
    """The micro corpus where no other is asked for; a host that fails at a step; what a run waits for."""
    in_micro = lambda config, split, say=print: micro.corpus()
    loading.load_corpus = load_corpus if "corpora" in run else in_micro
    RunCheckpoints.restore = saving_again(run["again"]) if "again" in run else restore
    while "after" in run and not pathlib.Path(run["after"]).exists():
        time.sleep(0.1)
    if str(host) in run.get("waits", {}):  # before its first step
        print("waiting")
        time.sleep(run["waits"][str(host)])
    if str(host) in run.get("fails", {}):
        steps = iter(range(run["fails"][str(host)]))
        bad_samples.BadSamples.add = lambda *_: next(steps, None) is None and fail()


def saving_again(folder):
    """In place of `restore`: what was restored is saved in another run's folder, too, before a step is made."""

    def restored(self, state):
        state = restore(self, state)
        if distributed.is_leader():
            pathlib.Path(folder).mkdir()
        distributed.wait("a folder to save in again")
        with RunCheckpoints(folder, Keep(1)) as again:
            again.finish(self.latest, state)
        return state

    return restored


def fail():
    raise UserError("the disk of this host is full")


def compiled_in_turn(step):
    """The first host compiles a step for all, by way of the cache: gloo gives up on one that comes 30 s later."""
    done = set()

    def call(*arguments, **options):
        key = options["stage"]
        if key not in done and distributed.several():
            done.add(key)
            for mine in (distributed.is_leader(), not distributed.is_leader()):
                if mine:
                    step.lower(*arguments, **options).compile()
                distributed.wait("compiled")
        return step(*arguments, **options)

    return call


def main(job, host):
    jax.config.update("jax_disable_most_optimizations", True)
    train_step_for = loop.train_step_for
    loop.train_step_for = lambda run: compiled_in_turn(train_step_for(run))
    held_out.eval_step = compiled_in_turn(held_out.eval_step)
    distributed.HEARTBEAT_SECONDS = job["heartbeat"]
    mirror = None
    with preemption.listening():
        distributed.start(job["coordinator"], job["hosts"], host, timeout=120)
        with preemption.agreeing(), distributed.ending_together(job["runs"][0]["folder"]):
            for run in job["runs"]:
                prepare(run, host)
                config = config_of(run, host)
                if "url" in run and mirror is None:
                    os.environ["HOVLE_CACHE"] = os.path.join(os.environ["HOVLE_CACHE"], f"host_{host}")
                    mirror = exchange.open_copy(run["url"])
                folder = mirror.folder / pathlib.Path(run["folder"]).name if mirror else pathlib.Path(run["folder"])
                result = loop.run(config, folder, {}, mirror=mirror)
                if mirror:
                    exchange.from_leader("this run is there", mirror)
                status = exit_status(config, result.step, preemption.request())
    sys.exit(status)


if __name__ == "__main__":
    main(json.loads(pathlib.Path(sys.argv[1]).read_text()), int(sys.argv[2]))
