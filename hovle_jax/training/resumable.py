"""What a run can be resumed from, by Orbax: RUN/checkpoints/STEP, with trained parameters, optimizer state and step.

They lie in a folder, or straight at a URL where several hosts work on one (`saved_steps.Steps`).

A save runs beside the steps. One that fails is noticed at the next step and tried again with the state of that time; if
that fails too, the run stops with the reason.
"""

import concurrent.futures
import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from hovle_jax.errors import UserError
from hovle_jax.hosts import distributed
from hovle_jax.system.files import reason_of
from hovle_jax.system.mirror import Mirror
from hovle_jax.training import saved_steps
from hovle_jax.training.remote_steps import RemoteSteps
from hovle_jax.training.state import TrainState

# Seconds from a failed save to the next try, each longer than the one before; a save that fails once more ends the run.
TRY_AGAIN_AFTER = (0.0, 10.0, 60.0)
DATA_FILE = 1 << 31  # bytes of a file of arrays, Orbax's own choice: not said, it is worked out anew for every array


class RunCheckpoints:
    """The resumable checkpoints of one run; a context manager. All hosts do the same with it.

    Opening it looks for the newest checkpoint that is whole (`saved_steps.newest_whole`).

    Args:
      folder: the run's own.
      keep: which checkpoints stay.
      say: takes lines about damaged checkpoints and failed saves.
      mirror: where the work folder belongs, if it is a copy: a save is complete when it is there too.
    Attributes:
      latest: the newest complete step, or None.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        keep: saved_steps.Keep,
        say: Callable[[str], object] = print,
        mirror: Mirror | None = None,
    ) -> None:
        self._steps, self._keep, self._say = _steps(pathlib.Path(folder).absolute(), mirror), keep, say
        self._mirror = mirror
        newest = self._steps.newest_whole(say) if distributed.is_leader() else None
        self.latest: int | None = distributed.gather("the newest checkpoint", newest)[0]
        self._checkpointer = ocp.AsyncCheckpointer(_handler())
        self._threads = concurrent.futures.ThreadPoolExecutor(1)  # finishes the save that is on its way
        self._saving: tuple[int, concurrent.futures.Future] | None = None
        self._failures, self._again_at = 0, 0.0

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or jax.process_count() == 1:  # a host that fails does not wait for the others' part of a save
            if self._saving:
                concurrent.futures.wait([self._saving[1]])
            self._threads.shutdown()

    def check_space(self, state: TrainState) -> None:
        """Raises UserError where the disk has no room for a checkpoint of this state."""
        if distributed.is_leader():
            self._steps.check_space(sum(leaf.nbytes for leaf in jax.tree.leaves(_changing(state))))

    def due_again(self) -> bool:
        """Whether a save has failed and it is time to try again; call it after each step. Raises UserError: `save`."""
        if self._saving and self._saving[1].done():
            self._settle()
        return bool(self._failures) and not self._saving and time.monotonic() >= self._again_at

    def save(self, step: int, state: TrainState, held_out: Mapping[str, float] | None = None) -> None:
        """Begins to save what the stage changes; waits for the save before.

        Args:
          held_out: the held-out metrics at this step, by which the best checkpoint is kept.
        Raises:
          UserError: saves have failed too often.
        """
        self._settle()
        if step == self.latest:
            return
        try:
            if distributed.is_leader():
                self.check_space(state)
                self._steps.begin(step)
            arrays = ocp.args.PyTreeSave(_changing(state), ocdbt_target_data_file_size=DATA_FILE)
            self._checkpointer.save(f"{self._steps.unfinished(step)}/{saved_steps.ARRAYS}", args=arrays)
        except Exception as error:  # Orbax and tensorstore have many
            self._failed(step, error)
            return
        self._saving = step, self._threads.submit(self._complete, step, _floats(held_out or {}))

    def held_out(self, step: int, metrics: Mapping[str, float]) -> None:
        """Notes the held-out metrics of a checkpoint that was saved before they were known."""
        self._settle()
        if distributed.is_leader() and step == self.latest:
            self._steps.add_note(step, {"held_out": _floats(metrics)})

    def finish(self, step: int, state: TrainState) -> None:
        """Until the checkpoint of the last step is written."""
        self._settle()
        while self.latest != step:
            time.sleep(max(0.0, self._again_at - time.monotonic()))
            self.save(step, state)
            self._settle()

    def restore(self, state: TrainState) -> TrainState:
        """The newest checkpoint, with the frozen parameters of `state`; arrays take the shardings of `state`.

        What of `state` is replaced is deleted first, so that devices never hold two states.

        Raises:
          UserError: it cannot be restored.
        """
        assert self.latest is not None
        arrays = f"{self._steps.path(self.latest)}/{saved_steps.ARRAYS}"
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _changing(state))
        jax.tree.map(lambda leaf: leaf.delete(), _changing(state))
        try:
            args = ocp.args.PyTreeRestore(abstract, ocp.checkpoint_utils.construct_restore_args(abstract))
            restored = self._checkpointer.restore(arrays, args=args)
        except Exception as error:
            raise self._cannot_restore(self.latest, error) from error
        return dataclasses.replace(state, **restored)

    def _complete(self, step, held_out):
        """In a thread: waits for what Orbax writes, and makes a checkpoint of it."""
        self._checkpointer.wait_until_finished()
        if self._mirror and self._mirror.shared:  # what each host has written beside the arrays
            self._mirror.push()
            distributed.wait("all is sent that belongs to a checkpoint")
        if distributed.is_leader():
            self._steps.commit(step, {"step": step, "held_out": held_out, "time": round(time.time())})
            self._steps.prune(self._keep, self._say)
            if self._mirror:
                self._mirror.push()

    def _settle(self):
        """Waits for the save that is on its way, and takes note of how it went."""
        if not self._saving:
            return
        (step, saving), self._saving = self._saving, None
        try:
            saving.result()
        except Exception as error:
            self._failed(step, error)
        else:
            self.latest, self._failures = step, 0

    def _failed(self, step: int, error: Exception) -> None:
        reason = str(error) if isinstance(error, UserError) else reason_of(error)
        self._failures += 1
        if not distributed.several():  # the others may still write there
            self._steps.abandon(step)
        if distributed.several() or self._failures > len(TRY_AGAIN_AFTER):
            newest = "from the beginning" if self.latest is None else f"from the checkpoint of step {self.latest}"
            raise UserError(
                f"no checkpoint can be saved as {self._steps.path(step)}: {reason} (tried {self._failures} times, "
                f"last at step {step}); put that right, and the same command goes on {newest}"
            ) from error
        wait = TRY_AGAIN_AFTER[self._failures - 1]
        self._again_at = time.monotonic() + wait
        self._say(f"warning: the save of step {step} failed: {reason}; tried again after {wait:g} s")

    def _cannot_restore(self, step, error):
        reason, path = reason_of(error), self._steps.path(step)
        if self._steps.note(step):  # it was compared with its list
            return UserError(
                f"{path} is whole and cannot be restored ({reason}): another version of the code wrote it; go on with "
                "that version, or choose another --workdir"
            )
        if distributed.is_leader():
            path = self._steps.set_aside(step)
        return UserError(
            f"a checkpoint is damaged ({reason}); it is now {path}, and the same command goes on from the one before"
        )


def _steps(folder: pathlib.Path, mirror: Mirror | None) -> saved_steps.Steps:
    """Where a run's checkpoints lie."""
    if mirror and mirror.shared:
        return RemoteSteps(mirror.remote.below(f"{folder.relative_to(mirror.folder).as_posix()}/checkpoints"))
    return saved_steps.LocalSteps(folder / "checkpoints")


def _floats(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _handler() -> ocp.PyTreeCheckpointHandler:
    """Writes what a resumed run reads, and no more: half of the time of a save of small arrays is what nobody reads.

    Shardings are those of the state that is restored into. The bits of trained floats hardly compress (8%). One
    process gains nothing from writing each replica's part of an array apart.
    """
    arrays = ocp.type_handlers.ArrayHandler(
        enable_write_sharding_file=False, use_replica_parallel=distributed.several()
    )
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)


def _changing(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "trained": state.trained, "opt_state": state.opt_state}
