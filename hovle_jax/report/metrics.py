"""The numbers of a run: one JSON object per line, the same for TensorBoard, and for a service that follows the run."""

import json
import math
import numbers
import os
import pathlib

import numpy as np

from hovle_jax.errors import UserError
from hovle_jax.report.tracking import NoTracker, Tracker

FILE_NAME = "metrics.jsonl"
TENSORBOARD = "tensorboard"
TIMES = "seconds/"  # where the time went until the end of a process (`report.goodput`), one number for each activity
SCORES = "score/"  # of a finished run
MEMORY = "memory/"
RATES = ("tokens_per_second", "model_flops_per_second", "mfu", "goodput")
WALL = "wall_seconds"  # since the run began, over all its processes


def is_measured(name: str) -> bool:
    """Whether a metric tells of the machine and the clock: two equal runs differ in it, and so does a resumed one."""
    return name in RATES or name == WALL or name.startswith((TIMES, MEMORY))


class MetricsWriter:
    """Appends to `folder/metrics.jsonl` and `folder/tensorboard`, and tells a tracker; a context manager.

    Lines after `resume_step` come from a run that was killed after its last checkpoint; they are dropped, since the
    resumed run writes them again. The file never holds a step twice: a second `write` of the newest step (its
    evaluation, say) joins that step's line.

    Attributes:
      folder: the run's folder; made if absent.
      resume_step: the step of the checkpoint that the run continues from; 0 = a new run.
      tracker: is told the same numbers, and finished at the end; None = there is none.
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
        # The purge hides what a killed process wrote at later steps; the suffix keeps two files of one second apart.
        self._tensorboard = SummaryWriter(
            str(folder / TENSORBOARD), purge_step=resume_step + 1, filename_suffix=f".{resume_step}"
        )
        self._tracker = tracker or NoTracker()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds the scalars of one step.

        Args:
          step: not before the step of the last call.
          values: {name: number}; a non-finite number is written as null. Nothing is written of an empty dict.
        """
        if not values:
            return
        step, values = int(step), {name: _number(value) for name, value in values.items()}
        if step < self.last["step"]:
            raise ValueError(f"step {step} comes after step {self.last['step']} was written")
        if step == self.last["step"]:
            self._file.truncate(self._file.seek(self._last_offset))
            self.last = {**self.last, **values}
        else:
            self.last = {"step": step, **values}
        self._last_offset = self._file.tell()
        self._file.write(_to_line(self.last))
        self._file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tracker.log(step, values)

    def show(self, step: int, name: str, path: str | os.PathLike) -> None:
        """Gives TensorBoard an image file that belongs to a step."""
        from PIL import Image

        pixels = np.asarray(Image.open(path).convert("RGB"))
        self._tensorboard.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()
        self._tracker.finish()

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.close()


class NoMetrics:
    """In the place of a MetricsWriter on hosts that write nothing."""

    last = {"step": -1}

    def write(self, step: int, values: dict[str, float]) -> None:
        pass

    def show(self, step: int, name: str, path: str | os.PathLike) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        pass


def read_metrics(folder: str | os.PathLike) -> list[dict]:
    """The lines of `folder/metrics.jsonl` as dicts, in order; [] without the file.

    A last line that was cut in the middle of its writing is left out; null becomes nan.

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


def _number(value):
    """A count stays whole in the file; all else is a float."""
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _to_line(row):
    """One line in bytes. NaN is no JSON, and other readers of the file would stumble over it."""
    values = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(values).encode() + b"\n"


def _rewrite(path, rows):
    """Replaces the file in one move, so that a kill leaves the old or the new one; returns it open at its end."""
    fresh = path.with_suffix(".jsonl.new")
    fresh.write_bytes(b"".join(map(_to_line, rows)))
    os.replace(fresh, path)
    file = path.open("r+b")
    file.seek(0, os.SEEK_END)
    return file
