"""What the checks of a run and its saves take of its time.

    python tests/benchmarks/overhead.py --stage contrast --rounds 10

In one process, on the tiny preset: the step as it is and the same step without its judgement take turns of a few steps,
each on a state of its own. Then a save, with what is checked before it, is timed against steps that have none: how long
the loop waits for it, and how much longer the steps beside the writing take. Prints one JSON object: seconds, and the
shares of a step's time that the checks, a save every 100 steps, and both take. The bar is 2%.
"""

import argparse
import contextlib
import functools
import json
import pathlib
import statistics
import tempfile
import time
from unittest import mock

BAR = 0.02
EVERY = 100  # steps between two saves
TURN = 4  # steps


def set_up(stage):
    """-> (config, run, function that makes a state, a batch on the devices)."""
    from hovle_jax import train
    from hovle_jax.corpora import loading
    from hovle_jax.data import pipeline
    from hovle_jax.sharding.mesh import make_mesh
    from hovle_jax.training.setup import build
    from hovle_jax.training.stages import STAGES
    from hovle_jax.training.state import make_state
    from hovle_jax.training.weights import load_params

    config = train.stage_config("configs", stage, "tiny")
    corpus = loading.load_corpus(config, "train")
    tokenizer = pipeline.train_tokenizer(config, corpus)
    batch = pipeline.build_dataset(config, STAGES[stage].batch, tokenizer, corpus)[0]
    run = build(config, make_mesh(config.mesh))
    new_state = lambda: make_state(STAGES[stage], run, load_params(config, run, {}))
    return config, run, new_state, run.placement.put_batch(batch)


@contextlib.contextmanager
def unjudged():
    """Steps that are compiled meanwhile make every update, and nobody looks."""
    from hovle_jax.training import judging

    nobody = {"before_update": lambda *_: (judging.FINE, True), "of_update": lambda *_: judging.FINE}
    with mock.patch.multiple(judging, **nobody):
        yield


def steps(jitted, state, batch, stage, run):
    """Endless steps; each gives (its seconds, state)."""
    import jax

    while True:
        started = time.perf_counter()
        state, metrics = jitted(state, batch, stage=stage, run=run)
        jax.block_until_ready((state, metrics))
        yield time.perf_counter() - started, state


def in_turns(sides, rounds):
    """{name: endless steps} -> {name: seconds of each step}."""
    found = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            found[name] += [next(side)[0] for _ in range(TURN)]
    return found


def time_checks(stage, run, new_state, batch, rounds):
    """-> {'with': seconds of a step, 'without': ...}, medians."""
    import jax

    from hovle_jax.training import step

    plain = getattr(step.train_step, "__wrapped__")
    without = functools.wraps(plain)(lambda *given, **static: plain(*given, **static))  # of a cache of its own
    jitted = {"with": step.train_step, "without": jax.jit(without, **step._JIT)}
    sides = {}
    for name, function in jitted.items():
        sides[name] = steps(function, new_state(), batch, stage, run)
        with contextlib.nullcontext() if name == "with" else unjudged():
            next(sides[name])  # compiles
    return {name: statistics.median(seconds) for name, seconds in in_turns(sides, rounds).items()}


def time_saves(config, run, new_state, batch, rounds):
    """-> seconds that a save adds to a run: the loop's wait, and what the steps beside the writing take longer."""
    from hovle_jax.training import resumable, step
    from hovle_jax.training.health import Health
    from hovle_jax.training.saved_steps import Keep

    added = []
    with tempfile.TemporaryDirectory() as folder, resumable.RunCheckpoints(pathlib.Path(folder), Keep(2)) as saved:
        health = Health(config, pathlib.Path(folder), {}, say=lambda line: None)
        state = health.start(new_state(), 0)
        side = steps(step.train_step, state, batch, config.stage, run)
        next(side)
        for i in range(1, rounds + 1):
            usual = statistics.median(next(side)[0] for _ in range(TURN))
            state = next(side)[1]
            started = time.perf_counter()
            health.before_save(i, state)
            saved.save(i, state)
            added.append(time.perf_counter() - started)
            added[-1] += sum(next(side)[0] - usual for _ in range(TURN))
            saved.finish(i, state)
    return statistics.median(added)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", default="contrast")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    from hovle_jax.system import malloc

    malloc.keep_freed_memory()  # as every command does
    config, run, new_state, batch = set_up(options.stage)
    step = time_checks(options.stage, run, new_state, batch, options.rounds)
    save = time_saves(config, run, new_state, batch, options.rounds)
    checks, saves = step["with"] / step["without"] - 1, save / EVERY / step["without"]
    seconds = {"a step": step["with"], "a step without checks": step["without"], "a save": save}
    shares = {"checks": checks, f"a save every {EVERY} steps": saves, "both": checks + saves}
    rounded = lambda found: {key: round(value, 4) for key, value in found.items()}
    report = {"stage": options.stage, "seconds": rounded(seconds), "share": rounded(shares)}
    print(json.dumps(report | {"bar": BAR, "holds": checks + saves <= BAR}, indent=2))


if __name__ == "__main__":
    main()
