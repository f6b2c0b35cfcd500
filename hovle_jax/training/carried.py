"""What a run carries over a cut besides its state, so that its metrics are those of a run that was never cut.

RUN/carried.json has it by step, for the steps that have a checkpoint. It is written before the checkpoint is.
"""

import dataclasses
import pathlib

from hovle_jax.system.files import read_json, write_json

FILE_NAME = "carried.json"
REMEDY = "remove it: the next line of metrics is then a mean over fewer steps"


@dataclasses.dataclass(frozen=True)
class Carried:
    """Of a checkpoint.

    Attributes:
      metrics: of each step since the last line, in order.
      seen: what was read from the beginning (`report.seen`); {} = unknown.
      evaluates: whether the held-out metrics of this step are still to be computed, as the run was stopped before.
    """

    metrics: list[dict[str, float]] = dataclasses.field(default_factory=list)
    seen: dict[str, int] = dataclasses.field(default_factory=dict)
    evaluates: bool = False


def write_carried(folder: pathlib.Path, step: int, carried: Carried) -> None:
    """Adds a step; steps whose checkpoint is gone are left out, but for the one before, which may be on its way."""
    before = {int(old): value for old, value in _read(folder).items() if int(old) < step}
    newest = max(before, default=None)
    there = lambda s: s == newest or (folder / "checkpoints" / str(s)).exists()
    kept = {str(s): value for s, value in before.items() if there(s)}
    write_json(folder / FILE_NAME, kept | {str(step): dataclasses.asdict(carried)})


def read_carried(folder: pathlib.Path, step: int) -> Carried | None:
    """What the checkpoint of a step carries; None where that is not known (of step 0, of older runs)."""
    found = _read(folder).get(str(step))
    return Carried(**found) if found else None


def _read(folder):
    path = folder / FILE_NAME
    return read_json(path, remedy=REMEDY) if path.is_file() else {}
