"""The folders of a run's checkpoints, RUN/checkpoints/STEP: which are whole, which is the newest, which stay.

STEP/default/      what Orbax wrote
STEP/files.json    written last: size and sha256 of every file, the held-out metrics at that step (`system.file_lists`)

STEP.partial is being written, STEP.deleting is being removed, STEP.damaged was found damaged and is left as it is.
"""

import dataclasses
import math
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

from hovle_jax.errors import UserError
from hovle_jax.system import file_lists
from hovle_jax.system.files import reason_of, sync_folder

ARRAYS = "default"
COMMITTED = "commit_success.txt"  # of a checkpoint without a list, as older versions wrote it
LEFT_BEHIND = ("*.partial", "*.deleting", "*.orbax-checkpoint-tmp*")
HIGHEST = "max:"  # before the name of a metric of which more is better


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which checkpoints stay.

    Attributes:
      last: so many of the newest.
      every: those whose step divides by it; 0 = none.
      best: a held-out metric: the one where it was lowest ('max:NAME': highest); '' = none.
    """

    last: int
    every: int = 0
    best: str = ""

    def stay(self, metrics: Mapping[int, Mapping[str, float]]) -> set[int]:
        """The steps that stay, of {step: its held-out metrics}."""
        steps = sorted(metrics)
        kept = set(steps[-self.last :]) | {step for step in steps if self.every and step % self.every == 0}
        name, sign = self.best.removeprefix(HIGHEST), -1 if self.best.startswith(HIGHEST) else 1
        known = [
            (sign * metrics[step][name], step) for step in steps if math.isfinite(metrics[step].get(name, math.nan))
        ]
        return kept | ({min(known)[1]} if known else set())


def step_folders(folder: pathlib.Path) -> dict[int, pathlib.Path]:
    """{step: its folder}, the oldest first."""
    found = [path for path in folder.glob("*") if path.name.isdecimal() and path.is_dir()]
    return {int(path.name): path for path in sorted(found, key=lambda path: int(path.name))}


def damage(path: pathlib.Path) -> list[str]:
    """What is wrong with a checkpoint, a line for each; reads all of it. Older ones have no list to compare with."""
    if not (path / file_lists.FILE_NAME).exists():
        return [] if (path / COMMITTED).exists() else [f"{file_lists.FILE_NAME}, which is written last, is missing"]
    return file_lists.damage(path)


def note_of(path: pathlib.Path) -> dict[str, Any]:
    """What was noted with a checkpoint: step, time, held_out; {} where there is nothing that can be read."""
    try:
        listed = file_lists.read_list(path)
    except UserError:
        return {}
    return listed[1] if listed else {}


def newest_whole(folder: pathlib.Path, say: Callable[[str], object]) -> int | None:
    """The newest step that is whole; None where nothing was saved. What is damaged is renamed, never removed.

    Called by one process, before anything is saved.

    Args:
      say: takes a line for each checkpoint that is passed over.
    Raises:
      UserError: all that was saved is damaged.
    """
    _remove_leftovers(folder)
    for step, path in reversed(step_folders(folder).items()):
        if not any(inner.is_file() for inner in path.rglob("*")):
            say(f"warning: the checkpoint {path} is empty: removed; the one before is taken")
            shutil.rmtree(path)
            continue
        found = damage(path)
        if not found:
            return step
        aside = set_aside(path)
        say(
            f"warning: checkpoint {step} is damaged: {file_lists.named(found)}; it is now {aside}, and the one before "
            "is taken"
        )
    damaged = sorted(folder.glob("*.damaged*"))
    if damaged:
        raise UserError(
            f"no checkpoint in {folder} is whole: {', '.join(path.name for path in damaged)}; bring one back from a "
            f"copy under its step's name, or remove {folder} and the same command begins the run again"
        )
    return None


def set_aside(path: pathlib.Path) -> pathlib.Path:
    """Renames a damaged checkpoint -> its new path."""
    aside, number = path.with_name(f"{path.name}.damaged"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged.{number}")
    path.rename(aside)
    return aside


def commit(partial: pathlib.Path, final: pathlib.Path, note: Mapping[str, Any]) -> None:
    """Makes a checkpoint out of what was written: its list, then its name."""
    if final.exists():  # complete here, but it could not be sent to where the work folder belongs
        shutil.rmtree(partial)
        return
    file_lists.write_list(partial, {**note, "time": round(time.time())})
    partial.rename(final)
    sync_folder(final.parent)


def prune(folder: pathlib.Path, keep: Keep, say: Callable[[str], object]) -> None:
    """Removes the checkpoints that need not stay; says where one cannot be removed."""
    folders = step_folders(folder)
    stay = keep.stay({step: note_of(path).get("held_out") or {} for step, path in folders.items()})
    for step, path in folders.items():
        if step in stay:
            continue
        try:
            going = path.rename(path.with_name(f"{path.name}.deleting"))  # half of one is no checkpoint
            shutil.rmtree(going)
        except OSError as error:
            say(f"warning: the old checkpoint {path} cannot be removed: {reason_of(error)}")


def _remove_leftovers(folder: pathlib.Path) -> None:
    """What a killed process was writing or removing."""
    for pattern in LEFT_BEHIND:
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
