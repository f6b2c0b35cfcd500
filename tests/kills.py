"""Runs that are killed at any moment and started again, compared with one that never was."""

import dataclasses
import json
import os
import pathlib
import random
import time

from hovle_jax.report.metrics import is_measured, read_metrics
from hovle_jax.training import inspecting, saved_steps
from tests import forked

ROOT = pathlib.Path(__file__).parents[1]
STAGES = ("pretrain", "contrast", "distill", "align", "instruct")
WITHIN = 300  # seconds in which a run ends, on busy cores
AFTER_A_SAVE_BEGAN = 0.08  # seconds at most
# Not of a run's result: what processes note of themselves.
PASSING = ("time.json", ".lock", "facts.json", "versions.json", "compile", "stacks")


def start(stage: str, workdir: pathlib.Path) -> forked.Process:
    """The stage's command in a process of its own."""
    workdir.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"XLA_FLAGS": "", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return forked.Process("tests.killed_run", [stage, workdir], ROOT, env, workdir / "out", workdir / "err")


def finish(stage: str, workdir: pathlib.Path) -> float:
    """Lets the command end -> the seconds that it computed for. Fails where it does not end well."""
    process, spent, deadline = start(stage, workdir), 0.0, time.monotonic() + WITHIN
    while process.poll() is None:
        assert time.monotonic() < deadline, (workdir / "out").read_text()[-2000:]
        spent = max(spent, computed(process))
        time.sleep(0.05)
    status = process.poll()
    assert status == 0, (status, (workdir / "out").read_text()[-2000:], (workdir / "err").read_text()[-2000:])
    return spent


def computed(process: forked.Process) -> float:
    """Seconds of CPU time that a process has had: its clock, whatever else the machine does; 0 = it is gone."""
    try:
        fields = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass
class Kills:
    """Kills of one run.

    Attributes:
      seconds: that a run which is not killed computes for.
      inside_a_save: whether they come as a save has begun, else at any moment.
    """

    stage: str
    workdir: pathlib.Path
    seconds: float
    inside_a_save: bool = False

    def of(self, count: int, drawn: random.Random) -> int:
        """Starts and kills until it was `count` times, or the run was done first -> how often it was killed."""
        for number in range(count):
            process = start(self.stage, self.workdir)
            if self.inside_a_save:
                self._await_a_save(process)
                time.sleep(drawn.uniform(0, AFTER_A_SAVE_BEGAN))
            else:
                moment = drawn.uniform(0, self.seconds)
                while computed(process) < moment and process.poll() is None:
                    time.sleep(0.01)
            if process.poll() is not None:
                assert process.poll() == 0, (self.workdir / "err").read_text()[-2000:]
                return number
            process.kill()
            process.wait(10)
        return count

    def _await_a_save(self, process):
        """Until there is a folder of checkpoints that was not there, or the process has ended."""
        folder = self.workdir / self.stage / "checkpoints"
        names = lambda: {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        before, looks = names(), 0
        while not names() - before and (looks % 20 or process.poll() is None):
            looks += 1
            time.sleep(0.002)


def unequal_arrays(first: pathlib.Path, second: pathlib.Path) -> list[str]:
    """Names of the arrays of two checkpoints, or models, that are not the same to the bit."""
    found = [inspecting.leaves(inspecting.find(str(folder))) for folder in (first, second)]
    if found[0].keys() != found[1].keys():
        return ["other arrays"]
    return [name for name in found[0] if found[0][name].read().tobytes() != found[1][name].read().tobytes()]


def differences(whole: pathlib.Path, killed: pathlib.Path) -> list[str]:
    """What is not the same in the folders of two runs: arrays and rows to the bit, files by name, results."""
    found = []
    for place in (f"checkpoints/{_newest(whole)}", "model"):
        found += [f"{place}: {name}" for name in unequal_arrays(whole / place, killed / place)]
    if _rows(whole) != _rows(killed):
        found.append(f"rows of metrics: {_rows(whole)} and {_rows(killed)}")
    files = [sorted(p.name for p in folder.iterdir() if not p.name.startswith(PASSING)) for folder in (whole, killed)]
    if files[0] != files[1]:
        found.append(f"files: {files[0]} and {files[1]}")
    results = [json.loads((folder / "results.json").read_text()) for folder in (whole, killed)]
    if results[0] != results[1]:
        found.append(f"results: {results[0]} and {results[1]}")
    return found


def _newest(folder):
    return max(saved_steps.step_folders(folder / "checkpoints"))


def _rows(folder):
    rows = [{name: value for name, value in row.items() if not is_measured(name)} for row in read_metrics(folder)]
    return [row for row in rows if row.keys() > {"step"}]
