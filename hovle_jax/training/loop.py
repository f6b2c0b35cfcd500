"""The loop: start or resume, step, log, save, stop. Reads from top to bottom as a run goes."""

import dataclasses
import itertools
import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

from hovle_jax.components import Params
from hovle_jax.config import RunConfig
from hovle_jax.corpora import loading
from hovle_jax.data import pipeline
from hovle_jax.data.bad_samples import BadSamples, merge_bad_samples
from hovle_jax.hosts import distributed, exchange, preemption
from hovle_jax.report.batch_images import batch_image
from hovle_jax.report.metrics import read_held_out
from hovle_jax.sharding import table
from hovle_jax.sharding.mesh import make_mesh
from hovle_jax.sharding.placement import Placement
from hovle_jax.system.files import write_whole
from hovle_jax.system.mirror import Mirror
from hovle_jax.training import profiling, resumable, resumption, run_folder
from hovle_jax.training.checks import check, check_same_data_everywhere, check_sources, check_tokenizer
from hovle_jax.training.health import Health
from hovle_jax.training.held_out import check_keep_best, evaluate, open_held_out
from hovle_jax.training.monitor import Monitor
from hovle_jax.training.optimizer import learning_rate
from hovle_jax.training.saved_steps import Keep
from hovle_jax.training.setup import Run, build
from hovle_jax.training.source_digests import check_same_sources
from hovle_jax.training.stage import Stage
from hovle_jax.training.stages import find
from hovle_jax.training.state import TrainState, make_state, wholly_frozen
from hovle_jax.training.step import train_step_for
from hovle_jax.training.tokenizer import choose_tokenizer, texts_read_by
from hovle_jax.training.weights import Sources, load_params, save_result

FINISHING = 20  # batches that a stage may gather from when all is trained
log = logging.getLogger(__name__)


@dataclasses.dataclass
class Result:
    """What a run leaves for its report."""

    folder: pathlib.Path
    step: int
    finished: bool
    held_out: dict  # step -> metrics, of all processes of the run


def run(
    config: RunConfig,
    folder: str | os.PathLike,
    sources: Sources,
    say: Callable = print,
    profile: range | None = None,
    track: str = "",
    mirror: Mirror | None = None,
) -> Result:
    """Trains one stage, from the beginning or from its newest checkpoint. Called on all hosts; the first one speaks.

    Args:
      folder: the run's own.
      sources: {component: folder of the run that it comes from}.
      profile: a range of steps to trace, or None.
      track: a service that follows the run (`report.tracking`); '' = none.
      mirror: where the work folder belongs, if it is a copy of one at a URL.
    Returns:
      Result.
    Raises:
      UserError: see `checks.check` and `Health`.
    """
    # 1. Checks that need no device, then data: each host's own rows, planned alike on all of them.
    check(config)
    folder = run_folder.open_run_folder(folder)
    run_folder.check_same_config(folder, config)
    say = say if distributed.is_leader() else lambda line: None
    for line in check_sources(config, sources):
        say(f"{config.stage}: {line}")
    monitor = Monitor(config, folder, profile, say, track)
    stage, run = find(config.stage), build(config, make_mesh(config.mesh))
    corpus = loading.load_corpus(config, config.data.split, say)
    tokenizer = choose_tokenizer(config, [folder], texts_read_by(config, sources), corpus)
    check_tokenizer(config, tokenizer)
    numbers, lists_bad = distributed.host_rows(run.placement.batch_sharding, config.data.batch_size)
    dataset = pipeline.build_dataset(config, stage.batch, tokenizer, corpus, numbers=numbers)
    held_out = open_held_out(config, tokenizer, numbers, say)
    if held_out is None:
        check_keep_best(config.keep_best, None)
    first = dataset[0]
    if not mirror:  # a copy is each host's own
        distributed.check_shared(folder)
    check_same_data_everywhere(dataset.summary, tokenizer)

    # 2. The folder is a run from here on.
    if distributed.is_leader():
        run_folder.check_same_data(folder, dataset.summary)
        check_same_sources(folder, sources)
        run_folder.save_config(folder, config)
        tokenizer.save(folder)
        batch_image(first, tokenizer.pieces, folder / "first_batch.png")
    bad = BadSamples(folder if lists_bad else None, config.bad_ceiling, host=jax.process_index())

    # 3. State.
    keep = Keep(config.keep_checkpoints, config.keep_every, config.keep_best)
    saving = resumable.RunCheckpoints(folder, keep, say, mirror)
    with saving as saved:
        resumption.check_stop(folder, config, saved.latest or 0)
        profiling.check_steps(profile, saved.latest or 0, config.last_step)
        conditions = resumption.conditions(run.models.config.execution, config.health)
        for line in resumption.changes(folder, conditions) if saved.latest else []:
            say(f"{config.stage}: {line}")
        if distributed.is_leader():
            bad.start(saved.latest or 0, dataset.summary.bad, dataset.summary.samples)
        exchange.from_leader("the folder is a run", mirror)
        state = make_state(stage, run, load_params(config, run, sources))
        saved.check_space(state)
        shapes = shapes_of_whole(first, config.data.batch_size)
        say(describe(config, state, shapes))
        note_layout(folder, stage, run, shapes)
        trained, frozen = count(state.trained), count(state.frozen)
        samples = dataset.summary.samples
        monitor.about(parameters_trained=trained, parameters_frozen=frozen, samples=samples, **conditions)
        if dataset.summary.text:
            say(f"{config.stage}: {dataset.summary.text}")
        if saved.latest is not None:
            state = saved.restore(state)
            say(f"{config.stage}: resuming at step {saved.latest}")
        health = Health(config, folder, sources, say)
        state = health.start(state, saved.latest or 0)

        def save_model(state):
            # What was frozen whole may be narrowed: it is handed on as it came.
            frozen = load_params(config, run, sources, only=wholly_frozen(state.trained, state.frozen))
            params = state.params | frozen
            if stage.finish:
                batches = map(run.placement.put_batch, map(dataset.__getitem__, range(FINISHING)))
                params = stage.finish(run.models, params, batches)
            save_result(folder, stage, params, config, mirror)

        steps = Steps(config, run, dataset, held_out, bad, saved, monitor, health, save_model)
        step, finished = steps.train(state)
    exchange.to_leader("the last bad sample is listed", mirror)
    if distributed.is_leader():
        merge_bad_samples(folder)
    return Result(folder, step, finished, read_held_out(folder))


def result_of_finished(config: RunConfig, folder: pathlib.Path) -> Result:
    """The result of a run whose model is written; its process may have ended right then."""
    if distributed.is_leader():
        merge_bad_samples(folder)
    return Result(folder, config.steps, True, read_held_out(folder))


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of one process.

    Attributes:
      held_out: rows that are never trained on, or None.
      save_model: takes the last state.
    """

    config: RunConfig
    run: Run
    dataset: pipeline.Batches
    held_out: pipeline.HeldOut | None
    bad: BadSamples
    saved: resumable.RunCheckpoints
    monitor: Monitor
    health: Health
    save_model: Callable[[TrainState], None]

    def train(self, state: TrainState) -> tuple[int, bool]:
        """-> (step, whether the run is finished)."""
        config, monitor, placement = self.config, self.monitor, self.run.placement
        first_step, schedule = int(state.step), learning_rate(config.optimizer, config.steps)
        tokens = tokens_per_step(self.dataset[0]) * config.data.batch_size // self.dataset.size
        results, train_step = {}, train_step_for(self.run)

        def evaluate_held_out(step):
            if self.held_out:
                results[step] = self.evaluate(state, step)

        with preemption.saving(), monitor.following(first_step, tokens, placement.mesh.devices.flat):
            if first_step == 0 or monitor.evaluates:
                evaluate_held_out(first_step)
            if first_step in results:  # the run was stopped at this checkpoint, before they were known
                self.saved.held_out(first_step, results[first_step])
            for step, (batch, events, drawn) in enumerate(monitor.waits(self.batches(first_step)), first_step):
                self.bad.add(events, drawn)
                with monitor.step(step) as note:
                    state, metrics = train_step(state, batch, stage=config.stage, run=self.run)
                    note(self.health.took(step + 1, metrics))
                done = step + 1
                stops = done == config.last_step or preemption.preempted()
                if done % config.log_every == 0 or done == config.steps:
                    left_out = self.health.judge(state)
                    monitor.line(done, learning_rate=float(np.asarray(schedule(step))), **left_out)
                evaluates = bool(config.eval_every) and done % config.eval_every == 0
                if evaluates and not stops:
                    evaluate_held_out(done)
                if done % config.checkpoint_every == 0 or stops or self.saved.due_again():
                    with monitor.besides("checkpoints"):
                        self.health.before_save(done, state)
                        monitor.carry(done, evaluates and stops and done < config.steps)
                        self.saved.save(done, state, results.get(done))
                if stops:
                    break
            done = int(state.step)
            finished = done >= config.steps
            if finished and config.steps not in results:
                evaluate_held_out(config.steps)
            with monitor.besides("checkpoints"):
                self.saved.finish(done, state)
                if done in results:
                    self.saved.held_out(done, results[done])
                if finished:
                    self.save_model(state)
            monitor.ended(done)
        return done, finished

    def batches(self, first_step: int) -> Iterator[tuple]:
        """Those from `first_step` on, on the devices: (batch, events, samples drawn)."""
        config = self.config
        batches = self.dataset.iterate(first_step, config.workers, distributed.reached_by_all, config.worker_timeout)
        return prefetched(itertools.islice(batches, config.last_step - first_step), self.run.placement)

    def evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        """The held-out metrics at a step."""
        with self.monitor.besides("evaluation"):
            assert self.held_out is not None
            metrics = evaluate(self.held_out, state.params, self.config.stage, self.run)
        check_keep_best(self.config.keep_best, metrics)
        self.monitor.held_out(step, metrics, self.held_out.count)
        return metrics


def prefetched(batches: Iterable[tuple], placement: Placement) -> Iterator[tuple]:
    """(batch, *rest) -> (batch on the devices, *rest): each is put there while the step before it runs, none earlier:
    a device holds two (see `monitor.MOST_AHEAD`)."""
    for batch, *rest in batches:
        yield placement.put_batch(batch), *rest


def tokens_per_step(batch: dict) -> int:
    """Real tokens of a batch; for a contrastive one, its pairs' caption tokens."""
    return int(np.sum(batch["segment_ids"] > 0)) if "segment_ids" in batch else batch["tokens"].size


def count(tree: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def shapes_of_whole(rows: dict, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a global batch, from some of its rows."""
    return {name: jax.ShapeDtypeStruct((batch_size, *array.shape[1:]), array.dtype) for name, array in rows.items()}


def note_layout(folder: pathlib.Path, stage: Stage, run: Run, batch: dict) -> None:
    """Writes what lies where on the mesh into the run's folder, and says which rules of the table cannot apply."""
    if not distributed.is_leader():
        return
    trains = lambda path: stage.trains(path, run.models.config)
    lines, warnings = table.describe(run.layout, batch, trains)
    write_whole(folder / table.FILE_NAME, "\n".join(lines) + "\n")
    for warning in warnings:
        log.warning(warning)


def describe(config: RunConfig, state: TrainState, batch: dict) -> str:
    """One line: what is trained, what is read, the batch."""
    shape = " x ".join(map(str, batch["tokens"].shape))
    return (
        f"{config.stage}: {count(state.trained):,} parameters trained, {count(state.frozen):,} frozen; "
        f"batch {shape} tokens, {config.steps} steps"
    )
