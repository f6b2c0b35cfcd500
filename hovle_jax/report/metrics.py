"""The numbers of a run: one JSON object per line, and the same scalars for TensorBoard."""

import json
import math
import os
import pathlib

from hovle_jax.errors import UserError

FILE_NAME = "metrics.jsonl"
TENSORBOARD = "tensorboard"
TIMES = "seconds/"  # where the time went until the end of a process (`report.goodput`), one number for each activity


class MetricsWriter:
    """Appends to `folder/metrics.jsonl` and `folder/tensorboard`; a context manager.

    Lines after `resume_step` come from a run that was killed after its last checkpoint; they are dropped, since the
    resumed run writes them again. The file never holds a step twice: a second `write` of the newest step (its
    evaluation, say) joins that step's line.

    Attributes:
      folder: the run's folder; made if absent.
      resume_step: the step of the checkpoint that the run continues from; 0 = a new run.
    """

    def __init__(self, folder, resume_step=0):
        from tensorboardX import SummaryWriter

        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(folder) if row["step"] <= resume_step]
        self._file = _rewrite(folder / FILE_NAME, kept)
        self._last = kept[-1] if kept else {"step": -1}
        self._last_offset = self._file.tell() - (len(_to_line(kept[-1])) if kept else 0)
        # The purge hides what a killed process wrote at later steps; the suffix keeps two files of one second apart.
        self._tensorboard = SummaryWriter(
            str(folder / TENSORBOARD), purge_step=resume_step + 1, filename_suffix=f".{resume_step}"
        )

    def write(self, step, values):
        """Adds the scalars of one step.

        Args:
          step: not before the step of the last call.
          values: {name: number}; a non-finite number is written as null.
        """
        step, values = int(step), {name: float(value) for name, value in values.items()}
        if step < self._last["step"]:
            raise ValueError(f"step {step} comes after step {self._last['step']} was written")
        if step == self._last["step"]:
            self._file.truncate(self._file.seek(self._last_offset))
            self._last = {**self._last, **values}
        else:
            self._last = {"step": step, **values}
        self._last_offset = self._file.tell()
        self._file.write(_to_line(self._last))
        self._file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def close(self):
        self._file.close()
        self._tensorboard.close()

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.close()


class NoMetrics:
    """In the place of a MetricsWriter on hosts that write nothing."""

    def write(self, step, values):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        pass


def read_metrics(folder):
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
