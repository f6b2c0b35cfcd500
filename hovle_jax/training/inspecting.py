"""What lies in checkpoints and finished models: steps, sizes, trees with norms, differences. Needs no device."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from hovle_jax.errors import UserError
from hovle_jax.system import file_lists
from hovle_jax.system.files import reason_of
from hovle_jax.training import saved_steps

MODEL = "model"
PIECE = 2**22  # elements that are converted at a time


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


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array in a checkpoint, which `read` reads."""

    shape: tuple[int, ...]
    dtype: str
    folder: pathlib.Path
    name: str

    def read(self) -> np.ndarray:
        """Raises UserError where it cannot be read."""
        import tensorstore as ts

        store = {"driver": "ocdbt", "base": f"file://{self.folder.absolute()}/", "path": f"{self.name}/"}
        try:
            return ts.open({"driver": "zarr", "kvstore": store}, read=True).result().read().result()
        except ValueError as error:
            raise UserError(f"{self.name} in {self.folder} cannot be read: {reason_of(error)}") from None


def leaves(saved: Saved) -> dict[str, Leaf]:
    """{path: leaf} of all arrays, in order. Raises UserError where the tree cannot be read."""
    found = {}
    for part, folder in saved.trees.items():
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                tree = checkpointer.metadata(folder.absolute()).item_metadata.tree
            metas = jax.tree.leaves(tree, is_leaf=lambda node: hasattr(node, "shape"))
            for meta in metas:
                path = "/".join(filter(None, [part, *meta.name.split(".")]))
                found[path] = Leaf(tuple(meta.shape), str(np.dtype(meta.dtype)), folder, meta.name)
        except Exception as error:  # Orbax has many for a damaged folder
            raise UserError(f"{folder} cannot be read: {reason_of(error)}") from None
    return found


def norm(array: np.ndarray) -> float:
    """The root of the sum of the squares, in float64 and in small pieces."""
    flat = array.reshape(-1)
    pieces = (flat[at : at + PIECE].astype(np.float64) for at in range(0, flat.size, PIECE))
    return float(np.sqrt(sum(float(np.dot(piece, piece)) for piece in pieces)))


def difference(first: np.ndarray, second: np.ndarray) -> float:
    """The largest absolute difference of two arrays of one shape; 0.0 = bit-equal, nan where one is not a number."""
    if first.dtype == second.dtype and first.tobytes() == second.tobytes():
        return 0.0
    largest = 0.0
    for at in range(0, first.size, PIECE):
        one, other = (array.reshape(-1)[at : at + PIECE].astype(np.float64) for array in (first, second))
        with np.errstate(invalid="ignore"):
            gap = np.where(one == other, 0.0, np.abs(one - other))
        largest = max(largest, float(gap.max())) if not np.isnan(gap).any() else float("nan")
        if np.isnan(largest):
            break
    return largest


def _step(step, path):
    return Saved(f"step {step}", path, {"": path / saved_steps.ARRAYS})


def _model(path):
    parts = sorted(inner for inner in path.iterdir() if inner.is_dir())
    return Saved(MODEL, path, {part.name: part for part in parts})
