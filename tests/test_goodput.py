"""Where a run's time goes, its model FLOP/s and MFU, and traces on request."""

import dataclasses
import gzip
import json
import pathlib
import threading
import time

import pytest

from hovle_jax import train
from hovle_jax.config import ExecutionConfig
from hovle_jax.errors import UserError
from hovle_jax.evaluation import summary
from hovle_jax.hardware.chips import CHIPS, total_bf16_flops
from hovle_jax.report import goodput
from hovle_jax.report.metrics import read_metrics
from hovle_jax.report.progress import Progress, format_rates
from hovle_jax.report.speed import Speed
from hovle_jax.training import loop, monitor, profiling
from hovle_jax.training.stages import STAGES
from tests import micro

ROOT = pathlib.Path(__file__).parents[1]


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def spend(self, seconds):
        self.now += seconds


def spent(**seconds):
    return dict.fromkeys(goodput.ACTIVITIES, 0.0) | seconds


# ---------------------------------------------------------------------------------------------------------------------
# The time sheet


def test_every_second_belongs_to_one_activity():
    clock = Clock()
    sheet = goodput.TimeSheet(clock)
    clock.spend(5)
    with sheet.spent("evaluation"):
        clock.spend(2)
    clock.spend(1)
    sheet.enter("compile")
    clock.spend(4)
    sheet.enter("training")
    clock.spend(20)
    with pytest.raises(KeyError), sheet.spent("checkpoints"):
        clock.spend(3)
        raise KeyError
    clock.spend(5)
    sheet.move(10, "data")
    expected = spent(start=6, compile=4, training=15, data=10, evaluation=2, checkpoints=3)
    assert sheet.seconds() == expected and sum(expected.values()) == 40
    assert goodput.goodput(sheet.seconds()) == 15 / 40
    sheet.add(spent(training=25, lost=15))
    assert goodput.goodput(sheet.seconds()) == 40 / 80
    assert goodput.summary(sheet.seconds()) == (
        "50.0% goodput; training 0:00:40 (50.0%), lost 0:00:15 (18.8%), data 0:00:10 (12.5%), start 0:00:06 (7.5%), "
        "compile 0:00:04 (5.0%), checkpoints 0:00:03 (3.8%), evaluation 0:00:02 (2.5%)"
    )


def test_a_sheet_of_no_time_has_no_goodput():
    assert goodput.goodput(spent()) == 0 and goodput.shares(spent()) == {}


@pytest.mark.parametrize("resume_step, training, lost", [(300, 100, 7), (250, 100, 7), (200, 80, 27), (0, 0, 107)])
def test_training_behind_the_checkpoint_is_lost(tmp_path, resume_step, training, lost):
    assert goodput.earlier_time(tmp_path, resume_step) == {}
    goodput.write_time(tmp_path, 250, spent(training=100, compile=30, lost=7))
    assert goodput.earlier_time(tmp_path, resume_step) == spent(training=training, compile=30, lost=lost)


@pytest.mark.parametrize("idle_since, waited", [(None, 0), (5, 3), (10, 3), (12, 1), (13, 0), (14, 0)])
def test_waiting_for_data_counts_while_the_devices_are_idle(idle_since, waited):
    assert goodput.wait_time(10, 13, idle_since) == waited


class Result:
    """A step's result, there when a test says so."""

    def __init__(self):
        self.ready = threading.Event()

    def block_until_ready(self):
        assert self.ready.wait(20)


def until_idle(watch):
    end = time.monotonic() + 20
    while watch.idle_since() is None:
        assert time.monotonic() < end
        time.sleep(0.001)
    return watch.idle_since()


def test_the_watch_knows_since_when_the_devices_are_idle():
    clock, steps = Clock(), [Result() for _ in range(3)]
    with goodput.StepWatch(clock) as watch:
        assert watch.idle_since() == 1000
        for step in steps[:2]:
            watch.dispatched(step)
        assert watch.idle_since() is None
        steps[0].ready.set()
        assert watch.idle_since() is None  # the second one is still on its way
        clock.spend(7)
        steps[1].ready.set()
        assert until_idle(watch) == 1007
        clock.spend(1)
        steps[2].block_until_ready = lambda: 1 / 0  # a step that fails ends too; the loop raises what it raised
        watch.dispatched(steps[2])
        assert until_idle(watch) == 1008


# ---------------------------------------------------------------------------------------------------------------------
# FLOP/s


def test_speed_is_that_of_steps_and_of_waiting_for_their_data():
    speed = Speed(flops_per_step=6e9, peak=4e9)
    assert speed.measure(101, spent(start=30, compile=9)) == {"model_flops_per_second": None, "mfu": None}
    got = speed.measure(111, spent(start=30, compile=9, training=20, data=10, evaluation=50))
    assert got == {"model_flops_per_second": 2e9, "mfu": 0.5}
    assert speed.measure(112, spent(training=22, data=11))["mfu"] == 0.5  # since the last call
    unknown = Speed(6e9, None)
    unknown.measure(1, spent())
    assert unknown.measure(2, spent(training=3)) == {"model_flops_per_second": 2e9}


def test_peaks_add_up_and_a_cpu_has_none():
    assert total_bf16_flops(["TPU v5 lite"] * 8) == 8 * CHIPS["v5e"].bf16_flops
    assert total_bf16_flops(["TPU7x"] * 8) == 4 * CHIPS["tpu7x"].bf16_flops  # a chip is two devices
    assert total_bf16_flops(["cpu"]) is None and total_bf16_flops(["TPU v5 lite", "NVIDIA L4"]) is None


def test_rates_in_the_line():
    known = {"model_flops_per_second": 3.82e14, "mfu": 0.4125, "goodput": 0.9}
    assert list(format_rates(known).values()) == ["41.2% MFU", "90.0% goodput"]
    assert list(format_rates({"model_flops_per_second": 3.82e10, "goodput": 1.0}).values()) == [
        "38.2 GFLOP/s", "100.0% goodput",
    ]  # fmt: skip
    assert list(format_rates({"model_flops_per_second": None}).values()) == ["- FLOP/s"]
    progress = Progress("distill", 9, 0, 0)
    lines = [progress.line(3, {}, {"mfu": mfu, "goodput": 0.5}) for mfu in (0.412, None, 0.05)]
    assert lines[0] == "distill   3/9  33%  41.2% MFU  50.0% goodput  -:-- left"
    assert lines[1] == "distill   3/9  33%      - MFU  50.0% goodput  -:-- left"
    assert lines[2] == "distill   3/9  33%   5.0% MFU  50.0% goodput  -:-- left"


# ---------------------------------------------------------------------------------------------------------------------
# Runs

RUN = micro.run_config(
    "contrast", steps=6, log_every=2, checkpoint_every=4, execution=ExecutionConfig(dtype="auto"), stop_at_step=5
)


def test_a_run_measures_itself_and_traces_the_steps_that_it_was_asked_for(
    tmp_path, micro_corpus, quick_compilation, monkeypatch
):
    monkeypatch.setattr(monitor, "total_bf16_flops", lambda names: 1e6 * len(list(names)))
    said = []
    loop.run(RUN, tmp_path, {}, said.append, profile=range(2, 4))
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 5]
    for row in rows:
        assert row["model_flops_per_second"] > 0 and 0 < row["goodput"] < 1
        assert row["mfu"] == pytest.approx(row["model_flops_per_second"] / 8e6)  # of the eight devices of the tests
    lines = [line for line in said if "% goodput  " in line]
    assert len(lines) == 3 and all("% MFU  " in line for line in lines)

    step, seconds = goodput.read_time(tmp_path)
    assert step == 5 and seconds.keys() == set(goodput.ACTIVITIES)
    assert {f"seconds/{activity}": value for activity, value in seconds.items()}.items() <= rows[-1].items()
    assert all(seconds[activity] > 0 for activity in ("start", "compile", "training", "checkpoints", "profile"))
    assert seconds["lost"] == seconds["evaluation"] == 0
    assert any(line.startswith(f"contrast: {100 * goodput.goodput(seconds):.1f}% goodput; ") for line in said)
    # Steps 1 to 4 are not the compiling one.
    mean = 4 * STAGES["contrast"].step_flops(RUN).model / (seconds["training"] + seconds["data"])
    assert mean < 1.01 * max(row["model_flops_per_second"] for row in rows)

    assert traced_steps(tmp_path) == {2, 3}
    assert [str(tmp_path / "profile") in line for line in said if "trace of steps 2 to 3" in line] == [True]
    with pytest.raises(UserError, match="--profile=2:4 is not inside the steps that this run makes, 5:6"):
        loop.run(dataclasses.replace(RUN, stop_at_step=0), tmp_path, {}, said.append, profile=range(2, 4))


def traced_steps(folder):
    """The numbers of the steps that a trace has."""
    (trace,) = (folder / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return {int(event["args"]["step_num"]) for event in events if event.get("name") == "train" and "args" in event}


def test_a_run_that_ends_within_the_traced_steps_ends_its_trace(tmp_path, micro_corpus, quick_compilation, monkeypatch):
    import jax

    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    sheet = goodput.TimeSheet()
    with pytest.raises(KeyError), profiling.Profile(range(1, 4), tmp_path, sheet.spent, print) as profile:
        for step in range(3):
            profile.before(step)
            profile.after(step)
        assert calls == ["start"]
        raise KeyError
    assert calls == ["start", "stop"]
    with profiling.Profile(None, tmp_path, sheet.spent, print) as profile:
        profile.before(0)
        profile.after(0)
    assert calls == ["start", "stop"]


def test_steps_to_trace():
    assert profiling.parse_steps("10:15") == range(10, 15) and profiling.parse_steps("") is None
    for text in ("10", "15:10", "3:3", "-1:2", "1:2:3", "a:b", ":"):
        with pytest.raises(UserError, match="is not FIRST:LAST"):
            profiling.parse_steps(text)
    profiling.check_steps(range(0, 4), 0, 4)
    profiling.check_steps(None, 0, 4)
    with pytest.raises(UserError, match="--profile=0:5 is not inside the steps that this run makes, 0:4"):
        profiling.check_steps(range(0, 5), 0, 4)


def test_a_run_that_was_preempted_is_not_done():
    config = dataclasses.replace(RUN, stop_at_step=0)
    assert train.exit_status(config, 6) == 0 and train.exit_status(config, 4) == 143
    assert train.exit_status(dataclasses.replace(config, stop_at_step=4), 4) == 0
    assert train.exit_status(dataclasses.replace(config, stop_at_step=9), 6) == 0


def test_only_the_named_stage_is_traced(tmp_path, monkeypatch):
    traced = {}

    def run(config, folder, sources, say, profile, track, mirror):
        traced[config.stage] = profile
        return loop.Result(folder, config.steps, finished=True, held_out={})

    monkeypatch.setattr(loop, "run", run)
    monkeypatch.setattr(summary, "summarize", lambda config, result, benchmark, track: {})
    config = train.stage_config(ROOT / "configs", "distill", "tiny")
    train.train(config, ROOT / "configs", tmp_path, time.time(), range(3, 5))
    assert traced.pop("distill") == range(3, 5)
    assert traced and set(traced.values()) == {None}
