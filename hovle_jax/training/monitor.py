"""What a run tells while it goes: its line and metrics, its model FLOP/s, where its time goes, a trace on request."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hovle_jax.config import RunConfig
from hovle_jax.hardware.chips import total_bf16_flops
from hovle_jax.hosts import distributed
from hovle_jax.report import goodput
from hovle_jax.report.facts import peak_memory, write_facts
from hovle_jax.report.metrics import HELD_OUT, TIMES, WALL, MetricsWriter, NoMetrics
from hovle_jax.report.progress import Progress, format_number
from hovle_jax.report.seen import Seen
from hovle_jax.report.speed import Speed
from hovle_jax.report.tracking import open_tracker
from hovle_jax.training import watchdog
from hovle_jax.training.carried import Carried, read_carried, write_carried
from hovle_jax.training.profiling import Profile
from hovle_jax.training.stages import find

# Steps on their way while the next batch is put on the devices: a save on request waits for no more of them, and
# batches of no more of them and of the next one take memory.
MOST_AHEAD = 1


class Monitor:
    """Follows one run of a stage in one process; its time begins here.

    All hosts do the same, and the first one speaks and writes.

    Attributes:
      config: RunConfig.
      folder: the run's own.
      profile: the steps to trace, a range, or None.
      say: takes a line.
      track: a service that follows the run (`report.tracking`); '' = none.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        profile: range | None = None,
        say: Callable[[str], None] = print,
        track: str = "",
    ) -> None:
        self.config, self.folder, self.say = config, folder, say
        self._track, self._facts = track, {}
        self._steps_to_trace = profile
        self._sheet = goodput.TimeSheet()
        self._waiting: list[dict[str, Any]] = []  # metrics of the steps since the last line, on the devices or read

    def about(self, **facts: Any) -> None:
        """Facts of the run for its report: parameters_trained, parameters_frozen, samples of the training data."""
        self._facts = facts

    @contextlib.contextmanager
    def following(self, first_step: int, tokens_per_step: int, devices: Iterable) -> Iterator[None]:
        """The steps of this process are made within.

        Args:
          first_step: steps that were done before.
          tokens_per_step: of a global batch.
          devices: all that the steps run on.
        """
        config, leads = self.config, distributed.is_leader()
        self._first_step = first_step
        self._devices = list(devices)
        self._sheet.add(goodput.earlier_time(self.folder, first_step))
        self._progress = Progress(config.stage, config.steps, first_step, tokens_per_step)
        flops = find(config.stage).step_flops(config).model
        self._speed = Speed(flops, total_bf16_flops(device.device_kind for device in self._devices))
        with contextlib.ExitStack() as stack:
            self._writer = stack.enter_context(self._metrics_writer() if leads else NoMetrics())
            carried = read_carried(self.folder, first_step) or Carried()
            self._waiting, self.evaluates = list(carried.metrics), carried.evaluates
            self._seen = Seen.since(
                first_step, {"step": first_step} | carried.seen if carried.seen else self._writer.last
            )
            self._watch = stack.enter_context(goodput.StepWatch(self._sheet.clock))
            self._watchdog = stack.enter_context(self._make_watchdog())
            profile = Profile(self._steps_to_trace, self.folder, self.besides, self._say_of_stage)
            self._profile = stack.enter_context(profile)
            yield

    def waits(self, batches: Iterable[tuple]) -> Iterator[tuple]:
        """The batches, with the time that the devices wait for them put down to the data."""
        batches = iter(batches)
        while True:
            asked = self._sheet.clock()
            batch = next(batches, None)
            waited = goodput.wait_time(asked, self._sheet.clock(), self._watch.idle_since())
            self._sheet.move(waited, "data")
            if batch is None:
                return
            arrays, _, drawn = batch
            self._seen.add(arrays, drawn)
            yield batch

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[Callable[[dict], None]]:
        """A step is dispatched within; gives the function that takes its metrics."""
        self._profile.before(step)
        first = step == self._first_step
        if first:
            self._sheet.enter("compile")
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield self._waiting.append
        metrics = self._waiting[-1]
        self._watch.dispatched(metrics["loss"])
        jax.block_until_ready(self._waiting[:-MOST_AHEAD][-1:])
        self._profile.after(step)
        if first:
            jax.block_until_ready(metrics)
            self._sheet.enter("training")
            self._progress.started()
            self._speed.measure(step + 1, self._sheet.seconds(), self._seen.here()["tokens_seen"])

    def line(self, done: int, **beside: float) -> None:
        """Writes and says how the steps since the last line went.

        Reads values that are done or nearly so; between these points the host runs ahead of the devices.

        Args:
          beside: more numbers to show: the learning rate.
        """
        values = self._mean_metrics() | beside
        self._waiting = []
        seconds = self._sheet.seconds()
        rates = self._speed.measure(done, seconds, self._seen.here()["tokens_seen"])
        rates |= {"goodput": goodput.goodput(seconds)}
        took = {WALL: sum(seconds.values())} | peak_memory(self._devices) | self._seen.totals()
        self.write(done, values | {name: rate for name, rate in rates.items() if rate is not None} | took)
        if distributed.is_leader():
            goodput.write_time(self.folder, done, seconds)
        self.say(self._progress.line(done, values, rates))

    @contextlib.contextmanager
    def besides(self, activity: str) -> Iterator[None]:
        """Something else than steps is done within, which waits for those on their way: until then they train."""
        jax.block_until_ready(self._waiting[-1:])
        with self._watchdog.paused(), self._sheet.spent(activity):
            yield

    def carry(self, step: int, evaluates: bool) -> None:
        """Notes for the checkpoint of a step, which is saved next, what the metrics of a resumed run need of this one.

        Args:
          evaluates: whether the held-out metrics of this step are left to the resumed run.
        """
        self._waiting = [{name: float(value) for name, value in m.items()} for m in jax.device_get(self._waiting)]
        carried = Carried(self._waiting, self._seen.totals(), evaluates)
        if distributed.is_leader():
            self._writer.sync()
            write_carried(self.folder, step, carried)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds to the metrics of a step."""
        self._writer.write(step, values)

    def held_out(self, step: int, metrics: Mapping[str, float], rows: int) -> None:
        """Writes and says the held-out metrics at a step, of so many rows."""
        self.write(step, {f"{HELD_OUT}{name}": value for name, value in metrics.items()})
        values = "  ".join(f"{name} {format_number(value)}" for name, value in metrics.items())
        self._say_of_stage(f"held out at step {step}: {values}  ({rows:,} rows)")

    def ended(self, done: int) -> None:
        """Says and writes where the time went until here."""
        seconds = self._sheet.seconds()
        if done >= self.config.steps:  # a row where a run is stopped would not be in one that goes on
            self.write(done, {f"{TIMES}{activity}": value for activity, value in seconds.items()})
        if distributed.is_leader():
            goodput.write_time(self.folder, done, seconds)
        self._say_of_stage(goodput.summary(seconds))

    def _metrics_writer(self):
        """On the host that writes; what was known before the first step is written here."""
        write_facts(self.folder, **self._facts)
        tracker = open_tracker(self._track, self.folder, self.config.to_dict())
        writer = MetricsWriter(self.folder, self._first_step, tracker)
        first_batch = self.folder / "first_batch.png"
        if self._first_step == 0 and first_batch.is_file():
            writer.show(0, "first_batch", first_batch)
        return writer

    def _make_watchdog(self):
        health, path = self.config.health, self.folder / f"stacks-{jax.process_index()}.txt"
        end = lambda line: distributed.end_all(f"error: {line}", watchdog.STUCK)  # a stuck thread hears no exception
        stop = end if health.on_hang == "stop" else None
        ended, seconds, clock = self._watch.ended, health.watchdog_seconds, self._sheet.clock
        return watchdog.Watchdog(ended, seconds, path, self._say_of_stage, stop, clock)

    def _say_of_stage(self, text):
        self.say(f"{self.config.stage}: {text}")

    def _mean_metrics(self):
        values = jax.device_get(self._waiting)
        names = sorted(values[0], key=lambda name: name != "loss")
        return {name: _mean([m[name] for m in values]) for name in names}


def _mean(values):
    """Of those that are finite, as the update of any other step was left out; in float64, from a device or a file."""
    finite = [float(value) for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan
