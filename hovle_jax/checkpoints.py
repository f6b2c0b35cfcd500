"""Folders of finished models, by Orbax: what the next stage and the other commands read.

FOLDER/model/COMPONENT/    parameters, one component a folder ('embedding', 'llm', ...); appears when complete
FOLDER/model/config.json   the components' sizes
FOLDER/model/files.json    size and sha256 of each of these files, compared before weights are read
FOLDER/tokenizer.model     or another tokenizer's files (data/text/tokenizer.py)

What a run can be resumed from is apart: training/resumable.py.
"""

import asyncio
import dataclasses
import functools
import math
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from hovle_jax.components import COMPONENTS, Params, logical_shapes, unboxed
from hovle_jax.config import ModelConfig, from_dict
from hovle_jax.errors import UserError
from hovle_jax.hosts.distributed import is_leader, wait
from hovle_jax.hosts.exchange import from_leader
from hovle_jax.sharding.layout import Layout
from hovle_jax.sharding.placement import Placement
from hovle_jax.system import file_lists
from hovle_jax.system.files import read_json, sync_folder, write_json
from hovle_jax.system.mirror import Mirror

SAVE_CONCURRENT_BYTES = 10**8
MADE_AGAIN = (
    "remove the folder model there and give its training command again, which goes on from the newest checkpoint; or "
    "import it again"
)


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
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class _DeferredHandler(ocp.type_handlers.NumpyHandler):
    """Writes deferred leaves as arrays, one after another."""

    async def serialize(self, values, infos, args=None):
        for value, info, arg in zip(values, infos, args or [None] * len(values), strict=True):
            deferred: Any = value  # typed as an array, as its base class has it
            for writing in await super().serialize([deferred.read()], [info], arg and [arg]):
                await asyncio.to_thread(writing.result)
        return []


REGISTRY = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, ocp.type_handlers.ArrayHandler()), (Deferred, _DeferredHandler(deepcopy_host_arrays=False))
)


def is_finished(folder: str | os.PathLike) -> bool:
    return (pathlib.Path(folder) / "model").is_dir()


def save_model(
    folder: str | os.PathLike,
    config: ModelConfig,
    components: dict[str, Callable[[], Params]],
    mirror: Mirror | None = None,
) -> None:
    """Writes FOLDER/model whole: into a folder beside it first, then renamed. Called on all hosts.

    Several hosts that work on a URL write it there; its list comes last, and each of them takes a copy.

    Args:
      components: {name: function that gives its parameters, arrays or `Deferred` ones}; each is written before the
        next one is asked for.
      mirror: where the work folder belongs, if it is a copy of one at a URL.
    """
    folder = pathlib.Path(folder).absolute()
    if mirror and mirror.shared:
        _save_at_url(mirror, folder / "model", config, components)
        return
    partial = folder / "model.partial"
    if is_leader():
        shutil.rmtree(partial, ignore_errors=True)
    wait("an earlier model.partial is gone")
    _write_components(str(partial), components)
    if is_leader():
        _write_config_and_list(partial, config)
        shutil.rmtree(folder / "model", ignore_errors=True)
        partial.rename(folder / "model")
        sync_folder(folder)
    wait("the model is there")


def _save_at_url(mirror, model, config, components):
    place = mirror.remote.below(model.relative_to(mirror.folder).as_posix())
    if is_leader():
        place.remove_all(first=file_lists.FILE_NAME)
    wait("an earlier model is gone")
    _write_components(place.path_for_arrays(), components)
    if is_leader():
        mirror.take_new()  # what all hosts have written, to list it
        _write_config_and_list(model, config)
    from_leader("the model is there", mirror)


def _write_config_and_list(model, config):
    write_json(model / "config.json", dataclasses.asdict(config))
    file_lists.write_list(model)


def _write_components(place, components):
    """Each to a folder below, by all hosts together; returns when all of it is written."""
    for component, make in components.items():
        params = make()
        # Bytes in flight are limited: on a CPU they are a second copy of parameters that lie in the same memory.
        limit = max(SAVE_CONCURRENT_BYTES, *(leaf.nbytes for leaf in jax.tree.leaves(params)))
        gigabytes: Any = (limit + 10**6) / 10**9  # a fraction is as good as the int of its type
        handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=gigabytes, type_handler_registry=REGISTRY)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(f"{place}/{component}", args=ocp.args.PyTreeSave(params))
        del params
    wait("the components are written")


def load_model_config(folder: str | os.PathLike) -> ModelConfig:
    """The ModelConfig of a finished run or an import. Raises UserError when the folder holds none."""
    path = pathlib.Path(folder) / "model" / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder} holds no finished model; give the folder of a finished run, as runs/instruct, or of an import"
        )
    return from_dict(ModelConfig, read_json(path, ["llm"], MADE_AGAIN), str(path))


def abstract_component(config: ModelConfig, component: str, placement: Placement) -> Params:
    """Shapes with shardings of a component's parameters."""
    boxed = logical_shapes(config, component)
    return Layout.of(placement, {component: boxed}).abstract({component: unboxed(boxed)})[component]


def load_component(folder: str | os.PathLike, component: str, abstract: Params) -> Params:
    """One component of a finished run, or the part of it that `abstract` has, onto its shardings (without: numpy).

    Called on the hosts whose devices are in these shardings.

    Raises:
      UserError: the run is missing, unfinished, without this component, of other sizes, or damaged.
    """
    path = pathlib.Path(folder).absolute() / "model" / component
    if not path.is_dir():
        raise UserError(
            f"{folder} holds no finished {component!r} weights; train that stage first, or name another run"
        )
    options = _options_of(abstract)
    if jax.process_index() == (options.primary_host or 0):  # its error ends the others, which wait for it
        check_component(path.parent.parent, component)
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
        stored = checkpointer.metadata(path).item_metadata.tree
        _check_shapes(folder, component, stored, abstract)
        restore_args = jax.tree.map(_restore_args, abstract)  # which crop the padding of a vocabulary or add it
        args = ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args, partial_restore=True)
        return checkpointer.restore(path, args=args)


def check_component(folder: str | os.PathLike, component: str) -> None:
    """Reads a component's files and compares them with the list that was written with them. Older folders have none.

    Raises:
      UserError: a file is missing or is not what was written.
    """
    model = pathlib.Path(folder).absolute() / "model"
    written = model / file_lists.FILE_NAME
    _check_component(model, component, written.stat().st_mtime_ns if written.exists() else 0)


@functools.cache  # once, not for each of the leaves that an export reads
def _check_component(model, component, _):
    try:
        listed = file_lists.read_list(model)
    except UserError as error:
        raise UserError(f"{error}; {MADE_AGAIN}") from None
    if listed is None:
        return
    names = [name for name in listed[0] if name.startswith((f"{component}/", "config.json"))]
    found = file_lists.damage(model, names)
    if found:
        raise UserError(f"{model} is damaged: {file_lists.named(found)}; {MADE_AGAIN}")


def _options_of(abstract):
    """Orbax waits for every process of the run, unless it is given those that take part."""
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


def _fits(folder, component, name, stored, wanted):
    """Whether shapes are equal but for the padding of a vocabulary."""
    stored, wanted = tuple(stored), tuple(wanted)
    axis = COMPONENTS[component].vocabulary.get(tuple(name.split("/")))
    if stored == wanted or axis is None:
        return stored == wanted
    rest = lambda shape: shape[:axis] + shape[axis + 1 :]
    real = getattr(load_model_config(folder), component).vocab_size
    return rest(stored) == rest(wanted) and min(stored[axis], wanted[axis]) >= real
