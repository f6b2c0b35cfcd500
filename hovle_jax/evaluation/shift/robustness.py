"""How much accuracy a shift of the images costs, and how much of that other models would have lost too.

Taori et al. 2020, "Measuring robustness to natural distribution shifts in image classification", section 2: models lie
on a line of shifted over clean accuracy, on logit scales; *effective robustness* is the accuracy beyond what the line
of baseline models predicts from the clean accuracy, *relative robustness* that beyond the shifted accuracy of the
model which one began with. Accuracies are shares from 0 to 1; all results are in percentage points.
"""

import csv
import dataclasses
import io
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from hovle_jax.errors import UserError

CLEAN, MEAN = "clean", "mean"
FEWEST = 3  # baseline models of a line


@dataclasses.dataclass(frozen=True)
class Line:
    """logit(shifted) = slope * logit(clean) + offset, by least squares over baseline models."""

    slope: float
    offset: float

    @classmethod
    def through(cls, clean: Sequence[float], shifted: Sequence[float]) -> "Line":
        """Of shares strictly between 0 and 1, of models that differ in `clean`."""
        slope, offset = np.polyfit(_logit(np.asarray(clean)), _logit(np.asarray(shifted)), 1)
        return cls(float(slope), float(offset))

    def predicted(self, clean: float) -> float:
        """The shifted accuracy of a baseline model of this clean accuracy."""
        at = float(_logit(np.clip(clean, 1e-4, 1 - 1e-4)))
        return float(1 / (1 + np.exp(-(self.slope * at + self.offset))))


def _logit(share):
    return np.log(share) - np.log1p(-share)


def effective_robustness(line: Line, clean: float, shifted: float) -> float:
    """Percentage points above the line."""
    return 100 * (shifted - line.predicted(clean))


def summary(clean: Mapping[str, float], shifted: Mapping[str, float]) -> dict[str, float]:
    """{name: percent or points} of {variant: accuracy}, and of the clean images that each is compared with."""
    drops = [clean[name] - value for name, value in shifted.items()]
    kept = [value / clean[name] for name, value in shifted.items() if clean[name]]
    found = {"mean": 100 * float(np.mean(list(shifted.values()))), "mean drop": 100 * float(np.mean(drops))}
    found |= {"kept": 100 * float(np.mean(kept))} if kept else {}
    worst = min(shifted, key=lambda name: shifted[name])
    return {name: round(value, 2) for name, value in found.items()} | {"worst": round(100 * shifted[worst], 2)}


def read_baseline(path: str | os.PathLike) -> dict[str, Line]:
    """{variant, or 'mean': its line} from a CSV of baseline models.

    Its first line names the columns: `clean`, and `mean` or names of variants; others, as `model`, are passed over.
    A line is a model, accuracies are in percent.

    Raises:
      UserError: it cannot be read, has no such columns, or too few models.
    """
    try:
        text = pathlib.Path(path).read_text("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text)))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"--baseline={path} cannot be read as CSV: {error}") from None
    columns = [name for name in (rows[0] if rows else {}) if name]
    if CLEAN not in columns:
        raise UserError(f"--baseline={path} has no column {CLEAN!r}: its first line names them, as clean,mean")
    clean = _column(path, rows, CLEAN)
    lines = {}
    for name in columns:
        shifted = _column(path, rows, name, needed=False) if name != CLEAN else {}
        both = sorted(clean.keys() & shifted.keys())
        if len({clean[row] for row in both}) >= FEWEST:
            lines[name] = Line.through([clean[row] for row in both], [shifted[row] for row in both])
    if not lines:
        raise UserError(
            f"--baseline={path}: a line needs {FEWEST} models of different accuracy, in a column beside {CLEAN!r}"
        )
    return lines


def _column(path, rows, name, needed=True):
    """{row: share}. Raises UserError for what is no percentage, if the column is needed; else leaves it out."""
    found = {}
    for number, row in enumerate(rows):
        try:
            share = float(row[name] or "") / 100
        except (TypeError, ValueError):
            share = None
        if share is not None and 0 < share < 1:
            found[number] = share
        elif needed:
            raise UserError(
                f"--baseline={path}: line {number + 2} has {name}={row[name]!r}; a number between 0 and 100 is needed"
            )
    return found
