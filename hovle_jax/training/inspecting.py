"""What lies in checkpoints and finished models: steps, sizes, trees with norms, differences. Needs no device."""

import dataclasses
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from hovle_jax.errors import UserError
from hovle_jax.system import file_lists
from hovle_jax.system.files import reason_of
from hovle_jax.training import saved_steps

MODEL = "model"


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint, or the finished model of a run or an import.

    Attributes:
      name: 'step 500', or 'model'.
      trees: {name of a part: folder of its arrays}.
    """

    name: str
    folder: pathlib.Path
    trees: dict[str, pathlib.Path]

    def damage(self) -> list[str]:
        """What is wrong with it, a line for each; reads all of it."""
        return file_lists.damage(self.folder) if self.name == MODEL else saved_steps.damage(self.folder)

    @property
    def has_list(self) -> bool:
        """Whether there is something to compare it with."""
        return (self.folder / file_lists.FILE_NAME).exists()

    def size(self) -> int:
        """Bytes of all its files."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def row(self) -> dict[str, Any]:
        """What `list` shows of it."""
        found, note = self.damage(), saved_steps.note_of(self.folder)
        state = f"damaged: {file_lists.named(found)}" if found else "whole" if self.has_list else "not listed"
        return {
            "name": self.name,
            "bytes": self.size(),
            "time": note.get("time", round(self.folder.stat().st_mtime)),
            "held_out": note.get("held_out", {}),
            "state": state,
            "path": str(self.folder),
        }


def saved_in(folder: str) -> list[Saved]:
    """Every checkpoint of a run and its finished model, the oldest first. Raises UserError where there is nothing."""
    path = pathlib.Path(folder)
    steps = saved_steps.step_folders(path / "checkpoints")
    found = [_step(step, inner) for step, inner in steps.items()]
    if (path / MODEL).is_dir():
        found.append(_model(path / MODEL))
    if not found:
        raise UserError(f"{folder} has neither checkpoints nor a model; give the folder of a run, as runs/instruct")
    return found


def find(place: str) -> Saved:
    """One of them: RUN/checkpoints/STEP, RUN/model, or RUN for its newest. Raises UserError where there is none."""
    path = pathlib.Path(place)
    if (path / saved_steps.ARRAYS).is_dir():
        return _step(path.name, path)
    if path.name == MODEL and path.is_dir():
        return _model(path)
    return saved_in(place)[-1]


def leaves(saved: Saved) -> Iterator[tuple[str, np.ndarray]]:
    """(path, array) of every leaf; each is read when it is asked for. Raises UserError where one cannot be read."""
    for part, folder in saved.trees.items():
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            try:
                tree: Any = checkpointer.metadata(folder.absolute()).item_metadata.tree
                paths = sorted(path for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_leaf))
            except Exception as error:  # Orbax has many
                raise UserError(f"{folder} cannot be read: {reason_of(error)}") from None
    yield from ()


def _is_leaf(node):
    return hasattr(node, "shape")


def _step(step, path):
    return Saved(f"step {step}", path, {"": path / saved_steps.ARRAYS})


def _model(path):
    parts = sorted(inner for inner in path.iterdir() if inner.is_dir())
    return Saved(MODEL, path, {part.name: part for part in parts})
