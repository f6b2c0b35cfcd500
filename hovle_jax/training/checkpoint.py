"""Orbax: a run's resumable state, and the finished model that the next stage and the other commands read.

RUN/checkpoints/STEP/   trained parameters, optimizer state, step
RUN/model/COMPONENT/    the result, one component a folder ('embedding', 'llm', ...); appears when complete
RUN/model/config.json   the components' sizes
RUN/config.json         the run's own
RUN/tokenizer.model
"""

import asyncio
import dataclasses
import json
import math
import pathlib
import shutil
import tempfile
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp

from hovle_jax.config import RUN_ONLY_KEYS, ModelConfig, RunConfig
from hovle_jax.errors import UserError
from hovle_jax.hosts.distributed import is_leader, wait
from hovle_jax.mappings import differences, from_dict
from hovle_jax.training.stages import STAGES

# What a stage hands on; the rest (teacher, head) is dropped with the stage.
HANDED_ON = ("embedding", "llm", "clip")
SAVE_CONCURRENT_BYTES = 10**8


@dataclasses.dataclass(frozen=True, eq=False)
class Deferred:
    """A leaf that is read when it is written: a model that is larger than the memory can be saved.

    Attributes:
      read: gives the numpy array; called once.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable

    @property
    def size(self):
        return math.prod(self.shape)

    @property
    def nbytes(self):
        return self.size * self.dtype.itemsize


class _DeferredHandler(ocp.type_handlers.NumpyHandler):
    """Writes deferred leaves as arrays, one after another."""

    async def serialize(self, values, infos, args=None):
        for value, info, arg in zip(values, infos, args or [None] * len(values), strict=True):
            for writing in await super().serialize([value.read()], [info], arg and [arg]):
                await asyncio.to_thread(writing.result)
        return []


REGISTRY = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, ocp.type_handlers.ArrayHandler()), (Deferred, _DeferredHandler(deepcopy_host_arrays=False))
)


def open_run_folder(folder):
    """Makes a run's folder. Raises UserError when it cannot be written to."""
    folder = pathlib.Path(folder).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}); choose another folder with --workdir") from None
    return folder


def save_config(folder, config: RunConfig):
    text = json.dumps(config.to_dict(), indent=2)
    (folder / "config.json").write_text(text + "\n")


def check_same_config(folder, config: RunConfig):
    """Raises UserError when the folder holds a run of another config: resuming it would mix two."""
    path = folder / "config.json"
    if not path.is_file():
        return
    # Read through the dataclass: a key that is newer than the run has its default.
    old, new = RunConfig.from_dict(json.loads(path.read_text())).to_dict(), config.to_dict()
    found = [d for d in differences(old, new) if d[0].split(".")[0] not in RUN_ONLY_KEYS]
    if found:
        key, before, after = found[0]
        more = f" (and {len(found) - 1} more keys)" if len(found) > 1 else ""
        raise UserError(
            f"{folder} holds a run with {key}={before!r}, not {after!r}{more}; "
            "choose another --workdir, or remove that folder to start over"
        )


def check_same_data(folder, found):
    """Notes what a run reads; raises UserError where it went on with other data than it began with.

    Args:
      found: `data.batch.Found`.
    """
    path, has_steps = folder / "data.json", any((folder / "checkpoints").glob("[0-9]*"))
    noted = {"digest": found.digest, "samples": found.samples, "summary": found.summary}
    if has_steps and path.is_file():
        before = json.loads(path.read_text())
        if before["digest"] != found.digest:
            raise UserError(
                f"the data of {folder} is not what it was when the run began ({before['samples']:,} samples then, "
                f"{found.samples:,} now, or others, or mended ones); bring it back, or choose another --workdir"
            )
    path.write_text(json.dumps(noted, indent=2) + "\n")


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
    def latest(self):
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step, state, force=False):
        """Saves what the stage changes (asynchronously); `force` also between the regular steps."""
        if step != self.latest:
            self._manager.save(step, args=ocp.args.StandardSave(_changing(state)), force=force)

    def wait(self):
        """Until all that was saved is written."""
        self._manager.wait_until_finished()

    def restore(self, state):
        """The newest checkpoint, with the frozen parameters of `state`; arrays take the shardings of `state`."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _changing(state))
        restored = self._manager.restore(self.latest, args=ocp.args.StandardRestore(abstract))
        return state.replace(**restored)


def _changing(state):
    return {"step": state.step, "trained": state.trained, "opt_state": state.opt_state}


def is_finished(folder):
    return (pathlib.Path(folder) / "model").is_dir()


def save_run_model(folder, params, config: RunConfig):
    """Writes what a stage hands on; a component that it holds in part is not its result."""
    partial = {prefix[0] for prefix in STAGES[config.stage].exists}
    components = [component for component in HANDED_ON if component in params and component not in partial]
    save_model(folder, ModelConfig.of(config, components), {c: lambda c=c: params[c] for c in components})


def save_model(folder, config: ModelConfig, components):
    """Writes FOLDER/model whole: into a folder beside it first, then renamed. Called on all hosts.

    Args:
      components: {name: function that gives its parameters, arrays or `Deferred` ones}; each is written before the
        next one is asked for.
    """
    folder = pathlib.Path(folder).absolute()
    partial = folder / "model.partial"
    if is_leader():
        shutil.rmtree(partial, ignore_errors=True)
    wait("an earlier model.partial is gone")
    for component, make in components.items():
        params = make()
        # Bytes in flight are limited: on a CPU they are a second copy of parameters that lie in the same memory.
        limit = max(SAVE_CONCURRENT_BYTES, *(leaf.nbytes for leaf in jax.tree.leaves(params)))
        handler = ocp.PyTreeCheckpointHandler(
            save_concurrent_gb=(limit + 10**6) / 10**9, type_handler_registry=REGISTRY
        )
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(partial / component, args=ocp.args.PyTreeSave(params))
        del params
    wait("the components are written")
    if is_leader():
        (partial / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        shutil.rmtree(folder / "model", ignore_errors=True)
        partial.rename(folder / "model")
    wait("the model is there")


def load_model_config(folder):
    """The ModelConfig of a finished run or an import. Raises UserError when the folder holds none."""
    path = pathlib.Path(folder) / "model" / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder} holds no finished model; give the folder of a finished run, as runs/instruct, or of an import"
        )
    return from_dict(ModelConfig, json.loads(path.read_text()), str(path))


def load_component(folder, component, abstract):
    """One component of a finished run, or the part of it that `abstract` has, onto its shardings (without: numpy).

    Called on the hosts whose devices are in these shardings.

    Raises:
      UserError: the run is missing, unfinished, without this component, or of other sizes.
    """
    path = pathlib.Path(folder).absolute() / "model" / component
    if not path.is_dir():
        raise UserError(
            f"{folder} holds no finished {component!r} weights; train that stage first, or name another run"
        )
    options = _options_of(abstract)
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
        stored = checkpointer.metadata(path).item_metadata.tree
        _check_shapes(folder, component, stored, abstract)
        restore_args = jax.tree.map(_restore_args, abstract)  # which cut off the padding of a vocabulary or add it
        args = ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args, partial_restore=True)
        return checkpointer.restore(path, args=args)


def _options_of(abstract):
    """Orbax waits for every process of the run, unless told which take part."""
    shardings = [leaf.sharding for leaf in jax.tree.leaves(abstract) if leaf.sharding is not None]
    taking_part = {device.process_index for sharding in shardings for device in sharding.device_set}
    if jax.process_count() == 1 or len(taking_part) == jax.process_count():
        return ocp.options.MultiprocessingOptions()
    first = min(taking_part)
    return ocp.options.MultiprocessingOptions(first, taking_part, barrier_sync_key_prefix=f"from_host_{first}")


def _restore_args(leaf):
    if leaf.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=False)


def _check_shapes(folder, component, stored, abstract):
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        at, name = stored, jax.tree_util.keystr(path, simple=True, separator="/")
        for key in path:
            at = at.get(key.key) if isinstance(at, dict) else None
        if at is None or not _fits(folder, component, name, at.shape, leaf.shape):
            found = "is missing" if at is None else f"has shape {tuple(at.shape)}"
            raise UserError(
                f"{folder} is a checkpoint of another config: {component}/{name} {found} and {tuple(leaf.shape)} "
                "is needed; use the same preset and sizes, or another --workdir"
            )


VOCABULARY_AXES = {  # paths of what has an axis of token ids
    "llm": {"token_embedding/embedding": 0, "head/kernel": 1},
    "embedding": {"text_embedding/embedding": 0},
}


def _fits(folder, component, name, stored, wanted):
    """Whether shapes are equal but for the padding of a vocabulary."""
    stored, wanted = tuple(stored), tuple(wanted)
    axis = VOCABULARY_AXES.get(component, {}).get(name)
    if stored == wanted or axis is None:
        return stored == wanted
    rest = lambda shape: shape[:axis] + shape[axis + 1 :]
    real = getattr(load_model_config(folder), component).vocab_size
    return rest(stored) == rest(wanted) and min(stored[axis], wanted[axis]) >= real
