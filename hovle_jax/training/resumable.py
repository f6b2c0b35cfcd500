"""What a run can be resumed from, by Orbax: RUN/checkpoints/STEP, with trained parameters, optimizer state and step."""

import dataclasses
import pathlib

import jax
import orbax.checkpoint as ocp

from hovle_jax.training.state import TrainState


class RunCheckpoints:
    """The resumable checkpoints of one run."""

    def __init__(self, folder, every, keep):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, save_interval_steps=every, create=True)
        self._manager = ocp.CheckpointManager(pathlib.Path(folder).absolute() / "checkpoints", options=options)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None or jax.process_count() == 1:  # a host that fails does not wait for the others' part of a save
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, force: bool = False) -> None:
        """Saves what the stage changes (asynchronously); `force` also between the regular steps."""
        if step != self.latest:
            self._manager.save(step, args=ocp.args.StandardSave(_changing(state)), force=force)

    def wait(self) -> None:
        """Until all that was saved is written."""
        self._manager.wait_until_finished()

    def restore(self, state: TrainState) -> TrainState:
        """The newest checkpoint, with the frozen parameters of `state`; arrays take the shardings of `state`."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _changing(state))
        restored = self._manager.restore(self.latest, args=ocp.args.StandardRestore(abstract))
        return dataclasses.replace(state, **restored)


def _changing(state):
    return {"step": state.step, "trained": state.trained, "opt_state": state.opt_state}
