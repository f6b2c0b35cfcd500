"""The checkpoints of a run, RUN/checkpoints/STEP: which are whole, which is the newest, which stay.

STEP/default/      what Orbax wrote
STEP/files.json    written last: size and sha256 of every file, the held-out metrics at that step (`system.file_lists`)

STEP.partial is being written, STEP.deleting is being removed, STEP.damaged was found damaged and is left as it is.
"""

import dataclasses
import itertools
import math
import pathlib
import shutil
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from hovle_jax.errors import UserError
from hovle_jax.system import file_lists
from hovle_jax.system.files import reason_of, sync_folder

ARRAYS = "default"
COMMITTED = "commit_success.txt"  # of a checkpoint without a list, as older versions wrote it
LEFT_BEHIND = ("*.partial", "*.deleting", "*.orbax-checkpoint-tmp*")
DAMAGED = ".damaged"  # ends a step's name
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


class Steps(Protocol):
    """Where the checkpoints of a run lie. One process calls it, but for the two paths.

    Every method raises OSError or UserError where that fails.
    """

    def path(self, step: int) -> str:
        """A checkpoint's folder; its arrays are below `ARRAYS` in it."""
        ...

    def newest_whole(self, say: Callable[[str], object]) -> int | None:
        """The newest step that is whole; None where nothing was saved. What is damaged is set aside, never removed.

        Called before anything is saved.

        Args:
          say: takes a line for each checkpoint that is passed over.
        Raises:
          UserError: all that was saved is damaged.
        """
        ...

    def check_space(self, needed: int) -> None:
        """Raises UserError where there is no room for so many bytes."""
        ...

    def unfinished(self, step: int) -> str:
        """Where a checkpoint is written until it is complete."""
        ...

    def begin(self, step: int) -> None:
        """Makes room for it, and removes what an earlier try has left."""
        ...

    def abandon(self, step: int) -> None:
        """Removes what was written of one that failed."""
        ...

    def commit(self, step: int, note: Mapping[str, Any]) -> None:
        """Makes a checkpoint of what was written."""
        ...

    def note(self, step: int) -> dict[str, Any]:
        """What was noted with it: step, time, held_out; {} where there is nothing that can be read."""
        ...

    def add_note(self, step: int, note: Mapping[str, Any]) -> None:
        """Adds to its note."""
        ...

    def set_aside(self, step: int) -> str:
        """Gives a damaged checkpoint another name -> that."""
        ...

    def prune(self, keep: Keep, say: Callable[[str], object]) -> None:
        """Removes the checkpoints that need not stay; says where one cannot be removed."""
        ...


class LocalSteps:
    """`Steps` in a folder, which is made if it is not there."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder

    def path(self, step: int) -> str:
        return str(self._folder / str(step))

    def newest_whole(self, say: Callable[[str], object]) -> int | None:
        self._folder.mkdir(exist_ok=True)
        self._remove_leftovers()
        for step, path in reversed(step_folders(self._folder).items()):
            if not any(inner.is_file() for inner in path.rglob("*")):
                say(f"warning: the checkpoint {path} is empty: removed; the one before is taken")
                shutil.rmtree(path)
                continue
            found = damage(path)
            if not found:
                return step
            say(passed_over(step, found, self.set_aside(step)))
        check_any_whole(str(self._folder), [path.name for path in self._folder.glob(f"*{DAMAGED}*")])
        return None

    def check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise UserError(
                f"a checkpoint takes {needed / 1e9:.3g} GB and {self._folder} has {free / 1e9:.3g} GB left; make room, "
                "or keep fewer (keep_checkpoints, keep_every)"
            )

    def unfinished(self, step: int) -> str:
        return f"{self.path(step)}.partial"

    def begin(self, step: int) -> None:
        self.abandon(step)
        pathlib.Path(self.unfinished(step)).mkdir()

    def abandon(self, step: int) -> None:
        shutil.rmtree(self.unfinished(step), ignore_errors=True)

    def commit(self, step: int, note: Mapping[str, Any]) -> None:
        partial, final = pathlib.Path(self.unfinished(step)), pathlib.Path(self.path(step))
        if final.exists():  # complete here, but it could not be sent to where the work folder belongs
            shutil.rmtree(partial)
            return
        file_lists.write_list(partial, note)
        partial.rename(final)
        sync_folder(final.parent)

    def note(self, step: int) -> dict[str, Any]:
        return note_of(pathlib.Path(self.path(step)))

    def add_note(self, step: int, note: Mapping[str, Any]) -> None:
        file_lists.write_note(self.path(step), note)

    def set_aside(self, step: int) -> str:
        path = self._folder / str(step)
        aside = path.with_name(free_name(step, {inner.name for inner in self._folder.iterdir()}))
        path.rename(aside)
        return str(aside)

    def prune(self, keep: Keep, say: Callable[[str], object]) -> None:
        folders = step_folders(self._folder)
        stay = keep.stay({step: note_of(path).get("held_out") or {} for step, path in folders.items()})
        for step, path in folders.items():
            if step in stay:
                continue
            try:
                going = path.rename(path.with_name(f"{path.name}.deleting"))  # half of one is no checkpoint
                shutil.rmtree(going)
            except OSError as error:
                say(not_removed(str(path), error))

    def _remove_leftovers(self):
        """What a killed process was writing or removing."""
        for pattern in LEFT_BEHIND:
            for path in self._folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)


def passed_over(step: int, found: list[str], aside: str) -> str:
    """The line of a damaged checkpoint."""
    return (
        f"warning: checkpoint {step} is damaged: {file_lists.named(found)}; it is now {aside}, and the one before "
        "is taken"
    )


def not_removed(path: str, error: Exception) -> str:
    """The line of an old checkpoint that stays."""
    return f"warning: the old checkpoint {path} cannot be removed: {reason_of(error)}"


def free_name(step: int, names: Collection[str]) -> str:
    """Of a damaged checkpoint, among those that are there."""
    wanted = (f"{step}{DAMAGED}" + (f".{number}" if number > 1 else "") for number in itertools.count(1))
    return next(name for name in wanted if name not in names)


def check_any_whole(folder: str, damaged: list[str]) -> None:
    """Raises UserError where something was saved and nothing of it is whole."""
    if damaged:
        raise UserError(
            f"no checkpoint in {folder} is whole: {', '.join(sorted(damaged))}; bring one back from a "
            f"copy under its step's name, or remove {folder} and the same command begins the run again"
        )
