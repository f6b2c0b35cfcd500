"""What a run tells of itself while it goes: the counts of what it has read, TensorBoard's images, trackers."""

import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from PIL import Image

from hovle_jax.config import ExecutionConfig
from hovle_jax.errors import UserError
from hovle_jax.report import seen, tracking
from hovle_jax.report.facts import HOST_PEAK, read_facts
from hovle_jax.report.goodput import read_time
from hovle_jax.report.metrics import MetricsWriter, is_measured, read_metrics
from hovle_jax.report.speed import Speed
from hovle_jax.training import loop
from tests import micro

ROOT = pathlib.Path(__file__).parents[1]


def quiet(line):
    pass


def events(folder):
    """[(step, tag, value or 'image')] of all event files of TensorBoard."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # a TFRecord: length, its checksum, the event, its checksum
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            for value in event.summary.value:
                found.append((event.step, value.tag, "image" if value.HasField("image") else value.simple_value))
            data = data[16 + size :]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What was read


def batch(**arrays):
    return {name: jax.numpy.asarray(array) for name, array in arrays.items()}


def places(*runs, length=20, tiles=3, tokens_per_tile=2):
    """[M * P] of tiles whose visual tokens begin at these places."""
    used = [start + i for start in runs for i in range(tokens_per_tile)]
    return used + [length] * (tiles * tokens_per_tile - len(used))


def test_tokens_images_and_samples_of_batches_are_counted():
    segments = np.zeros((2, 20), np.int32)
    segments[0, :11], segments[1, :6] = 1, 1
    # Row 0: an image of two tiles, and after a token one of a single tile; row 1: an image of one tile.
    positions = [places(3, 5, 8), places(0)]
    counted = seen.Seen.since(0, {"step": -1})
    arrays = batch(
        tokens=np.ones((2, 20)), segment_ids=segments, image_positions=positions, tiles=np.zeros((2, 3, 4, 4, 3))
    )
    counted.add(arrays, drawn=5)
    assert counted.totals() == {"tokens_seen": 17, "images_seen": 3, "samples_seen": 5}
    counted.add(batch(tokens=np.ones((2, 20)), segment_ids=segments), drawn=2)  # text alone
    assert counted.totals() == {"tokens_seen": 34, "images_seen": 3, "samples_seen": 7}
    contrast = seen.Seen.since(0, {"step": -1})
    contrast.add(batch(tokens=np.ones((4, 6)), tiles=np.zeros((4, 1, 4, 4, 3))), drawn=4)
    assert contrast.totals() == {"tokens_seen": 24, "images_seen": 4, "samples_seen": 4}


def test_a_sharded_batch_is_counted_once():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    arrays = jax.device_put({"tokens": np.ones((8, 6), np.int32)}, spread)
    counted = seen.Seen.since(0, {})
    counted.add(arrays, drawn=23)
    assert counted.totals() == {"tokens_seen": 48, "images_seen": 8, "samples_seen": 23}


def test_counting_goes_on_where_a_run_does_and_is_silent_where_it_cannot():
    known = {"step": 4, "tokens_seen": 100, "images_seen": 10, "samples_seen": 20}
    assert seen.Seen.since(4, known).totals() == {"tokens_seen": 100, "images_seen": 10, "samples_seen": 20}
    for row in (known | {"step": 3}, {"step": 4, "tokens_seen": 100}):
        unknown = seen.Seen.since(4, row)
        unknown.add(batch(tokens=np.ones((2, 3))), drawn=1)
        assert unknown.totals() == {} and unknown.here()["tokens_seen"] == 6


RUN = micro.run_config("contrast", steps=6, log_every=4, checkpoint_every=3, execution=ExecutionConfig(dtype="auto"))


@pytest.mark.slow
def test_a_run_says_what_it_has_read_and_what_it_took_and_goes_on_counting(tmp_path, micro_corpus, quick_compilation):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    loop.run(RUN, whole, {}, quiet)
    rows = {row["step"]: row for row in read_metrics(whole)}
    assert {step: row["samples_seen"] for step, row in rows.items()} == {4: 32, 6: 48}
    assert {f"seconds/{activity}": value for activity, value in read_time(whole)[1].items()}.items() <= rows[6].items()
    assert rows[6]["images_seen"] == 48 and rows[6]["tokens_seen"] == 48 * 24
    assert rows[4]["tokens_per_second"] > 0 and rows[4][HOST_PEAK] > 50e6
    assert 0 < rows[4]["wall_seconds"] < rows[6]["wall_seconds"]
    facts = read_facts(whole)
    assert facts["parameters_trained"] > 1000 and facts["parameters_frozen"] == 0 and facts["samples"] == 24
    assert (0, "first_batch", "image") in events(whole)

    # Killed after step 4: its checkpoint is that of step 3, which no line was due for.
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "model")
    shutil.rmtree(resumed / "checkpoints" / "6")
    loop.run(RUN, resumed, {}, quiet)
    read = lambda folder: [{k: v for k, v in row.items() if k.endswith("_seen")} for row in read_metrics(folder)]
    assert read(resumed) == read(whole)


def test_what_the_clock_and_the_machine_say_is_left_out_of_comparisons():
    for name in ("tokens_per_second", "goodput", "mfu", "wall_seconds", "seconds/training", HOST_PEAK):
        assert is_measured(name)
    for name in ("loss", "tokens_seen", "held_out/loss", "score/accuracy", "learning_rate"):
        assert not is_measured(name)


def test_tokens_a_second():
    speed = Speed(flops_per_step=1.0, peak=None)
    spent = lambda training: {"training": training, "data": 0.0}
    assert speed.measure(1, spent(0.0), 100)["tokens_per_second"] is None
    assert speed.measure(3, spent(4.0), 300)["tokens_per_second"] == 50


# ---------------------------------------------------------------------------------------------------------------------
# TensorBoard and trackers


def test_counts_stay_whole_and_images_reach_tensorboard(tmp_path):
    Image.new("RGB", (5, 4)).save(tmp_path / "answers.png")
    with MetricsWriter(tmp_path) as writer:
        writer.write(3, {})
        writer.write(3, {"tokens_seen": np.int64(12), "loss": 1})
        writer.show(3, "answers", tmp_path / "answers.png")
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 3, "tokens_seen": 12, "loss": 1}\n'
    assert (3, "answers", "image") in events(tmp_path)


class DiesAtCut:
    """A file whose process is killed when it has cut it off."""

    def __init__(self, file):
        self._file = file

    def __getattr__(self, name):
        return getattr(self._file, name)

    def truncate(self, *size):
        self._file.truncate(*size)
        raise KeyboardInterrupt


def test_a_kill_while_a_row_gets_more_values_leaves_the_row(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(3, {"loss": 0.123456789})
    writer._file = DiesAtCut(writer._file)
    with pytest.raises(KeyboardInterrupt):
        writer.write(3, {"loss": 1.0})  # a shorter row
    assert read_metrics(tmp_path) == [{"step": 3, "loss": 1.0}]
    writer.close()


class FakeService:
    """In the place of both packages: notes every call."""

    def __init__(self):
        self.calls = []

    def module(self, name):
        made = types.ModuleType(name)
        made.__spec__ = types.SimpleNamespace(name=name)
        for function in ("init", "log", "finish", "define_metric"):
            setattr(made, function, self._noting(function, made))
        return made

    def _noting(self, function, result):
        def note(*arguments, **named):
            self.calls.append((function, arguments, named))
            return result

        return note

    def of(self, function):
        return [(arguments, named) for name, arguments, named in self.calls if name == function]


@pytest.fixture(params=["wandb", "trackio"])
def service(request, monkeypatch):
    fake = FakeService()
    fake.name = request.param
    monkeypatch.setitem(sys.modules, request.param, fake.module(request.param))
    return fake


def test_a_tracker_is_told_the_numbers_and_finished(tmp_path, service):
    folder = tmp_path / "runs" / "instruct"
    folder.mkdir(parents=True)
    tracking.check_installed(service.name)
    with MetricsWriter(folder, 0, tracking.open_tracker(service.name, folder, {"seed": 3})) as writer:
        writer.write(2, {"loss": 0.5})
    ((_, opened),) = service.of("init")
    assert opened["project"] == "hovle_jax" and opened["config"] == {"seed": 3} and opened["resume"] == "allow"
    assert opened["name"].startswith("runs/instruct")
    ((numbers, named),) = service.of("log")
    assert numbers[0]["loss"] == 0.5 and (named.get("step") or numbers[0]["train_step"]) == 2
    assert len(service.of("finish")) == 1
    # A resumed run is the same one for the service.
    tracking.open_tracker(service.name, folder, {})
    first, second = [(named.get("id"), named["name"]) for _, named in service.of("init")]
    assert first == second


@pytest.mark.slow
def test_the_tracker_of_a_run_hears_what_the_file_has(tmp_path, micro_corpus, quick_compilation, service):
    loop.run(RUN, tmp_path / "run", {}, quiet, track=service.name)
    sent = {}
    for numbers, named in service.of("log"):
        step = named.get("step") or numbers[0]["train_step"]
        sent.setdefault(step, {}).update({k: v for k, v in numbers[0].items() if k != "train_step"})
    written = {row.pop("step"): row for row in read_metrics(tmp_path / "run")}
    assert sent == written
    assert json.loads((tmp_path / "run" / tracking.FILE_NAME).read_text())["id"]


def test_a_missing_package_and_an_unknown_service_are_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--track=wandb needs the package wandb.*pip install wandb"):
        tracking.check_installed("wandb")
    with pytest.raises(UserError, match="--track=mlflow is not one of wandb, trackio"):
        tracking.check_installed("mlflow")
    tracking.check_installed("")


MISTAKES = {
    "--track=wandb": "error: --track=wandb needs the package wandb, which is not installed",
    "--seeds=2 --hosts=2": "error: --seeds trains on one host",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_the_command_says_so_before_it_trains(arguments, tmp_path):
    if "wandb" in arguments and importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed here")
    command = [sys.executable, "-m", "hovle_jax.train", "--config=configs/contrast.py", f"--workdir={tmp_path / 'w'}"]
    result = subprocess.run(
        [*command, *arguments.split()], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 2 and result.stderr.startswith(MISTAKES[arguments]), result.stderr
    assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "w").exists()


def test_a_service_that_refuses_is_one_line(tmp_path, service, monkeypatch):
    def refuse(**named):
        raise RuntimeError("api key not configured")

    monkeypatch.setattr(sys.modules[service.name], "init", refuse)
    with pytest.raises(UserError, match=f"--track={service.name}: .*api key not configured"):
        tracking.open_tracker(service.name, tmp_path, {})
