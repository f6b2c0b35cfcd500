"""The metrics of a run: one JSON object per line, and the same numbers for TensorBoard and a tracking service."""

import json
import math
import numbers
import os
import pathlib
from collections.abc import Mapping

import numpy as np

from hovle_jax.errors import UserError
from hovle_jax.report.tracking import NoTracker, Tracker
from hovle_jax.system.files import write_whole

FILE_NAME = "metrics.jsonl"
TENSORBOARD = "tensorboard"
TIMES = "seconds/"  # by activity, up to the end of a process (`report.goodput`)
SCORES = "score/"  # of a finished run
MEMORY = "memory/"
HELD_OUT = "held_out/"
RATES = ("tokens_per_second", "model_flops_per_second", "mfu", "goodput")
WALL = "wall_seconds"  # of the run, over all its processes


def is_measured(name: str) -> bool:
    """Whether a metric measures the machine and the clock: it differs between two equal runs, and in a resumed one."""
    return name in RATES or name == WALL or name.startswith((TIMES, MEMORY))


class MetricsWriter:
    """Appends to `folder/metrics.jsonl` and `folder/tensorboard`, and sends to a tracker; a context manager.

    Lines after `resume_step` were written by a process that died after its last checkpoint. They are dropped, as the
    resumed run writes them again. The file never has a step twice: a second `write` for the newest step (say, of its
    evaluation) adds to that step's line.

    Attributes:
      folder: the run's folder; created if absent.
      resume_step: the step of the checkpoint that the run continues from; 0 = a new run.
      tracker: gets the same numbers, and is finished at the end; None = no tracker.
      last: the newest line, as a dict; {"step": -1} before the first.
    """

    def __init__(self, folder: str | os.PathLike, resume_step: int = 0, tracker: Tracker | None = None):
        from tensorboardX import SummaryWriter

        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(folder) if row["step"] <= resume_step]
        self._file = _rewrite(folder / FILE_NAME, kept)
        self.last = kept[-1] if kept else {"step": -1}
        self._last_offset = self._file.tell() - (len(_to_line(kept[-1])) if kept else 0)
        # The purge hides later steps of a killed process; the suffix tells two files of the same second apart.
        self._tensorboard = SummaryWriter(
            str(folder / TENSORBOARD), purge_step=resume_step + 1, filename_suffix=f".{resume_step}"
        )
        self._tracker = tracker or NoTracker()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the scalars of one step.

        Args:
          step: not before the step of the last call.
          values: {name: number}; a non-finite number is written as null. An empty dict writes nothing.
        """
        if not values:
            return
        step, values = int(step), {name: _number(value) for name, value in values.items()}
        if step < self.last["step"]:
            raise ValueError(f"step {step} comes after step {self.last['step']} was written")
        if step == self.last["step"]:
            self._file.seek(self._last_offset)  # written over, not cut first: a kill leaves the row
            self.last = {**self.last, **values}
        else:
            self.last = {"step": step, **values}
        self._last_offset = self._file.tell()
        self._file.write(_to_line(self.last))
        self._file.flush()
        self._file.truncate()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tracker.log(step, values)

    def sync(self) -> None:
        """Waits until all rows are on the disk."""
        os.fsync(self._file.fileno())

    def show(self, step: int, name: str, path: str | os.PathLike) -> None:
        """Adds an image file to TensorBoard at a step."""
        from PIL import Image

        pixels = np.asarray(Image.open(path).convert("RGB"))
        self._tensorboard.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Ends the files and the tracker."""
        self._file.close()
        self._tensorboard.close()
        self._tracker.finish()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


class NoMetrics:
    """Replaces MetricsWriter on hosts that write nothing."""

    last = {"step": -1}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def sync(self) -> None:
        pass

    def show(self, step: int, name: str, path: str | os.PathLike) -> None:
        pass

    def __enter__(self) -> "NoMetrics":
        return self

    def __exit__(self, *unused: object) -> None:
        pass


def read_metrics(folder: str | os.PathLike) -> list[dict]:
    """The lines of `folder/metrics.jsonl` as dicts, in order; [] without the file.

    A truncated last line is left out; null becomes nan.

    Raises:
      UserError: a broken line before the last one.
    """
    path = pathlib.Path(folder) / FILE_NAME
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({name: math.nan if value is None else value for name, value in row.items()})
        except (ValueError, AttributeError):
            if number < len(lines):
                raise UserError(f"{path}, line {number} is not a JSON object: repair or delete that line") from None
    return rows


def read_held_out(folder: str | os.PathLike) -> dict[int, dict[str, float]]:
    """{step: {name: value}} of the held-out metrics in `folder/metrics.jsonl`."""
    of = lambda row: {name.removeprefix(HELD_OUT): row[name] for name in row if name.startswith(HELD_OUT)}
    return {row["step"]: found for row in read_metrics(folder) if (found := of(row))}


def _number(value):
    """A count stays an integer in the file; all else is a float."""
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _to_line(row):
    """One line in bytes. NaN becomes null, as it is not JSON."""
    values = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(values).encode() + b"\n"


def _rewrite(path, rows):
    """Replaces the file by a rename, so that a kill leaves the old or the new one -> the file, open at its end."""
    write_whole(path, b"".join(map(_to_line, rows)))
    file = path.open("r+b")
    file.seek(0, os.SEEK_END)
    return file
