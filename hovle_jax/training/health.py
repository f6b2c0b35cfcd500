"""The health of a run, as its host sees it: steps that are not finite, frozen parameters, a run that has collapsed.

The judgement itself is part of the compiled step (`judging`). What it says is read where the loop waits for the devices
anyway, before a line and before a save, so nothing is saved or handed on that has not been judged.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.components import Params
from hovle_jax.config import RunConfig
from hovle_jax.hosts import distributed
from hovle_jax.hosts.distributed import SharedError
from hovle_jax.system.command_line import warn
from hovle_jax.system.files import read_json, write_json
from hovle_jax.training import judging
from hovle_jax.training.state import TrainState

FILE_NAME = "skipped.json"  # the records of the newest checkpoints
RECORDS = 20  # that are kept there
COLLAPSED = 50  # steps with no gradient at all, or with the same loss to the bit


class Health:
    """Judges one run of a stage in one process. All hosts do the same, as all see the same numbers.

    Attributes:
      config: RunConfig.
      folder: the run's own.
      sources: {component: folder of the run that it came from}.
      say: takes a line.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: pathlib.Path,
        sources: Mapping[str, pathlib.Path],
        say: Callable[[str], object] = print,
    ) -> None:
        self._config, self._folder, self._sources, self._say = config, folder, sources, say
        self._waiting: list[tuple[int, dict]] = []  # (step, its loss, gradient norm and judgement on the devices)
        self._collapse = Collapse()
        self._skipped = 0

    def start(self, state: TrainState, step: int) -> TrainState:
        """Looks at what a run starts from, before anything is compiled for it.

        Args:
          state: as it was loaded, or restored at `step`.
          step: 0 for a new run.
        Returns:
          The state with the record of updates that were left out before.
        Raises:
          SharedError: something is not finite; it names the tensor and where it came from.
        """
        looked = {"trained": look(state.trained), "frozen": look(state.frozen), "moments": look(state.opt_state)}
        for part, found in looked.items():
            for name, seen in found.items():
                if not seen.finite:
                    raise SharedError(f"{self._config.stage}: {self._origin(part, name, step)}")
        self._frozen = {name: seen.bits for name, seen in looked["frozen"].items()}
        self._names = judging.names(state.trained, state.opt_state)
        self._first_of_update = judging.first_of_update(state.trained)
        state = dataclasses.replace(state, record=_restored(state.record, self._folder, step))
        self._skipped = int(state.record["skipped"]) if state.record else 0
        return state

    def took(self, step: int, metrics: dict) -> dict:
        """Keeps the judgement of a step, counted from 1 -> its metrics without it."""
        judged = ("loss", "gradient_norm", "not_finite", "skipped")
        self._waiting.append((step, {name: metrics[name] for name in judged if name in metrics}))
        return {name: value for name, value in metrics.items() if name not in ("not_finite", "skipped")}

    def judge(self, state: TrainState) -> dict[str, int]:
        """Reads the judgements of the steps since the last call -> {'skipped': updates left out} where some may be.

        Raises:
          SharedError: a step was not finite and the run is to stop there, or too many updates were left out.
        """
        waiting, self._waiting = self._waiting, []
        read = jax.device_get([metrics for _, metrics in waiting])
        for (step, _), metrics in zip(waiting, read):
            bad = int(metrics["not_finite"])
            skips = self._config.health.on_bad_step == "skip"
            if bad != judging.FINE and (not skips or bad >= self._first_of_update):
                raise SharedError(self._first_bad(step, bad, metrics, state))
            self._note_skipped(step, bad, metrics)
            self._collapse.add(step, metrics)
        if state.record is None:
            return {}
        return {"skipped": self._skipped}

    def before_save(self, step: int, state: TrainState) -> None:
        """What must hold before a checkpoint of a step is written or a model is handed on.

        Raises:
          SharedError: see `judge`; also where a frozen parameter is no longer what it was at the start.
        """
        self.judge(state)
        for name, seen in look(state.frozen).items():
            if seen.bits != self._frozen[name]:
                raise SharedError(
                    f"{self._config.stage}: the frozen parameter {name} has changed since the run began (noticed at "
                    f"step {step}; nothing of it is saved): a device or its memory is faulty, or code writes where it "
                    "must not; the same command goes on from the newest checkpoint, best on another machine"
                )
        if state.record and distributed.is_leader():
            _write_record(self._folder, step, jax.device_get(state.record))

    def _note_skipped(self, step, bad, metrics):
        skipped = int(metrics.get("skipped", self._skipped))
        if skipped == self._skipped:
            return
        self._skipped = skipped
        stage, limit = self._config.stage, self._config.health.max_skipped
        why = self._names[bad] + " is not finite" if bad != judging.FINE else "its loss is a spike"
        told = f"step {step}: {why} (loss {metrics['loss']:.4g})"
        if skipped > limit:
            raise SharedError(
                f"{stage}: {told}, and its update is one more than the {limit} that may be left out; look at the "
                "learning rate and the data, or allow more with --config.health.max_skipped"
            )
        self._say(f"{stage}: {told}; its update is left out ({skipped} of at most {limit})")

    def _first_bad(self, step, bad, metrics, state):
        """The message about the first step that is not finite."""
        loss, name = float(metrics["loss"]), self._names[bad]
        what = f"the loss is {loss} at step {step}"
        if bad != judging.LOSS:
            what = f"{name} is not finite at step {step} (loss {loss:.4g})"
        return (
            f"{self._config.stage}: {what}, the first bad step; nothing of it is saved, and the newest checkpoint in "
            f"{self._folder} is older; {self._remedy(bad, state)}"
        )

    def _remedy(self, bad, state):
        spoilt = [name for name, seen in look(state.frozen).items() if not seen.finite]
        if spoilt:
            return f"{spoilt[0]} was finite at the start and is not now: go on by the same command on another machine"
        lower = "lower optimizer.learning_rate and start in another --workdir"
        if bad >= self._first_of_update:
            return lower
        return f"{lower}, or leave such updates out and go on with --config.health.on_bad_step=skip"

    def _origin(self, part, name, step):
        """Says of a tensor that is not finite from the start where it came from."""
        component = name.split("/")[0]
        if step and part != "frozen":
            return (
                f"{name} is not finite in the checkpoint of step {step} in {self._folder}; remove that checkpoint to "
                "go on from the one before"
            )
        if component in self._sources:
            return (
                f"{name} is not finite in the weights of {self._sources[component]}, before any step; give another "
                f"{component} (init.{component})"
            )
        return f"{name} is not finite as it was initialised; check the sizes of {component}"


class Collapse:
    """Notices, once, that a run no longer learns: no gradient at all, or the same loss, for COLLAPSED steps."""

    def __init__(self) -> None:
        self._since: dict[str, int] = {}  # when each began
        self._loss = math.nan
        self._told = False

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the loss and the norm of the gradient of each step, in order."""
        loss = float(metrics["loss"])
        signs = {
            "the gradient has been exactly 0": float(metrics["gradient_norm"]) == 0,
            f"the loss has been exactly {loss:.6g}": loss == self._loss,
        }
        self._since = {sign: self._since.get(sign, step) for sign, holds in signs.items() if holds}
        self._loss = loss
        for sign, since in self._since.items():
            if step - since + 1 >= COLLAPSED and not self._told:
                self._told = True
                if distributed.is_leader():
                    warn(f"{sign} since step {since}: nothing is learned; look at optimizer.learning_rate and the data")


# ---------------------------------------------------------------------------------------------------------------------
# A look at arrays


@dataclasses.dataclass(frozen=True)
class Seen:
    """Of an array: whether all of it is finite, and the sum of its bits."""

    finite: bool
    bits: int


def look(tree: Params) -> dict[str, Seen]:
    """{name: Seen} of a tree's arrays, computed where they are; the bits are added as integers, in any order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = jax.device_get([_looker(getattr(leaf.sharding, "mesh", None))(leaf) for _, leaf in leaves])
    return {judging.name_of(path): Seen(bool(fine), int(bits)) for (path, _), (fine, bits) in zip(leaves, found)}


@functools.cache
def _looker(mesh: jax.sharding.Mesh | None):
    """`_look`, compiled for arrays on a mesh; every host gets the whole result."""
    whole = None if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(_look, out_shardings=whole)


def _look(array):
    """[finite (1 or 0), sum of bits], uint32."""
    unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    bits = jnp.sum(jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32), dtype=jnp.uint32)
    return jnp.stack([jnp.all(jnp.isfinite(array)).astype(jnp.uint32), bits])


# ---------------------------------------------------------------------------------------------------------------------
# Records beside the checkpoints: a resumed run leaves out the same updates as one that was never cut


def _write_record(folder, step, record):
    kept = _records(folder) | {str(step): jax.tree.map(lambda value: value.tolist(), record)}
    newest = sorted(kept, key=int)[-RECORDS:]
    write_json(folder / FILE_NAME, {name: kept[name] for name in newest})


def _records(folder):
    path = folder / FILE_NAME
    remedy = "remove it: a resumed run then counts skipped updates and spikes from there"
    return read_json(path, remedy=remedy) if path.is_file() else {}


def _restored(record, folder, step):
    """A fresh record with what that of a step says; a run that was begun with other rules may say less."""
    if record is None:
        return None
    noted = _records(folder).get(str(step), {}) if step else {}
    place = lambda name, leaf: jax.device_put(np.asarray(noted.get(name, leaf), leaf.dtype), leaf.sharding)
    return {name: place(name, leaf) for name, leaf in record.items()}
