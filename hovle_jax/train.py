"""Trains a stage, and first the stages that it needs.

    python -m hovle_jax.train --config configs/distill.py
    python -m hovle_jax.train --config configs/instruct.py --workdir runs --config.optimizer.learning_rate=1e-4
    python -m hovle_jax.train --config configs/instruct.py --from runs/instruct --workdir runs_mine \
        --config.data.source=rows.jsonl                                 # goes on from a finished model, on own data
    python -m hovle_jax.train --config configs/instruct.py --show       # all keys, with values and meanings
    python -m hovle_jax.train --config configs/instruct.py --workdir gs://bucket/runs        # docs/saves.md
    python -m hovle_jax.train --config configs/instruct.py --workdir runs_seeds --seeds 3    # mean and spread

A stage that is finished in the work folder is used as it is; an interrupted one resumes from its newest checkpoint.

On a TPU pod the same command is started on every host (docs/multihost.md).

Ends with status 0 where all is done that was asked for, and 2 at a user's mistake. Asked to end by SIGTERM, Ctrl-C or
SIGHUP, it saves after the step that is being made and ends with 143, 130 or 129 (128 + the signal), or at once with 75
where nothing can be saved; the same command goes on (docs/reliability.md).
"""

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import config_flags

from hovle_jax.config import InitConfig, RunConfig
from hovle_jax.errors import UserError
from hovle_jax.hosts import options as hosts
from hovle_jax.system import command_line, config_help

if TYPE_CHECKING:
    from hovle_jax.system.mirror import Mirror

flags.adopt_module_key_flags(hosts)  # so that --help lists them
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A stage's config file, with a preset: configs/distill.py:tiny"
)
WORKDIR = flags.DEFINE_string(
    "workdir", "runs", "The folder of all runs, one folder a stage, shared by all hosts; or its URL (gs://...)"
)
FROM = flags.DEFINE_string(
    "from", "", "A finished model to start from: a folder; of what it has all that the stage holds"
)
PROFILE = flags.DEFINE_string("profile", "", "FIRST:LAST: traces these steps of the named stage into its folder")
SHOW = flags.DEFINE_bool("show", False, "Print every key of --config, its value and what it means, and train nothing")
TRACK = flags.DEFINE_enum(
    "track", "", ["", "wandb", "trackio"], "A service that follows the run, beside its JSON lines and TensorBoard"
)
SEEDS = flags.DEFINE_integer(
    "seeds", 0, "3: trains the chain with the seeds 0, 1, 2 into WORKDIR/seed_0, ..., and compares them", lower_bound=0
)


ONE_HOST = "--seeds trains on one host; on several, start a run for each with --config.seed and compare them after"


def stage_config(folder: str | os.PathLike, stage: str, preset: str) -> RunConfig:
    """The config of another stage: the file of its name beside the one that was given."""
    path = pathlib.Path(folder) / f"{stage}.py"
    if not path.is_file():
        raise UserError(f"the stage {stage!r} is needed first and {path} does not exist; give its run's folder instead")
    spec = importlib.util.spec_from_file_location(f"hovle_config_{stage}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return RunConfig.from_dict(module.get_config(preset).to_dict())


def start_from(config: RunConfig, folder: str) -> RunConfig:
    """The config with a finished model as the source of every component that it has."""
    from hovle_jax.checkpoints import load_model_config
    from hovle_jax.conversion.downloads import resolve
    from hovle_jax.inference.folders import check_model_folder
    from hovle_jax.training.stages import find

    path = resolve(folder)
    check_model_folder(path)
    model = load_model_config(path)
    wanted = [field.name for field in dataclasses.fields(InitConfig) if field.name in find(config.stage).components]
    found = [component for component in wanted if getattr(model, component, None) is not None]
    if not found:
        raise UserError(f"--from={folder} has nothing that {config.stage} starts from: it needs {' or '.join(wanted)}")
    return dataclasses.replace(config, init=dataclasses.replace(config.init, **dict.fromkeys(found, folder)))


def plan(config: RunConfig, config_folder: pathlib.Path, workdir: pathlib.Path, seed: int | None = None) -> list:
    """The runs to make, in order: [(config, folder, {component: folder of its source})]; finished ones are left out.

    Args:
      seed: of all of them; None = each its config's own.
    """
    return [run for run in chain(config, config_folder, workdir, seed) if run[2] is not None]


def chain(config: RunConfig, config_folder: pathlib.Path, workdir: pathlib.Path, seed: int | None = None) -> list:
    """`plan`, and the finished runs that it builds on, with None in the place of their sources."""
    from hovle_jax.checkpoints import is_finished
    from hovle_jax.training.adopting import with_sizes_of_sources
    from hovle_jax.training.run_folder import check_same_config
    from hovle_jax.training.stages import STAGES, find

    runs, planned = [], set()

    def visit(config):
        config = with_sizes_of_sources(config if seed is None else dataclasses.replace(config, seed=seed))
        components = find(config.stage).components_of(config.model_config)
        folder, sources = workdir / config.stage, {}
        if config.stage in planned:
            return
        planned.add(config.stage)
        if is_finished(folder):
            used_as_it_is = f"or give {folder} itself with --config.init.COMPONENT={folder} to use it as it is"
            check_same_config(folder, config, used_as_it_is)
            runs.append((config, folder, None))
            return
        for field in dataclasses.fields(InitConfig):
            source = getattr(config.init, field.name)
            if field.name not in components or not source:
                continue
            if source == "required":
                raise UserError(
                    f"the preset {config.preset!r} starts from trained {field.name} weights; "
                    f"give their run's folder with --config.init.{field.name}=DIR"
                )
            if source in STAGES:
                visit(stage_config(config_folder, source, config.preset))
                sources[field.name] = workdir / source
            else:
                sources[field.name] = pathlib.Path(source)
        runs.append((config, folder, sources))

    visit(config)
    return runs


def main() -> None:
    started = time.time()
    config_path = command_line.config_file()
    config = RunConfig.from_dict(CONFIG.value.to_dict())
    if SHOW.value:
        print(config_help.text_of(config))
        return
    workdir = str(command_line.required("workdir"))
    if FROM.value:
        config = start_from(config, FROM.value)

    from hovle_jax.hosts import distributed, exchange, preemption
    from hovle_jax.report.tracking import check_installed
    from hovle_jax.system.remote import is_url
    from hovle_jax.training import profiling

    check_installed(TRACK.value)
    if SEEDS.value and hosts.HOSTS.value > 1:
        raise UserError(ONE_HOST)
    profile = profiling.parse_steps(PROFILE.value)
    profiling.check_steps(profile, 0, config.last_step)
    command = {"config": config.to_dict(), "workdir": workdir}
    with preemption.listening():
        hosts.start(command)
        mirror = exchange.open_copy(workdir) if is_url(workdir) else None
        if mirror and distributed.is_leader():
            print(f"{mirror.url}: works in a copy, {mirror.folder}")
        place = config_path.parent, mirror.folder if mirror else pathlib.Path(workdir)
        with preemption.agreeing(), distributed.ending_together(place[1] / config.stage):
            if SEEDS.value:
                status = train_seeds(config, *place, SEEDS.value, profile, TRACK.value, mirror)
            else:
                status = train(config, *place, started, profile, TRACK.value, mirror=mirror)
            if mirror:
                exchange.to_leader("the last files are sent", mirror)
                if distributed.is_leader():
                    mirror.push()
                    print(f"all of it is in {mirror.url}")
    sys.exit(status)


def train_seeds(
    config: RunConfig,
    config_folder: pathlib.Path,
    workdir: pathlib.Path,
    count: int,
    profile: range | None = None,
    track: str = "",
    mirror: "Mirror | None" = None,
) -> int:
    """Trains the same chain with seeds 0 to count - 1, one after another, and compares them. -> the exit status."""
    import jax

    from hovle_jax.report.comparison import compare

    if jax.process_count() > 1:
        raise UserError(ONE_HOST)
    folders = [workdir / f"seed_{seed}" for seed in range(count)]
    for seed, folder in enumerate(folders):
        print(f"==== seed {seed} of 0 to {count - 1} -> {folder}")
        of_seed = dataclasses.replace(config, seed=seed)
        status = train(of_seed, config_folder, folder, time.time(), profile, track, seed, mirror)
        if status:
            return status
    print(f"\n{compare(folders, workdir)}")
    return 0


def train(
    config: RunConfig,
    config_folder: pathlib.Path,
    workdir: pathlib.Path,
    started: float,
    profile: range | None = None,
    track: str = "",
    seed: int | None = None,
    mirror: "Mirror | None" = None,
) -> int:
    """Makes the runs that are missing, on all hosts; the first one speaks, and scores them. -> the exit status.

    Args:
      seed: of the stages that are trained first; None = each its config's own.
      mirror: where the work folder belongs, if it is a copy of one at a URL.
    """
    from hovle_jax.checkpoints import is_finished
    from hovle_jax.conversion.downloads import resolve
    from hovle_jax.hosts import distributed
    from hovle_jax.system.progress import format_duration
    from hovle_jax.training import checks, run_folder
    from hovle_jax.training.adopting import with_sizes_of_sources

    say = print if distributed.is_leader() else lambda line: None
    config = with_sizes_of_sources(config)
    run_folder.open_run_folder(workdir)
    folder = workdir / config.stage
    if is_finished(folder):
        checks.check(config)
        run_folder.check_same_config(folder, config)
        write_missing_reports([(config, folder, None)], say, track)
        say(f"{config.stage} is finished in {folder}; remove that folder to train it again")
        return 0
    all_runs = chain(config, config_folder, workdir, seed)
    runs = [run for run in all_runs if run[2] is not None]
    for stage, folder, _ in runs:
        checks.check(stage)
        run_folder.check_same_config(folder, stage)
    stages = [stage.stage for stage, *_ in runs]
    distributed.check_same("the stages to train", stages, f"{workdir} must be a folder that all hosts share")
    write_missing_reports(all_runs, say, track)
    runs = [(stage, folder, {c: resolve(str(s)) for c, s in sources.items()}) for stage, folder, sources in runs]
    for done, (stage, folder, sources) in enumerate(runs):
        if stage.stage != config.stage:
            say(f"{config.stage} needs {stage.stage}, which {workdir} does not have yet: training it first")
        say(f"== {stage.stage} ({done + 1} of {len(runs)}) -> {folder}")
        with run_locked(folder, say):
            traced = profile if stage.stage == config.stage else None
            status = train_one(stage, folder, sources, say, traced, track, mirror)
        if status is not None:
            return status
    page = workdir / config.stage / "report.html"
    say(f"done in {format_duration(time.time() - started)}; see {page} and, of all stages, {workdir / 'report.html'}")
    return 0


@contextlib.contextmanager
def run_locked(folder: pathlib.Path, say: Callable[[str], None]) -> Iterator[None]:
    """No other run uses the folder within the block; the first host sees to it for all."""
    from hovle_jax.hosts import distributed
    from hovle_jax.system.files import remove_unfinished
    from hovle_jax.system.lock import locked
    from hovle_jax.training.run_folder import open_run_folder

    if not distributed.is_leader():
        yield
        return
    with locked(open_run_folder(folder), say):
        remove_unfinished(folder)
        yield


def train_one(
    stage: RunConfig,
    folder: pathlib.Path,
    sources: dict,
    say: Callable[[str], None],
    profile: range | None,
    track: str,
    mirror: "Mirror | None" = None,
) -> int | None:
    """One run and its report, on all hosts -> the exit status; None = the next run may begin."""
    from hovle_jax.hosts import exchange, preemption
    from hovle_jax.training import loop

    result = loop.run(stage, folder, sources, say, profile, track, mirror)
    asked = preemption.request()
    by = f" by {asked.by}" if asked else ""
    if not result.finished:
        without = " without stop_at_step" if stage.stop_at_step else ""
        say(f"stopped at step {result.step} of {stage.steps}{by}, which is saved; the same command{without} goes on")
        return exit_status(stage, result.step, asked)
    if asked:
        say(f"stopped{by} with the model of {stage.stage} written; the same command goes on with its report")
        return asked.status
    report(stage, result, say, track)
    exchange.from_leader("the next run may begin", mirror)
    return None


def report(stage: RunConfig, result: Any, say: Callable[[str], None], track: str) -> None:
    """Scores a finished run and writes its page, on the first host; the others wait."""
    from hovle_jax.evaluation.summary import summarize
    from hovle_jax.hosts import distributed, preemption
    from hovle_jax.training.stages import find

    with preemption.reporting():
        if distributed.is_leader():
            for name, value in summarize(stage, result, find(stage.stage).benchmark, track).items():
                say(f"{stage.stage}: {name} {value}")
        distributed.wait("the report is written")


def write_missing_reports(runs: list, say: Callable[[str], None], track: str) -> None:
    """Writes the reports of finished runs whose process ended before it had."""
    from hovle_jax.evaluation.summary import complete_chain, is_reported
    from hovle_jax.hosts import distributed
    from hovle_jax.training import loop

    for stage, folder, sources in runs:
        if sources is not None:
            continue
        if distributed.gather("reported", is_reported(folder))[0]:
            if distributed.is_leader():
                complete_chain(folder.parent, folder)
            continue
        say(f"{stage.stage} is trained and has no report yet: writing it")
        with run_locked(folder, say):
            report(stage, loop.result_of_finished(stage, folder), say, track)


def exit_status(config: RunConfig, step: int, asked: Any = None) -> int:
    """Of a run that has ended without an error: one that stops before its last step was preempted.

    Args:
      asked: the `preemption.Request`, if there was one.
    """
    if step >= config.last_step:
        return 0
    return asked.status if asked else 128 + signal.SIGTERM


if __name__ == "__main__":
    command_line.run(main, config=RunConfig)
